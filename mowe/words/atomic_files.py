"""Writes files that exist complete or not at all.

A system may write to the disk in any order, and all at its own time. So after a
power cut a file may have its new name and none of its contents, unless the
contents were forced to the disk before it was renamed; and a new name may be
gone unless the folder was forced to the disk after.
"""

import contextlib
import errno
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

# What a file system without such a thing answers, or one that lets nobody read
# a folder.
_NO_SYNC = (
  *(errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EACCES),
)
# Errors of writing, which name no file when it is open already.
_OF_WRITING = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
)


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
  """Names a place in errors of writing to it, such as that of a full disk."""
  try:
    yield
  except OSError as error:
    if error.errno not in _OF_WRITING or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


def check_local(path: str | os.PathLike) -> None:
  """Raises ValueError if a path would make folders called `gs:` or `~`."""
  for part in pathlib.Path(path).parts:
    if re.fullmatch(r'[a-z][a-z0-9+.-]+:', part):
      raise ValueError(
        f'A folder must be on a file system of this machine, but {path} names '
        'another place. Write to a folder here and copy it, or mount that place.'
      )
    if part == '~':
      raise ValueError(
        f'A folder must be named without ~, but is {path}. Write '
        f'{os.path.expanduser("~")} in its place.'
      )


def make_folder(path: str | os.PathLike) -> None:
  """Makes a folder and those above it where they are missing, on disk.

  Raises:
    ValueError: it is not there, and not local; see `check_local`.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return
  check_local(path)
  make_folder(path.parent)
  path.mkdir(exist_ok=True)
  sync(path.parent)


def sync(path: str | os.PathLike) -> None:
  """Forces to the disk what a file holds, or the names that a folder holds.

  Not every file system can do so for a folder, and then it is not done.
  """
  try:
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
  except OSError as error:
    if error.errno not in _NO_SYNC or not os.path.isdir(path):
      raise


def sync_below(folder: str | os.PathLike) -> None:
  """Forces a folder to the disk with all that is in it."""
  for place, _, names in os.walk(folder, topdown=False):
    for name in names:
      sync(os.path.join(place, name))
    sync(place)
