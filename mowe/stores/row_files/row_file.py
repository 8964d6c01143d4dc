"""Writing experts to disk so that no finished checkpoint is ever changed.

The file of records is an array of *places*, each with room for one record. All
checkpoints of a folder share it: a checkpoint has an index that says in which
place the record of each expert lies (`row_index`). While the index of a
checkpoint that still exists refers to a place, nothing is written there, and
the next version of that expert goes to a free place. So a process may be killed
at any moment, also while it writes, and every finished checkpoint still is what
it was. A new checkpoint costs only the experts that have changed since the one
before.

The file is as large as all experts and, for each checkpoint that is kept, the
experts that changed after it.

A place is *held* by checkpoints, and is *current* if it has the present version
of an expert; it is free if it is neither:

  written, not saved    current             may be overwritten in place
  saved                 current and held    the next version goes elsewhere
  saved, then changed   held                waits until no checkpoint holds it
  checkpoints removed   free                takes another record
"""

import errno
import fcntl
import os
import pathlib
import shutil
import threading

import numpy as np

from mowe.stores.row_files import expert_records, row_index
from mowe.training import manifests
from mowe.words import atomic_files
from mowe.words.plans import step_plans


class TableInUseError(OSError):
  """Another process has the experts of this folder open for writing."""


class DiskFullError(OSError):
  """There is no room for experts; finished checkpoints are unharmed."""


class NotFiniteError(FloatingPointError):
  """Training made rows that hold NaN or infinity; they are not written."""


# Errors of the system for a full disk, a quota, and a file that is too large.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LockedFile:
  """The file of records of a folder, open for one process alone.

  A run locks the file before it decides which checkpoint it resumes, as another
  process that has the lock may be about to finish a newer one.

  Args:
    folder: the folder of the model.
    process: the number of this process in its run.
    group: the name of the group of tables; see `row_index`.

  Attributes:
    path: the path of the file, which is made if it is not there.
    descriptor: the open file, for reading and writing.

  Raises:
    TableInUseError: another process has it open.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    process: int = 0,
    group: str = step_plans.EXPERTS,
  ):
    self.path = row_index.data_path(pathlib.Path(folder), group, process)
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
    """Closes the file, so that another process may open it."""
    os.close(self.descriptor)


class RowFile:
  """The records of the experts of a run, read and written one by one.

  Several threads may call it at once, though not for the same expert. In a run
  of several processes each writes its share of the experts to a file of its
  own, and reads the files of all.

  Args:
    file: the file that this process writes; it is closed with this object.
    index: where the experts lie at the beginning, as in the checkpoint that is
      resumed. This object keeps it up to date from then on.
    fresh: gives the records of experts that were never written; see
      `row_index.RowReader`.
    process: the number of this process in its run.
    num_processes: how many processes share the experts.

  Attributes:
    dtype: the dtype of a record.
    num_experts: how many experts there are.
    index: where the experts lie. The caller marks in it which of them training
      has met, and it is saved with each checkpoint.

  Raises:
    DamagedCheckpointError: the file lacks records of the index.
  """

  def __init__(
    self,
    file: LockedFile,
    index: row_index.RowIndex,
    fresh: row_index.Fresh | None = None,
    process: int = 0,
    num_processes: int = 1,
  ):
    self._locked = file
    self._path, self._file = file.path, file.descriptor
    self._folder = file.path.parent
    self.index = index
    self._process = process
    self.dtype = index.dtype
    self.num_experts = index.num_rows
    # Each process owns a block of neighbouring experts.
    ends = [
      self.num_experts * i // num_processes for i in range(num_processes + 1)
    ]
    self._own = slice(ends[process], ends[process + 1])
    self._reader = row_index.RowReader(self._folder, index, fresh)
    self._lock = threading.Lock()
    # For each place in the file of this process: how many checkpoints refer to
    # it (it is held), and whether it has the present version of an expert (it
    # is current). The lock guards these two arrays, the free places, and the
    # checkpoints that hold places.
    self._held = np.zeros(0, np.int32)
    self._is_current = np.zeros(0, bool)
    self._free = np.zeros(0, np.int64)
    self._checkpoints: dict[pathlib.Path, np.ndarray] = {}
    for manifest in self._folder.glob(f'checkpoint_*/{manifests.FILE_NAME}'):
      checkpoint, group = manifest.parent, index.group
      if row_index.exists(checkpoint, group):
        self._hold(checkpoint, row_index.RowIndex.load(checkpoint, group))
    own = index.places_in(process)
    self._grow(own.max(initial=-1) + 1)
    self._is_current[own] = True
    self._cut_off_the_rest()

  def read(self, experts: np.ndarray) -> np.ndarray:
    """The records [n] of experts <int>[n]; see `row_index.RowReader`."""
    return self._reader(experts)

  def write(self, experts: np.ndarray, records: np.ndarray) -> None:
    """Writes the records [n] of distinct experts <int>[n].

    Experts that another process owns are left to that process.

    Raises:
      DiskFullError: there is no room.
      NotFiniteError: a record holds NaN or infinity; nothing is written then.
    """
    bad = expert_records.not_finite(records)
    if bad.any():
      raise NotFiniteError(
        f'Rows must stay finite, but updates made {int(bad.sum()):,} of '
        f'{self._path.name} that are not, the first of them number '
        f'{experts[bad][0]:,}. Lower the learning rate of rows; they are not '
        'written, and finished checkpoints are untouched.'
      )
    is_own = (experts >= self._own.start) & (experts < self._own.stop)
    if not is_own.all():
      experts, records = experts[is_own], records[is_own]
    if not len(experts):
      return
    places, left = self._places_for(experts)
    if (np.diff(places) < 0).any():
      # They are sorted by their places, so that neighbours are written
      # together.
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
    self.index.place(
      experts,
      row_index.Located(
        np.full(len(experts), self._process, np.uint16),
        places,
        np.concatenate(checksums),
      ),
    )
    # Only now: until the index says where the new version is, it is the old one
    # that is read.
    with self._lock:
      self._is_current[left] = False

  def check_room(self, number: int) -> None:
    """Raises DiskFullError unless the disk has room for so many experts."""
    size = number * self.dtype.itemsize
    free = shutil.disk_usage(self._folder).free
    if free < size:
      raise DiskFullError(
        f'{self._folder} must have room for {size / 1e9:.1f} GB of experts, '
        f'but {free / 1e9:.1f} GB are free. Make room, give another MODEL_DIR, '
        "or set TABLE_DTYPE = 'bfloat16' or fewer experts."
      )

  def say_if_room_may_end(self) -> None:
    """Prints a line if the disk has no room for all experts once.

    They may never need it: only those that training meets are written.
    """
    size = self.num_experts * self.dtype.itemsize
    free = shutil.disk_usage(self._folder).free
    if free < size:
      print(
        f'Rows       {self._path.name} may grow to {size / 1e9:.1f} GB, and '
        f'{free / 1e9:.1f} GB are free: if training meets too many rows, it '
        'stops, and its checkpoints stay whole.'
      )

  def save(self, checkpoint: pathlib.Path) -> None:
    """Writes the index of a checkpoint into its folder.

    The records that the index refers to stay as they are until that folder is
    gone. All of them are on disk before the index is.
    """
    os.fsync(self._file)
    atomic_files.sync(self._folder)
    self.index.save(checkpoint, self._process, self._own)
    self._hold(checkpoint, self.index)

  def close(self) -> None:
    """Closes the file, so that another process may open it."""
    self._reader.close()
    self._locked.close()

  def _cut_off_the_rest(self):
    """Cuts off what a killed process left after the last place that is used."""
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
    """Chooses where the next versions of some experts are written.

    Returns:
      The place of each expert, <int64>[n]; and the places of old versions that
      are not overwritten, which stay current until the new ones are written.
    """
    located = self.index.locate(experts)
    with self._lock:
      is_here = located.files == self._process
      places = np.where(is_here, located.places, -1)
      known = np.flatnonzero(places >= 0)
      # An old version that no checkpoint refers to is overwritten in place. One
      # that a checkpoint refers to stays, and the next version goes elsewhere.
      kept = known[self._held[places[known]] > 0]
      left = places[kept]
      places[kept] = -1
      missing = np.flatnonzero(places < 0)
      places[missing] = self._take_free(len(missing))
      self._is_current[places] = True
      return places, left

  def _release_removed(self):
    """Frees places that only checkpoints that are gone referred to."""
    for folder in [one for one in self._checkpoints if not one.exists()]:
      self._held[self._checkpoints.pop(folder)] -= 1

  def _take_free(self, number: int) -> np.ndarray:
    """Takes free places, <int64>[number]; the file grows if there are few."""
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
    """Keeps what the index of a checkpoint refers to in the own file."""
    places = index.places_in(self._process)
    with self._lock:
      self._release_removed()
      self._grow(places.max(initial=-1) + 1)
      self._held[places] += 1
      # Frozen experts never move: one array serves all checkpoints.
      for same in self._checkpoints.values():
        if np.array_equal(places, same):
          places = same
      self._checkpoints[checkpoint] = places

  def _grow(self, num_places):
    """Lets the file have at least so many places; new ones are free."""
    more = max(0, num_places - len(self._held))
    self._held = np.pad(self._held, (0, more))
    self._is_current = np.pad(self._is_current, (0, more))
