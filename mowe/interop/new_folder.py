"""A new folder that is there complete or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a folder beside `folder` to write to, which is renamed at the end.

  Nothing is left when the body fails.

  Args:
    folder: where; its parents are made.

  Raises:
    FileExistsError: the folder is there.
  """
  folder = pathlib.Path(folder)
  check_new(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = pathlib.Path(
    tempfile.mkdtemp(prefix=f'{folder.name}.partial-', dir=folder.parent)
  )
  try:
    yield partial
    # mkdtemp gives 0700; other users of a shared folder must read it.
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)
    check_new(folder)
    partial.rename(folder)
  except BaseException:
    shutil.rmtree(partial)
    raise


def check_new(folder: str | os.PathLike) -> None:
  """Raises FileExistsError if the folder is there."""
  if os.path.lexists(folder):
    raise FileExistsError(
      f'{folder} must not be there yet, but is. Choose another folder, or '
      'remove it.'
    )
