"""Writing experts to disk so that no checkpoint is ever half of something.

While the index of a checkpoint that is kept refers to a place of the file,
nothing is written there: the next version of that expert goes to a free place.
So a process may be killed at any moment, also while it writes, and every
finished checkpoint still is what it was. A new checkpoint costs only the
experts that have changed since the one before.

The file takes the room of all experts and, for each checkpoint that is kept, of
those that changed after it.
"""

import errno
import fcntl
import os
import pathlib
import shutil
import threading

import numpy as np

from mowe.stores import row_index
from mowe.training import manifests


class TableInUseError(OSError):
  """Another process writes the experts of this folder."""


class DiskFullError(OSError):
  """There is no room for experts; finished checkpoints are unharmed."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LockedFile:
  """The file of records of a folder, open for one process alone.

  It is to be locked before one decides which checkpoint is resumed: whoever had
  it before may have been about to finish another one.

  Args:
    folder: of the model.
    process: number of this process.

  Attributes:
    path: of the file, made if it is not there.
    descriptor: for reading and writing.

  Raises:
    TableInUseError: another process has it open.
  """

  def __init__(self, folder: str | os.PathLike[str], process: int = 0):
    self.path = row_index.data_path(pathlib.Path(folder), process)
    self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      # The system takes the lock away when the process ends, however it ends.
      fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      os.close(self.descriptor)
      if not isinstance(error, BlockingIOError):
        raise OSError(
          f'{self.path} must be on a file system with locks, so that two runs '
          f'do not write it, but locking failed: {error.strerror}. Give a '
          'MODEL_DIR elsewhere.'
        ) from error
      raise TableInUseError(
        f'One process at a time may train in {self.path.parent}, but another '
        f'one has {self.path.name} open. Wait until it ends, or give another '
        'MODEL_DIR.'
      ) from error

  def close(self) -> None:
    """Lets other processes open it."""
    os.close(self.descriptor)


class RowFile:
  """Records of the experts of a run, read and written one by one.

  Several threads may call it at once, though not for the same expert. Each
  process of a run of several writes its share of the experts to a file of its
  own, and reads those of all.

  Args:
    file: where this process writes; closed with this object.
    index: where the experts lie at the beginning, such as in the checkpoint
      that is resumed; it is kept true from then on.
    process: number of this process.
    num_processes: that share the experts.

  Attributes:
    dtype: of a record.
    num_experts: in the table.
    seen: <bool>[num_experts], those that training has met: for its owner to
      keep true, saved with each checkpoint.

  Raises:
    DamagedCheckpointError: the file lacks records of the index.
  """

  def __init__(
    self,
    file: LockedFile,
    index: row_index.RowIndex,
    process: int = 0,
    num_processes: int = 1,
  ):
    self._locked = file
    self._path, self._file = file.path, file.descriptor
    self._folder = file.path.parent
    self._index = index
    self._process = process
    self.dtype = index.dtype
    self.num_experts = len(index.places)
    self.seen = index.seen
    ends = [
      self.num_experts * i // num_processes for i in range(num_processes + 1)
    ]
    self._own = slice(ends[process], ends[process + 1])
    self._reader = row_index.RowReader(self._folder, index)
    self._lock = threading.Lock()
    # Of the places in this process's file: how many checkpoints refer to each,
    # and whether it holds the present version of an expert.
    self._held = np.zeros(0, np.int32)
    self._is_current = np.zeros(0, bool)
    self._free = np.zeros(0, np.int64)
    self._checkpoints: dict[pathlib.Path, np.ndarray] = {}
    for manifest in self._folder.glob(f'checkpoint_*/{manifests.FILE_NAME}'):
      if row_index.exists(manifest.parent):
        self._hold(manifest.parent, row_index.RowIndex.load(manifest.parent))
    own = self._own_places(index)
    self._grow(own.max(initial=-1) + 1)
    self._is_current[own] = True
    self._cut_off_the_rest()

  def read(self, experts: np.ndarray) -> np.ndarray:
    """Records [n] of these experts; see `RowReader`."""
    return self._reader(experts)

  def write(self, experts: np.ndarray, records: np.ndarray) -> None:
    """Writes records [n] of distinct experts.

    Those of other processes are left to them.

    Raises:
      DiskFullError: there is no room.
    """
    is_own = (experts >= self._own.start) & (experts < self._own.stop)
    if not is_own.all():
      experts, records = experts[is_own], records[is_own]
    if not len(experts):
      return
    places, left = self._places_for(experts)
    if (np.diff(places) < 0).any():
      # In the order of places: what lies together is written together.
      order = np.argsort(places)
      experts, places, records = experts[order], places[order], records[order]
    records = np.ascontiguousarray(records)
    size = records.dtype.itemsize

    def write_run(run):
      view = memoryview(records[run].view(np.uint8).reshape(-1))
      done, offset = 0, int(places[run.start]) * size
      while done < len(view):
        done += os.pwrite(self._file, view[done:], offset + done)
      return self._reader.checksums_of(records[run])

    try:
      checksums = self._reader.each(write_run, row_index.runs(places, size))
    except OSError as error:
      if error.errno not in _NO_ROOM:
        raise
      raise DiskFullError(
        f'{self._path} must take {records.nbytes:,} more bytes of experts, but '
        f'writing failed: {error.strerror}. Finished checkpoints are unharmed: '
        'make room, then run the same command to continue.'
      ) from error
    self._index.files[experts] = self._process
    self._index.places[experts] = places
    self._index.checksums[experts] = np.concatenate(checksums)
    with self._lock:
      self._is_current[left] = False

  def check_room(self) -> None:
    """Raises DiskFullError unless all experts have room."""
    size = self.num_experts * self.dtype.itemsize
    free = shutil.disk_usage(self._folder).free
    if free < size:
      raise DiskFullError(
        f'{self._folder} must have room for {size / 1e9:.1f} GB of experts, but '
        f'{free / 1e9:.1f} GB are free. Make room, give another MODEL_DIR, or '
        "set TABLE_DTYPE = 'bfloat16' or fewer experts."
      )

  def save(self, checkpoint: pathlib.Path) -> None:
    """Writes the index of a checkpoint into its folder.

    Until that folder is gone, what the index refers to is kept.
    """
    os.fsync(self._file)
    self._index.save(checkpoint, self._process, self._own)
    self._hold(checkpoint, self._index)

  def close(self) -> None:
    """Closes the file; another process may open it then."""
    self._reader.close()
    self._locked.close()

  def _cut_off_the_rest(self):
    """Removes what a killed process left behind the last place that counts."""
    needed = len(self._held) * self.dtype.itemsize
    size = os.fstat(self._file).st_size
    if size < needed:
      raise manifests.DamagedCheckpointError(
        f'{self._path} must hold at least {needed:,} bytes, as the checkpoints '
        f'beside it refer to them, but has {size:,}. Copy that file again from '
        'where it was whole: a checkpoint alone has no experts.'
      )
    os.ftruncate(self._file, needed)

  def _places_for(self, experts):
    """Where the next versions of these experts are written, <int64>[n].

    And the places of old versions, which count until the new ones are written.
    """
    with self._lock:
      is_here = self._index.files[experts] == self._process
      places = np.where(is_here, self._index.places[experts], -1)
      known = np.flatnonzero(places >= 0)
      # Where a checkpoint refers to it, the old version stays for that alone.
      kept = known[self._held[places[known]] > 0]
      left = places[kept]
      places[kept] = -1
      missing = np.flatnonzero(places < 0)
      places[missing] = self._take_free(len(missing))
      self._is_current[places] = True
      return places, left

  def _release_removed(self):
    for folder in [one for one in self._checkpoints if not one.exists()]:
      self._held[self._checkpoints.pop(folder)] -= 1

  def _take_free(self, number: int) -> np.ndarray:
    if number > len(self._free):
      self._release_removed()
      self._free = np.flatnonzero(~self._is_current & (self._held == 0))
      end, missing = len(self._held), number - len(self._free)
      if missing > 0:
        self._grow(end + missing)
        self._free = np.append(self._free, np.arange(end, end + missing))
    taken, self._free = np.split(self._free, [number])
    return taken

  def _hold(self, checkpoint, index):
    places = self._own_places(index)
    with self._lock:
      self._release_removed()
      self._grow(places.max(initial=-1) + 1)
      self._held[places] += 1
      # Frozen experts lie where they are: one array for all checkpoints.
      for same in self._checkpoints.values():
        if np.array_equal(places, same):
          places = same
      self._checkpoints[checkpoint] = places

  def _own_places(self, index):
    is_here = (index.files == self._process) & (index.places >= 0)
    return index.places[is_here].copy()

  def _grow(self, num_places):
    more = max(0, num_places - len(self._held))
    self._held = np.pad(self._held, (0, more))
    self._is_current = np.pad(self._is_current, (0, more))
