"""Where experts lie that are in no slot: in host memory, or on disk."""

import collections
import concurrent.futures
import pathlib

import numpy as np

from mowe.stores import expert_sources, row_file


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
    self.seen = file.seen
    self.read = file.read
    self.write = file.write
    self.save = file.save
    self.close = file.close

  def start(self, source: expert_sources.ExpertSource) -> None:
    """See `Backing.start`."""
    if self._is_resumed:
      return
    self._file.check_room()
    for experts, records in _all(source, self.dtype, self.num_experts):
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
    self.dtype = file.dtype
    self.num_experts = file.num_experts
    self.seen = file.seen
    self.close = file.close
    self._records = np.zeros(0, file.dtype)
    # Experts of which the file lacks the present version.
    self._is_changed = np.full(file.num_experts, not is_resumed)

  def start(self, source: expert_sources.ExpertSource) -> None:
    """See `Backing.start`."""
    self._records = all_records(source, self.dtype, self.num_experts)

  def read(self, experts: np.ndarray) -> np.ndarray:
    """See `Backing.read`."""
    return self._records[experts]

  def write(self, experts: np.ndarray, records: np.ndarray) -> None:
    """See `Backing.write`."""
    self._records[experts] = records
    self._is_changed[experts] = True

  def save(self, checkpoint: pathlib.Path) -> None:
    """See `Backing.save`."""
    changed = np.flatnonzero(self._is_changed)
    for first in range(0, len(changed), expert_sources.at_once(self.dtype)):
      some = changed[first : first + expert_sources.at_once(self.dtype)]
      self._file.write(some, self._records[some])
    self._file.save(checkpoint)
    self._is_changed[:] = False


def all_records(
  source: expert_sources.ExpertSource, dtype: np.dtype, num_experts: int
) -> np.ndarray:
  """The records of all experts, [num_experts], in host memory."""
  records = np.empty(num_experts, dtype)
  for experts, some in _all(source, dtype, num_experts):
    records[experts] = some
  return records


def _all(source, dtype, num_experts):
  """Yields experts <int>[n] with their records [n], a chunk at a time.

  The next chunk is drawn or read while the caller works on the one before.
  """
  with concurrent.futures.ThreadPoolExecutor(1, 'experts') as thread:
    waiting = collections.deque()
    for first, number in expert_sources.chunks(0, num_experts, dtype):
      coming = thread.submit(source.records, first, number, dtype)
      waiting.append((np.arange(first, first + number), coming))
      if len(waiting) > 1:
        experts, records = waiting.popleft()
        yield experts, records.result()
    for experts, records in waiting:
      yield experts, records.result()
