"""Where experts lie that are in no slot: in host memory, or on disk."""

import collections
import concurrent.futures
import pathlib
import threading

import numpy as np

from mowe.stores import expert_sources
from mowe.stores.row_files import row_file, row_index, row_numbers

# Host memory is taken for so many bytes of records at a time.
_BLOCK_BYTES = 2**24


class DiskBacking:
  """Experts in the file of the run; see `cached_experts.Backing`.

  Args:
    file: the file of the run.
    is_resumed: whether the file already has the experts that the run begins
      with.
  """

  def __init__(self, file: row_file.RowFile, is_resumed: bool):
    self._file = file
    self._is_resumed = is_resumed
    self.dtype = file.dtype
    self.num_experts = file.num_experts
    self.index = file.index
    self.read = file.read
    self.write = file.write
    self.save = file.save
    self.close = file.close

  def start(self, source: expert_sources.ExpertSource) -> None:
    """See `Backing.start`."""
    if self._is_resumed:
      return
    self._file.check_room(len(source.written_rows()))
    self._file.say_if_room_may_end()
    for experts, records in _written(source, self.dtype):
      self._file.write(experts, records)


class HostBacking:
  """Experts in host memory; see `cached_experts.Backing`.

  Args:
    file: the file of the run, which keeps the experts of checkpoints.
    is_resumed: whether the file already has the experts that the run begins
      with.
  """

  def __init__(self, file: row_file.RowFile, is_resumed: bool):
    self._file = file
    self._is_resumed = is_resumed
    self.dtype = file.dtype
    self.num_experts = file.num_experts
    self.index = file.index
    self.close = file.close
    self._records = HostRecords(file.dtype)
    # Experts of which the file lacks the present version.
    self._changed = row_numbers.RowNumbers()

  def start(self, source: expert_sources.ExpertSource) -> None:
    """See `Backing.start`."""
    self._records.start(source)
    if not self._is_resumed:
      self._changed.add(source.written_rows())

  def read(self, experts: np.ndarray) -> np.ndarray:
    """See `Backing.read`."""
    return self._records.read(experts)

  def write(self, experts: np.ndarray, records: np.ndarray) -> None:
    """See `Backing.write`."""
    self._records.write(experts, records)
    self._changed.add(experts)

  def save(self, checkpoint: pathlib.Path) -> None:
    """See `Backing.save`."""
    changed = np.sort(self._changed.rows)
    for first in range(0, len(changed), expert_sources.at_once(self.dtype)):
      some = changed[first : first + expert_sources.at_once(self.dtype)]
      self._file.write(some, self._records.read(some))
    self._file.save(checkpoint)
    self._changed = row_numbers.RowNumbers()


class HostRecords:
  """Records of experts in host memory, which grows with those that are there.

  An expert that is not there is drawn at random when it is read. Several
  threads may call it at once, though not for the same expert.

  Args:
    dtype: the dtype of a record.
  """

  def __init__(self, dtype: np.dtype):
    self._dtype = dtype
    self._numbers = row_numbers.RowNumbers()
    # Records by the numbers of their experts, in blocks of equal size: a larger
    # array would have to be copied.
    self._in_block = max(1, _BLOCK_BYTES // dtype.itemsize)
    self._blocks: list[np.ndarray] = []
    self._lock = threading.Lock()
    self._fresh: row_index.Fresh | None = None

  def start(self, source: expert_sources.ExpertSource) -> None:
    """Takes the experts of a source that are written there."""
    for experts, records in _written(source, self._dtype):
      self.write(experts, records)
    self._fresh = source.fresh

  def read(self, experts: np.ndarray) -> np.ndarray:
    """The records [n] of experts <int>[n]."""
    with self._lock:
      numbers = self._numbers.find(experts)
    records = np.empty(len(experts), self._dtype)
    is_there = numbers >= 0
    if not is_there.all():
      if self._fresh is None:
        raise KeyError(f'Expert {experts[~is_there][0]} was never written.')
      records[~is_there] = self._fresh(experts[~is_there], self._dtype)
    for block, to, places in self._in_blocks(numbers):
      _as_bytes(records)[to] = block[places]
    return records

  def write(self, experts: np.ndarray, records: np.ndarray) -> None:
    """Keeps the records [n] of distinct experts <int>[n]."""
    with self._lock:
      numbers = self._numbers.add(experts)
      while len(self._blocks) * self._in_block < len(self._numbers):
        new = np.empty(self._in_block, self._dtype)
        self._blocks.append(_as_bytes(new))
    for block, to, places in self._in_blocks(numbers):
      block[places] = _as_bytes(records)[to]

  def _in_blocks(self, numbers):
    """Yields each block, which numbers <int64>[n] are in it, and where."""
    of_each = numbers // self._in_block
    for i in np.unique(of_each[numbers >= 0]).tolist():
      to = np.flatnonzero(of_each == i)
      yield self._blocks[i], to, numbers[to] - i * self._in_block


def _as_bytes(records):
  """Views records as plain bytes, which NumPy copies whole, not by field."""
  return records.view(np.dtype((np.void, records.dtype.itemsize)))


def _written(source, dtype):
  """Yields experts <int>[n] of a source with their records [n], in chunks.

  These are the experts that are written there. The next chunk is read while
  the caller works on the one before.
  """
  experts = source.written_rows()
  with concurrent.futures.ThreadPoolExecutor(1, 'experts') as thread:
    waiting = collections.deque()
    for first, number in expert_sources.chunks(0, len(experts), dtype):
      some = experts[first : first + number]
      waiting.append((some, thread.submit(source.read, some, dtype)))
      if len(waiting) > 1:
        some, records = waiting.popleft()
        yield some, records.result()
    for some, records in waiting:
      yield some, records.result()
