"""Where the experts of a checkpoint lie, and reading them.

All checkpoints of a model folder share a file of records, `experts.0.rows`; in
a run of several processes there is one file for each. A checkpoint has an
index, `experts.0.npz`: for every expert the place of its record in such a file,
and checksums. Every read compares the checksums of what it reads.

Tables whose rows are named alike are a *group* (see `words.plans.step_plans`),
and their files begin with its name: `experts` for the tables of word experts,
and the name of a memory for its table, whose rows take the place of experts.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from mowe.stores import background, expert_records
from mowe.training import manifests
from mowe.words.plans import step_plans

# The most bytes of neighbouring records that one call reads or writes.
_RUN_BYTES = 2**22
_INDEX = '{}.{}.npz'
_DATA = '{}.{}.rows'


@dataclasses.dataclass
class RowIndex:
  """Where the records of all experts lie.

  Attributes:
    dtype: the dtype of a record; see `expert_records`.
    files: <uint16>[num_experts], the number of the file, which is that of the
      process that wrote it.
    places: <int64>[num_experts], the number of the record in that file; -1 if
      the expert was never written.
    checksums: <uint32>[num_experts, 2], crc32 of the kernels and of the row
      state. There are two, so that kernels can be read and checked alone.
    seen: <bool>[num_experts], whether training has met the expert.
    group: the name of the group of tables.
  """

  dtype: np.dtype
  files: np.ndarray
  places: np.ndarray
  checksums: np.ndarray
  seen: np.ndarray
  group: str = step_plans.EXPERTS

  @classmethod
  def empty(
    cls, dtype: np.dtype, num_experts: int, group: str = step_plans.EXPERTS
  ) -> 'RowIndex':
    """Returns the index of experts that are not written yet."""
    return cls(
      dtype,
      np.zeros(num_experts, np.uint16),
      np.full(num_experts, -1, np.int64),
      np.zeros((num_experts, 2), np.uint32),
      np.zeros(num_experts, bool),
      group,
    )

  @classmethod
  def load(
    cls, checkpoint: pathlib.Path, group: str = step_plans.EXPERTS
  ) -> 'RowIndex':
    """Reads the index of a checkpoint, with the parts of all processes."""
    parts = []
    for path in sorted(checkpoint.glob(_INDEX.format(group, '*'))):
      with np.load(path) as arrays:
        parts.append({name: arrays[name] for name in arrays.files})
    whole = {
      name: np.concatenate([part[name] for part in parts])
      for name in ('experts', 'files', 'places', 'checksums', 'seen')
    }
    dtype = expert_records.from_json(json.loads(str(parts[0]['fields'])))
    order = np.argsort(whole.pop('experts'), kind='stable')
    return cls(dtype, *(array[order] for array in whole.values()), group)

  def save(self, checkpoint: pathlib.Path, process: int, own: slice) -> None:
    """Writes the part of the index of one process.

    Args:
      checkpoint: the folder of the checkpoint.
      process: the number of the process.
      own: the experts that the process owns.
    """
    fields = json.dumps(expert_records.to_json(self.dtype))
    with (checkpoint / _INDEX.format(self.group, process)).open('wb') as file:
      np.savez(
        file,
        fields=np.array(fields),
        experts=np.arange(len(self.places))[own],
        files=self.files[own],
        places=self.places[own],
        checksums=self.checksums[own],
        seen=self.seen[own],
      )
      file.flush()
      os.fsync(file.fileno())


def exists(checkpoint: pathlib.Path, group: str = step_plans.EXPERTS) -> bool:
  """Whether a checkpoint has tables of a group, word experts by default."""
  return any(checkpoint.glob(_INDEX.format(group, '*')))


def data_path(folder: pathlib.Path, group: str, file: int) -> pathlib.Path:
  """The path of the file of records of a group with this number."""
  return folder / _DATA.format(group, file)


class RowReader:
  """Reads records of experts, where an index says that they lie.

  Args:
    folder: the folder of the model.
    index: where the experts lie.
    kernels_only: whether records are read without their row state.
    num_threads: how many threads read at a time.

  Attributes:
    dtype: the dtype of a record as it is read.

  Call: experts <int>[n] to their records [n]; several threads may call it at
    once.

  Raises (when called):
    DamagedCheckpointError: a record is not as it was written.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    index: RowIndex,
    kernels_only: bool = False,
    num_threads: int = 8,
  ):
    self._folder = folder
    self._index = index
    kernels = expert_records.kernels_only(index.dtype)
    self.dtype = kernels if kernels_only else index.dtype
    # Bytes of the kernels, which a record begins with, and from one record to
    # the next.
    self._split = kernels.itemsize
    self._stride = index.dtype.itemsize
    self._descriptors: dict[int, int] = {}
    self._opening = threading.Lock()
    self._num_threads = num_threads
    self._pool = background.threads(num_threads, 'experts')

  def __call__(self, experts: np.ndarray) -> np.ndarray:
    experts = np.asarray(experts)
    records = np.empty(len(experts), self.dtype)
    files, places = self._index.files[experts], self._index.places[experts]
    # Whole records of neighbours are read by one call. Of records without their
    # row state each has a call of its own, as there is a gap after it.
    step = 1 if self.dtype.itemsize == self._stride else None
    # With the file in the upper bits, neighbours are in the same file.
    self.each(
      lambda run: self._read_run(experts[run], records[run]),
      runs(files.astype(np.int64) << 48 | places, self._stride, step),
    )
    return records

  def each(
    self, function: Callable[[slice], Any], cut: Iterable[slice]
  ) -> list[Any]:
    """Calls a function with each slice, in all threads at once.

    Args:
      function: gets a slice.
      cut: the slices.

    Returns:
      The results in the order of the slices.
    """
    cut = list(cut)
    # A share for each thread: handing over single rows costs more than
    # reading them.
    share = -(-len(cut) // self._num_threads) or 1
    shares = [cut[i : i + share] for i in range(0, len(cut), share)]
    work = lambda some: [function(one) for one in some]
    return list(itertools.chain.from_iterable(self._pool.map(work, shares)))

  def checksums_of(self, records: np.ndarray) -> np.ndarray:
    """The checksums of contiguous records [n], as in `RowIndex`.

    Returns:
      <uint32>[n, 2]; of records without row state the second has no meaning.
    """
    data = records.view(np.uint8).reshape(len(records), -1)
    parts = [
      [zlib.crc32(row[: self._split]), zlib.crc32(row[self._split :])]
      for row in data
    ]
    return np.array(parts, np.uint32)

  def close(self) -> None:
    """Ends the threads and closes the files."""
    self._pool.shutdown()
    for descriptor in self._descriptors.values():
      os.close(descriptor)

  def _read_run(self, experts, records):
    """Reads neighbouring records into an array, and compares checksums."""
    file = int(self._index.files[experts[0]])
    place = int(self._index.places[experts[0]])
    if place < 0:
      raise KeyError(f'Expert {experts[0]} was never written.')
    view = memoryview(records.view(np.uint8).reshape(-1))
    done, offset = 0, place * self._stride
    # A call may read less than it was asked for.
    while done < len(view):
      count = os.preadv(self._open(file), [view[done:]], offset + done)
      if not count:
        raise self._damaged(file, experts[0], 'the file ends before')
      done += count
    # Without row state only the checksums of the kernels can be compared.
    width = 2 if self.dtype.itemsize == self._stride else 1
    wrong = (
      self.checksums_of(records)[:, :width]
      != self._index.checksums[experts][:, :width]
    ).any(axis=1)
    if wrong.any():
      expert = experts[np.flatnonzero(wrong)[0]]
      raise self._damaged(file, expert, 'it has other contents')

  def _open(self, file: int) -> int:
    """The descriptor of a file of records, which is opened at first use."""
    with self._opening:
      if file not in self._descriptors:
        path = data_path(self._folder, self._index.group, file)
        try:
          self._descriptors[file] = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
          raise manifests.DamagedCheckpointError(
            f'The experts of {self._folder} must lie in {path.name}, but that '
            'file is missing. Copy the whole folder again from where it was.'
          ) from error
      return self._descriptors[file]

  def _damaged(self, file, expert, what) -> Exception:
    return manifests.DamagedCheckpointError(
      f'Expert {expert} must be in {data_path(self._folder, self._index.group, file)} as it was '
      f'written, but {what}. Copy that file again from where it was whole, or '
      'restore another step.'
    )


def runs(
  places: np.ndarray, size: int, step: int | None = 1
) -> Iterator[slice]:
  """Yields slices of places that lie one after another in their file.

  The records of a slice have a few megabytes at most.

  Args:
    places: <int64>[n].
    size: the bytes of a record.
    step: the distance between the numbers of neighbours; None for slices of one
      place each.
  """
  if not len(places):
    return
  most = max(1, _RUN_BYTES // size)
  is_first = np.ones(len(places), bool)
  if step is not None:
    is_first[1:] = np.diff(places) != step
  firsts = [*np.flatnonzero(is_first).tolist(), len(places)]
  for first, end in itertools.pairwise(firsts):
    for start in range(first, end, most):
      yield slice(start, min(start + most, end))
