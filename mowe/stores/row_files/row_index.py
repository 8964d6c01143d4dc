"""Where the experts of a checkpoint lie, and reading them.

All checkpoints of a model folder share a file of records, `experts.0.rows`; in
a run of several processes there is one file for each. A checkpoint has an
index, `experts.0.npz`: the place of each record in such a file, and checksums.
Every read compares the checksums of what it reads. An expert that was never
written is drawn at random when it is read, always with the same bits.

Tables whose rows are named alike are a *group* (see `words.plans.step_plans`),
and their files begin with its name: `experts` for the tables of word experts,
and the name of a memory for its table, whose rows take the place of experts.
"""

import itertools
import json
import os
import pathlib
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mowe.stores.row_files import background, expert_records, row_numbers
from mowe.training import manifests
from mowe.words.plans import step_plans

# The most bytes of neighbouring records that one call reads or writes.
_RUN_BYTES = 2**22
_INDEX = '{}.{}.npz'
_DATA = '{}.{}.rows'

# Gives records [n] of a dtype for rows <int>[n] that were never written.
Fresh = Callable[[np.ndarray, np.dtype], np.ndarray]


class Located(NamedTuple):
  """Where some rows lie.

  Attributes:
    files: <uint16>[n], the number of the file, which is that of the process
      that wrote it.
    places: <int64>[n], the number of the record in that file; -1 if the row was
      never written.
    checksums: <uint32>[n, 2], crc32 of the kernels and of the row state. There
      are two, so that kernels can be read and checked alone.
  """

  files: np.ndarray
  places: np.ndarray
  checksums: np.ndarray


class RowIndex:
  """Where the records of rows lie, and which rows training has met.

  It needs memory for the rows that were written or met, not for all that there
  are. Several threads may call it at once.

  Args:
    dtype: the dtype of a record; see `expert_records`.
    num_rows: how many rows there are.
    group: the name of the group of tables.
    fresh_key: <uint32>[2], the words of the random key by which a row that was
      never written is drawn; None if all rows are written.

  Attributes: those of the arguments.
  """

  def __init__(
    self,
    dtype: np.dtype,
    num_rows: int,
    group: str = step_plans.EXPERTS,
    fresh_key: np.ndarray | None = None,
  ):
    self.dtype = dtype
    self.num_rows = num_rows
    self.group = group
    self.fresh_key = fresh_key
    self._numbers = row_numbers.RowNumbers()
    # By the number of a row; more than are numbered have room.
    self._files = np.zeros(0, np.uint16)
    self._places = np.zeros(0, np.int64)
    self._checksums = np.zeros((0, 2), np.uint32)
    self._seen = np.zeros(0, bool)
    self._num_seen = 0
    self._lock = threading.Lock()

  @property
  def num_seen(self) -> int:
    """How many rows training has met."""
    return self._num_seen

  def locate(self, rows: np.ndarray) -> Located:
    """Returns where rows <int>[n] lie."""
    with self._lock:
      numbers = self._numbers.find(rows)
      known = np.flatnonzero(numbers >= 0)
      found = Located(
        np.zeros(len(numbers), np.uint16),
        np.full(len(numbers), -1, np.int64),
        np.zeros((len(numbers), 2), np.uint32),
      )
      for to, of_all in zip(found, self._arrays()[:3], strict=True):
        to[known] = of_all[numbers[known]]
    return found

  def place(self, rows: np.ndarray, located: Located) -> None:
    """Keeps where distinct rows <int>[n] lie from now on."""
    with self._lock:
      numbers = self._add(rows)
      for of_all, some in zip(self._arrays()[:3], located, strict=True):
        of_all[numbers] = some

  def mark_seen(self, rows: np.ndarray) -> None:
    """Keeps that training has met distinct rows <int>[n]."""
    with self._lock:
      numbers = self._add(rows)
      self._num_seen += int(np.count_nonzero(~self._seen[numbers]))
      self._seen[numbers] = True

  def seen_rows(self) -> np.ndarray:
    """Returns the rows that training has met, <int64>[n], ascending."""
    with self._lock:
      return np.sort(self._numbers.rows[self._seen[: len(self._numbers)]])

  def written_rows(self) -> np.ndarray:
    """Returns the rows that are written, <int64>[n], ascending."""
    with self._lock:
      is_written = self._places[: len(self._numbers)] >= 0
      return np.sort(self._numbers.rows[is_written])

  def places_in(self, file: int) -> np.ndarray:
    """Returns the places <int64>[n] of a file that rows lie in."""
    with self._lock:
      count = len(self._numbers)
      is_here = (self._files[:count] == file) & (self._places[:count] >= 0)
      return self._places[:count][is_here].copy()

  @classmethod
  def load(
    cls, checkpoint: pathlib.Path, group: str = step_plans.EXPERTS
  ) -> 'RowIndex':
    """Reads the index of a checkpoint, with the parts of all processes.

    Raises:
      DamagedCheckpointError: a file is no index, or there is none.
    """
    pattern = _INDEX.format(group, '*')
    try:
      parts = [_read_part(path) for path in sorted(checkpoint.glob(pattern))]
      return cls._joined(parts, group)
    except _UNREADABLE as error:
      raise manifests.DamagedCheckpointError(
        f'{pattern} of {checkpoint} must say where experts lie, but cannot be '
        f'read: {error or type(error).__name__}. Copy the checkpoint again from '
        'where it was whole, or restore another step.'
      ) from error

  @classmethod
  def _joined(cls, parts: list[dict[str, np.ndarray]], group: str):
    whole = {
      name: np.concatenate([part[name] for part in parts])
      for name in ('rows', *Located._fields, 'seen')
    }
    first = parts[0]
    index = cls(
      expert_records.from_json(json.loads(str(first['fields']))),
      int(first['num_rows']),
      group,
      first['fresh_key'] if len(first['fresh_key']) else None,
    )
    rows = whole['rows']
    index.place(rows, Located(*(whole[name] for name in Located._fields)))
    index.mark_seen(rows[whole['seen']])
    return index

  def save(self, checkpoint: pathlib.Path, process: int, own: slice) -> None:
    """Writes the part of the index of one process.

    Args:
      checkpoint: the folder of the checkpoint.
      process: the number of the process.
      own: the rows that the process owns.
    """
    fields = json.dumps(expert_records.to_json(self.dtype))
    with self._lock:
      rows = self._numbers.rows
      is_own = (rows >= own.start) & (rows < own.stop)
      numbers = np.flatnonzero(is_own)
      numbers = numbers[np.argsort(rows[numbers])]
      arrays = dict(
        zip(
          ('rows', *Located._fields, 'seen'),
          (array[numbers] for array in (rows, *self._arrays())),
          strict=True,
        )
      )
    fresh_key = np.zeros(0, np.uint32)
    if self.fresh_key is not None:
      fresh_key = self.fresh_key
    with (checkpoint / _INDEX.format(self.group, process)).open('wb') as file:
      np.savez(
        file,
        fields=np.array(fields),
        num_rows=np.array(self.num_rows),
        fresh_key=fresh_key,
        **arrays,
      )
      file.flush()
      os.fsync(file.fileno())

  def _arrays(self):
    """Files, places, checksums and marks of all numbers, and of spare room."""
    return self._files, self._places, self._checksums, self._seen

  def _add(self, rows):
    """The numbers of rows; new ones lie nowhere and were not met."""
    numbers = self._numbers.add(rows)
    missing = len(self._numbers) - len(self._places)
    if missing > 0:
      # At least as much again, so that growing costs little in all.
      more = max(missing, len(self._places))
      self._files = np.pad(self._files, (0, more))
      self._places = np.pad(self._places, (0, more), constant_values=-1)
      self._checksums = np.pad(self._checksums, ((0, more), (0, 0)))
      self._seen = np.pad(self._seen, (0, more))
    return numbers


def exists(checkpoint: pathlib.Path, group: str = step_plans.EXPERTS) -> bool:
  """Whether a checkpoint has tables of a group, word experts by default."""
  return any(checkpoint.glob(_INDEX.format(group, '*')))


# What reading a file that is no index may raise.
_UNREADABLE = (
  *(ValueError, TypeError, KeyError, IndexError, EOFError),
  *(FileNotFoundError, IsADirectoryError),
  zipfile.BadZipFile,
)


def _read_part(path: pathlib.Path) -> dict[str, np.ndarray]:
  with np.load(path, allow_pickle=False) as arrays:
    return {name: arrays[name] for name in arrays.files}


def data_path(folder: pathlib.Path, group: str, file: int) -> pathlib.Path:
  """The path of the file of records of a group with this number."""
  return folder / _DATA.format(group, file)


class RowReader:
  """Reads records of experts, where an index says that they lie.

  Args:
    folder: the folder of the model.
    index: where the experts lie.
    fresh: returns the records [n], of a dtype, of experts <int>[n] that were
      never written; None if all are.
    kernels_only: whether records are read without their row state.
    num_threads: how many threads read at a time.

  Attributes:
    dtype: the dtype of a record as it is read.

  Call: experts <int>[n] to their records [n]; several threads may call it at
    once.

  Raises (when called):
    DamagedCheckpointError: a record is not as it was written.
    KeyError: an expert was never written, and `fresh` is None.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    index: RowIndex,
    fresh: Fresh | None = None,
    kernels_only: bool = False,
    num_threads: int = 8,
  ):
    self._folder = folder
    self._index = index
    self._fresh = fresh
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
    located = self._index.locate(experts)
    is_written = located.places >= 0
    if is_written.all():
      return self._written(experts, located)
    if self._fresh is None:
      raise KeyError(f'Expert {experts[~is_written][0]} was never written.')
    records = np.empty(len(experts), self.dtype)
    records[~is_written] = self._fresh(experts[~is_written], self.dtype)
    written = Located(*(array[is_written] for array in located))
    records[is_written] = self._written(experts[is_written], written)
    return records

  def _written(self, experts, located):
    """The records of experts that lie in files."""
    records = np.empty(len(experts), self.dtype)
    # Whole records of neighbours are read by one call. Of records without their
    # row state each has a call of its own, as there is a gap after it.
    step = 1 if self.dtype.itemsize == self._stride else None
    # With the file in the upper bits, neighbours are in the same file.
    self.each(
      lambda run: self._read_run(
        experts[run], Located(*(array[run] for array in located)), records[run]
      ),
      runs(
        located.files.astype(np.int64) << 48 | located.places,
        self._stride,
        step,
      ),
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
    # A view of memory is cut in half the time of an array: this is done for
    # every record that is written or read.
    data = memoryview(records.view(np.uint8).reshape(-1))
    size, split = records.dtype.itemsize, self._split
    starts = range(0, len(data), size)
    checksums = np.empty((len(records), 2), np.uint32)
    checksums[:, 0] = [zlib.crc32(data[i : i + split]) for i in starts]
    checksums[:, 1] = [zlib.crc32(data[i + split : i + size]) for i in starts]
    return checksums

  def close(self) -> None:
    """Ends the threads and closes the files."""
    self._pool.shutdown()
    for descriptor in self._descriptors.values():
      os.close(descriptor)

  def _read_run(self, experts, located, records):
    """Reads neighbouring records into an array, and compares checksums."""
    file = int(located.files[0])
    view = memoryview(records.view(np.uint8).reshape(-1))
    done, offset = 0, int(located.places[0]) * self._stride
    # A call may read less than it was asked for.
    while done < len(view):
      try:
        count = os.preadv(self._open(file), [view[done:]], offset + done)
      except OSError as error:
        path = data_path(self._folder, self._index.group, file)
        raise OSError(error.errno, error.strerror, str(path)) from error
      if not count:
        raise self._damaged(file, experts[0], 'the file ends before')
      done += count
    # Without row state only the checksums of the kernels can be compared.
    width = 2 if self.dtype.itemsize == self._stride else 1
    wrong = (
      self.checksums_of(records)[:, :width] != located.checksums[:, :width]
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
