"""The manifest of a folder: the sha256 digests of all files in it."""

import fnmatch
import hashlib
import json
import pathlib

from mowe.words import atomic_files

FILE_NAME = 'manifest.json'


class DamagedCheckpointError(ValueError):
  """Files of a checkpoint are not as they were written."""


def write(folder: pathlib.Path) -> None:
  """Writes the manifest of a folder whose other files are all written.

  It appears under its name only when it and all other files are whole and on
  disk.
  """
  digests = {name: digest(folder / name) for name in _files(folder)}
  atomic_files.sync_below(folder)
  atomic_files.sync(folder.parent)
  content = json.dumps({'sha256': digests}, indent=2, sort_keys=True)
  atomic_files.write_atomically(folder / FILE_NAME, content.encode())


def verify(folder: pathlib.Path) -> None:
  """Compares every file with the manifest.

  Raises:
    DamagedCheckpointError: files are changed, missing or new; the message says
      which.
  """
  expected = _expected(folder)
  present = set(_files(folder))
  problems = [f'{name} is missing' for name in expected.keys() - present]
  problems += [f'{name} is not in it' for name in present - expected.keys()]
  problems += [
    f'{name} has other contents'
    for name in expected.keys() & present
    if digest(folder / name) != expected[name]
  ]
  if problems:
    raise _damaged(folder, '; '.join(sorted(problems)))


def verify_files(folder: pathlib.Path, pattern: str) -> None:
  """Compares those files with the manifest whose names match a glob.

  Raises:
    DamagedCheckpointError: one of them is changed or missing.
  """
  for name, wanted in _expected(folder).items():
    if fnmatch.fnmatch(name, pattern):
      path = folder / name
      if not path.is_file():
        raise _damaged(folder, f'{name} is missing')
      if digest(path) != wanted:
        raise _damaged(folder, f'{name} has other contents')


def digest(path: pathlib.Path) -> str:
  """Returns the sha256 of a file, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _expected(folder: pathlib.Path) -> dict[str, str]:
  """Returns the digests of a manifest, by the names of the files."""
  try:
    text = (folder / FILE_NAME).read_text(encoding='utf-8')
    return dict(json.loads(text)['sha256'])
  except (ValueError, KeyError, TypeError) as error:
    raise _damaged(folder, f'{FILE_NAME} cannot be read ({error})') from error


def _files(folder: pathlib.Path) -> list[str]:
  """Returns the names of all files below the folder but the manifest."""
  own = (FILE_NAME, FILE_NAME + '.tmp')
  names = [
    path.relative_to(folder).as_posix()
    for path in folder.rglob('*')
    if path.is_file()
  ]
  return sorted(name for name in names if name not in own)


def _damaged(folder: pathlib.Path, what: str) -> DamagedCheckpointError:
  return DamagedCheckpointError(
    f'The files of {folder} must be those in its {FILE_NAME}, but {what}. '
    'Copy the folder again from where it was whole, or restore another step.'
  )
