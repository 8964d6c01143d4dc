"""A file system as it is after a power cut, of which only what was forced stays.

A system promises that the contents of a file are on the disk after fsync of the
file, and a name after fsync of the folder that holds it; the rest may be there
or not. `Disk` notes both, and makes the tree that is left in the worst cases.
"""

import contextlib
import dataclasses
import os
import pathlib
import stat
import threading
from collections.abc import Iterator
from unittest import mock

# The contents of files, or the names of folders, by inode; what was never
# forced to the disk is not in it.
_Forced = dict[int, bytes | dict[str, int]]


@dataclasses.dataclass(frozen=True)
class Moment:
  """A moment at which the power may be cut.

  Attributes:
    forced: what is on the disk for sure.
    names: the tree as programs see it: path -> inode, None for a folder.
    is_folder: which inodes are folders.
    done: what was said to be finished by then; see `Disk.finish`.
  """

  forced: _Forced
  names: dict[str, int | None]
  is_folder: frozenset[int]
  done: tuple[int, ...]


class Disk:
  """Notes what is forced to the disk below a folder, which must be empty.

  Attributes:
    root: the folder.
    moments: a moment for each call of fsync, before and after it.
  """

  def __init__(self, root: pathlib.Path):
    self.root = root
    self.moments: list[Moment] = []
    self._forced: _Forced = {root.stat().st_ino: {}}
    self._is_folder = {root.stat().st_ino}
    self._done: list[int] = []
    # A descriptor of each inode that was forced: so none is used again.
    self._kept: list[int] = []
    self._lock = threading.Lock()

  @contextlib.contextmanager
  def watching(self) -> Iterator[None]:
    """Notes calls of fsync as long as the context lasts."""
    fsync = os.fsync

    def noted(descriptor):
      number = (
        descriptor if isinstance(descriptor, int) else descriptor.fileno()
      )
      path = os.readlink(f'/proc/self/fd/{number}')
      if not pathlib.Path(path).is_relative_to(self.root):
        return fsync(descriptor)
      with self._lock:
        self._note()
        fsync(descriptor)
        self._force(number, path)
        self._note()

    with mock.patch.object(os, 'fsync', noted):
      yield
    for descriptor in self._kept:
      os.close(descriptor)

  def finish(self, number: int) -> None:
    """Notes that something is said to be finished, and so must stay."""
    with self._lock:
      self._done.append(number)

  def _force(self, descriptor, path):
    status = os.fstat(descriptor)
    self._kept.append(os.dup(descriptor))
    if stat.S_ISDIR(status.st_mode):
      self._is_folder.add(status.st_ino)
      self._forced[status.st_ino] = {
        entry.name: entry.inode() for entry in os.scandir(path)
      }
      for entry in os.scandir(path):
        if entry.is_dir():
          self._is_folder.add(entry.inode())
    else:
      self._forced[status.st_ino] = pathlib.Path(
        f'/proc/self/fd/{descriptor}'
      ).read_bytes()

  def _note(self):
    names = {}
    for place, folders, files in os.walk(self.root):
      below = pathlib.Path(place).relative_to(self.root)
      names |= {str(below / name): None for name in folders}
      for name in files:
        with contextlib.suppress(FileNotFoundError):
          names[str(below / name)] = os.stat(pathlib.Path(place, name)).st_ino
    moment = Moment(
      dict(self._forced), names, frozenset(self._is_folder), tuple(self._done)
    )
    self.moments.append(moment)


def write_least(moment: Moment, root: int, out: pathlib.Path) -> None:
  """Makes the tree in which nothing is left but what was forced.

  Args:
    moment: when the power is cut.
    root: the inode of the watched folder.
    out: where the tree is made; it must not be there.
  """
  out.mkdir()
  for name, inode in moment.forced.get(root, {}).items():
    if inode in moment.is_folder:
      write_least(moment, inode, out / name)
    else:
      (out / name).write_bytes(moment.forced.get(inode, b''))


def write_names(moment: Moment, out: pathlib.Path) -> None:
  """Makes the tree with all names, but the contents that were forced alone."""
  out.mkdir()
  for name, inode in moment.names.items():
    if inode is None:
      (out / name).mkdir(parents=True, exist_ok=True)
    else:
      (out / name).parent.mkdir(parents=True, exist_ok=True)
      (out / name).write_bytes(moment.forced.get(inode, b''))
