"""Writes files that exist complete or not at all.

A system may write to the disk in any order, and all at its own time. So after a
power cut a file may have its new name and none of its contents, unless the
contents were forced to the disk before it was renamed; and a new name may be
gone unless the folder was forced to the disk after.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
  """Writes a file, which exists complete or not at all, and is on disk."""
  path = pathlib.Path(path)
  with naming(path):
    _write_atomically(path, content)


def _write_atomically(path: pathlib.Path, content: bytes) -> None:
  make_folder(path.parent)
  descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
  try:
    with os.fdopen(descriptor, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    # mkstemp gives the mode 0600, but other users of a shared folder must be
    # able to read the file.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(partial, 0o666 & ~umask)
    os.replace(partial, path)
  except BaseException:
    os.unlink(partial)
    raise
  sync(path.parent)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Names a file or folder in errors of the system that name none.

  That of a full disk is one of them.
  """
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(path: str | os.PathLike) -> None:
  """Makes a folder and those above it where they are missing, on disk."""
  path = pathlib.Path(path)
  if path.is_dir():
    return
  make_folder(path.parent)
  path.mkdir(exist_ok=True)
  sync(path.parent)


def sync(path: str | os.PathLike) -> None:
  """Forces to the disk what a file holds, or the names that a folder holds."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_below(folder: str | os.PathLike) -> None:
  """Forces a folder to the disk with all that is in it."""
  for place, _, names in os.walk(folder, topdown=False):
    for name in names:
      sync(os.path.join(place, name))
    sync(place)
