"""Writing a new folder so that it is there complete or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

from mowe.words import atomic_files, terminations, writer_locks

# How often `remove` tries, the pause between two tries in seconds, and after
# how many tries in a row that find nothing it is done. Threads of an
# interrupted save go on writing for seconds at most.
_ATTEMPTS = 100
_PAUSE = 0.05
_ABSENT = 10


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a folder beside `folder` to write to, and renames it at the end.

  Nothing of it is left when the body fails.

  Args:
    folder: the folder that is there at the end; its parents are made.

  Raises:
    FileExistsError: the folder is there.
    PlaceInUseError: another process is about to write it.
  """
  folder = pathlib.Path(folder)
  check_new(folder)
  with (
    atomic_files.naming(folder),
    writer_locks.of_path(folder),
    terminations.cleaning_up(),
  ):
    yield from _new_folder(folder)


def _new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  partial = pathlib.Path(
    tempfile.mkdtemp(prefix=f'{folder.name}.partial-', dir=folder.parent)
  )
  try:
    yield partial
    # mkdtemp makes a folder for its owner alone (0700), but other users must be
    # able to read one that they share.
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)
    check_new(folder)
    atomic_files.sync_below(partial)
    partial.rename(folder)
    atomic_files.sync(folder.parent)
  except BaseException:
    remove(partial)
    raise


def remove(folder: str | os.PathLike) -> None:
  """Removes a folder to which threads may be writing for a while.

  It raises nothing, so that the error that led here is the one that is seen.
  """
  absent = 0
  for _ in range(_ATTEMPTS):
    shutil.rmtree(folder, ignore_errors=True)
    # A thread that writes another file makes the folders above it again, even
    # if all of them are gone.
    time.sleep(_PAUSE)
    absent = 0 if os.path.lexists(folder) else absent + 1
    if absent == _ABSENT:
      return


def check_new(folder: str | os.PathLike) -> None:
  """Raises FileExistsError if the folder, or anything of its name, is there."""
  if os.path.lexists(folder):
    raise FileExistsError(
      f'{folder} must not be there yet, but is. Choose another folder, or '
      'remove it.'
    )
