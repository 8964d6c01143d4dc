"""Where the experts of a checkpoint lie, and reading them.

A model folder has a file of records, `experts.0.rows`, for all its checkpoints
(one for each process of a run of several). A checkpoint holds an index: for
every expert the place of its record, and checksums that each read compares.
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

# Bytes of neighbouring records that are read or written by one call.
_RUN_BYTES = 2**22
_INDEX = 'experts.{}.npz'
_DATA = 'experts.{}.rows'


@dataclasses.dataclass
class RowIndex:
  """Where the records of all experts lie.

  Attributes:
    dtype: of a record; see `expert_records`.
    files: <uint16>[num_experts], which of the files.
    places: <int64>[num_experts], number of the record there; -1: nowhere.
    checksums: <uint32>[num_experts, 2], of kernels and of row state.
    seen: <bool>[num_experts], whether training has met the expert.
  """

  dtype: np.dtype
  files: np.ndarray
  places: np.ndarray
  checksums: np.ndarray
  seen: np.ndarray

  @classmethod
  def empty(cls, dtype: np.dtype, num_experts: int) -> 'RowIndex':
    """An index of experts that are not written yet."""
    return cls(
      dtype,
      np.zeros(num_experts, np.uint16),
      np.full(num_experts, -1, np.int64),
      np.zeros((num_experts, 2), np.uint32),
      np.zeros(num_experts, bool),
    )

  @classmethod
  def load(cls, checkpoint: pathlib.Path) -> 'RowIndex':
    """The index in the folder of a checkpoint, of all processes together."""
    parts = []
    for path in sorted(checkpoint.glob(_INDEX.format('*'))):
      with np.load(path) as arrays:
        parts.append({name: arrays[name] for name in arrays.files})
    whole = {
      name: np.concatenate([part[name] for part in parts])
      for name in ('experts', 'files', 'places', 'checksums', 'seen')
    }
    dtype = expert_records.from_json(json.loads(str(parts[0]['fields'])))
    order = np.argsort(whole.pop('experts'), kind='stable')
    return cls(dtype, *(array[order] for array in whole.values()))

  def save(self, checkpoint: pathlib.Path, process: int, own: slice) -> None:
    """Writes the part of one process: that of some of the experts."""
    fields = json.dumps(expert_records.to_json(self.dtype))
    with (checkpoint / _INDEX.format(process)).open('wb') as file:
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


def exists(checkpoint: pathlib.Path) -> bool:
  """Whether a checkpoint has experts."""
  return any(checkpoint.glob(_INDEX.format('*')))


def data_path(folder: pathlib.Path, file: int) -> pathlib.Path:
  """The file of records that one process writes."""
  return folder / _DATA.format(file)


class RowReader:
  """Reads experts of an index.

  Args:
    folder: of the model.
    index: where they lie.
    kernels_only: without row state.
    num_threads: that read.

  Call: experts <int>[n] to records [n]; from several threads at once.

  Raises (when called):
    DamagedCheckpointError: a record is not what was written.
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
    # Whole records of neighbours are read by one call.
    step = 1 if self.dtype.itemsize == self._stride else None
    self.each(
      lambda run: self._read_run(experts[run], records[run]),
      runs(files.astype(np.int64) << 48 | places, self._stride, step),
    )
    return records

  def each(
    self, function: Callable[[slice], Any], cut: Iterable[slice]
  ) -> list[Any]:
    """Calls a function with each slice, in all threads; results in order."""
    cut = list(cut)
    # A share for each thread: handing over single rows costs more than
    # reading them.
    share = -(-len(cut) // self._num_threads) or 1
    shares = [cut[i : i + share] for i in range(0, len(cut), share)]
    work = lambda some: [function(one) for one in some]
    return list(itertools.chain.from_iterable(self._pool.map(work, shares)))

  def checksums_of(self, records: np.ndarray) -> np.ndarray:
    """Checksums <uint32>[n, 2] of contiguous records [n]."""
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
    file = int(self._index.files[experts[0]])
    place = int(self._index.places[experts[0]])
    if place < 0:
      raise KeyError(f'Expert {experts[0]} was never written.')
    view = memoryview(records.view(np.uint8).reshape(-1))
    done, offset = 0, place * self._stride
    while done < len(view):
      count = os.preadv(self._open(file), [view[done:]], offset + done)
      if not count:
        raise self._damaged(file, experts[0], 'the file ends before')
      done += count
    width = 2 if self.dtype.itemsize == self._stride else 1
    wrong = (
      self.checksums_of(records)[:, :width]
      != self._index.checksums[experts][:, :width]
    ).any(axis=1)
    if wrong.any():
      expert = experts[np.flatnonzero(wrong)[0]]
      raise self._damaged(file, expert, 'it has other contents')

  def _open(self, file: int) -> int:
    with self._opening:
      if file not in self._descriptors:
        path = data_path(self._folder, file)
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
      f'Expert {expert} must be in {data_path(self._folder, file)} as it was '
      f'written, but {what}. Copy that file again from where it was whole, or '
      'restore another step.'
    )


def runs(
  places: np.ndarray, size: int, step: int | None = 1
) -> Iterator[slice]:
  """Slices of neighbouring places, of some megabytes at most.

  Args:
    places: <int64>[n].
    size: bytes of a record.
    step: distance of neighbours; None: each place by itself.
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
