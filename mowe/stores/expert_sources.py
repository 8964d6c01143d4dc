"""Where the experts of a run come from: random draws, or a checkpoint."""

import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.models import initialization, parameters, threefry
from mowe.stores.row_files import expert_records, row_index
from mowe.training import table_layouts
from mowe.words.plans import step_plans

# Bytes that are on their way between disk, host and device at a time.
_CHUNK_BYTES = 2**24

_SECONDS_BETWEEN_LINES = 10

# The expert tables, and the state of their row optimizer: path of a table -> a
# tree of arrays [num_experts, ...] or [num_slots, ...].
Arrays = tuple[parameters.Tables, dict[str, Any]]


class ExpertSource(Protocol):
  """Gives the experts that a run begins with."""

  def written_rows(self) -> np.ndarray:
    """The experts <int64>[n] that are written; `fresh` draws all others."""

  @property
  def fresh(self) -> row_index.Fresh | None:
    """Draws experts that are not written; None if all are."""

  @property
  def fresh_key(self) -> np.ndarray | None:
    """The words <uint32>[2] of the random key of `fresh`, or None."""

  def read(self, experts: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The records [n] of experts <int>[n], written or not.

    Args:
      experts: their numbers.
      dtype: the dtype of a record; a fresh row state is zeros.
    """

  def arrays(self, abstract: Arrays) -> Arrays:
    """All experts on the device.

    Args:
      abstract: abstract arrays, in the shardings of the results.
    """

  def close(self) -> None:
    """Closes files."""


class FreshExperts:
  """Draws experts at random.

  An expert has the same bits wherever it is drawn, and with whichever others.

  Args:
    model: the model.
    key: the random key of its parameters, one of `threefry.key`.
    tables: abstract tables of all experts; their number does not matter.
  """

  def __init__(
    self, model: nn.Module, key: jax.Array, tables: parameters.Tables
  ):
    self._model = model
    self._key = key
    self._tables = tables
    self._dtype = expert_records.record_dtype(tables, {})

  @functools.cached_property
  def _draw_rows(self):
    # Made at first use, as many runs draw nothing.
    return initialization.initial_rows(self._model, self._key, self._tables)

  def written_rows(self) -> np.ndarray:
    """See `ExpertSource.written_rows`; there are none."""
    return np.zeros(0, np.int64)

  @property
  def fresh(self) -> row_index.Fresh:
    """See `ExpertSource.fresh`."""
    return self.read

  @property
  def fresh_key(self) -> np.ndarray:
    """See `ExpertSource.fresh_key`."""
    return np.asarray(jax.random.key_data(self._key))

  def read(self, experts: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """See `ExpertSource.read`."""
    records = np.empty(len(experts), dtype)
    for first in range(0, len(experts), at_once(dtype)):
      some = experts[first : first + at_once(dtype)]
      kernels = expert_records.from_arrays(
        self._dtype, self._draw_rows(some), {}
      )
      records[first : first + len(some)] = expert_records.converted(
        kernels, dtype
      )
    return records

  def arrays(self, abstract: Arrays) -> Arrays:
    """See `ExpertSource.arrays`."""
    tables, table_state = abstract
    drawn = initialization.initial_parameters(
      self._model,
      self._key,
      parameters.merge_tables({}, table_layouts.formats(tables)),
    )
    return (
      parameters.split_tables(drawn)[1],
      table_layouts.zeros(table_state),
    )

  def close(self) -> None:
    """See `ExpertSource.close`."""


class SavedExperts:
  """Reads the experts of a checkpoint.

  Args:
    checkpoint: the folder of the checkpoint.
    group: the name of the group of tables; see `row_index`.
    model: the model, by which experts are drawn that were never written; None
      if all are, as in a checkpoint of tables on the device.
    kernels_only: whether row state is left out; a run then begins with a fresh
      one.

  Raises:
    ValueError: the checkpoint has no tables of the group.
    DamagedCheckpointError: records are not as they were written; raised when
      they are read.
  """

  def __init__(
    self,
    checkpoint: pathlib.Path,
    group: str = step_plans.EXPERTS,
    *,
    model: nn.Module | None = None,
    kernels_only: bool = False,
  ):
    self.checkpoint = checkpoint
    if not row_index.exists(checkpoint, group):
      what = (
        'word experts'
        if group == step_plans.EXPERTS
        else f'the memory {group!r}'
      )
      raise ValueError(
        f'{checkpoint} must hold {what}, but has none: it is of a model '
        f'without. Give a checkpoint of a model with {what}.'
      )
    self.index = row_index.RowIndex.load(checkpoint, group)
    self.fresh: row_index.Fresh | None = None
    if model is not None and self.index.fresh_key is not None:
      self.fresh = FreshExperts(
        model,
        threefry.key_of_words(self.index.fresh_key),
        expert_records.abstract_tables(self.index.dtype),
      ).read
    self._reader = row_index.RowReader(
      checkpoint.parent, self.index, self.fresh, kernels_only
    )

  @property
  def dtype(self) -> np.dtype:
    """The dtype of a record as it is read."""
    return self._reader.dtype

  @property
  def fresh_key(self) -> np.ndarray | None:
    """See `ExpertSource.fresh_key`."""
    return self.index.fresh_key

  def written_rows(self) -> np.ndarray:
    """See `ExpertSource.written_rows`."""
    return self.index.written_rows()

  def close(self) -> None:
    """Closes the file; nothing can be read after that."""
    self._reader.close()

  def check(self, abstract: Arrays) -> None:
    """Raises ValueError unless the experts can become these arrays."""
    num_experts = jax.tree.leaves(abstract)[0].shape[0]
    problem = expert_records.check_convertible(
      self.dtype, expert_records.record_dtype(*abstract)
    )
    there = self.index.num_rows
    if there != num_experts:
      problem = f'experts: {there:,} there, {num_experts:,} here'
    if problem:
      raise ValueError(
        f'{self.checkpoint} must hold the experts of this model and row '
        f'optimizer, but differs in {problem}. Build the model with the config '
        'beside it in model.json.'
      )

  def read(
    self, experts: np.ndarray, dtype: np.dtype | None = None
  ) -> np.ndarray:
    """See `ExpertSource.read`; without a dtype the records are as they are."""
    records = self._reader(experts)
    return (
      records if dtype is None else expert_records.converted(records, dtype)
    )

  def arrays(self, abstract: Arrays) -> Arrays:
    """See `ExpertSource.arrays`; host memory holds one chunk at a time."""
    dtype = expert_records.record_dtype(*abstract)
    leaves, treedef = jax.tree.flatten(abstract)
    self.check(abstract)
    devices = sorted(leaves[0].sharding.addressable_devices, key=lambda d: d.id)
    shards = [self._of_device(abstract, dtype, device) for device in devices]
    return treedef.unflatten(
      jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
      for leaf, *parts in zip(leaves, *shards, strict=True)
    )

  def _of_device(self, abstract, dtype, device):
    """The part of each array that lies on one device.

    Experts are split over devices by blocks of neighbours, so the device needs
    the records of its own block alone. Other axes of an array may be split as
    well: of these each record is cut before it goes to the device.
    """
    indices = [
      leaf.sharding.addressable_devices_indices_map(leaf.shape)[device]
      for leaf in jax.tree.leaves(abstract)
    ]
    num_experts = self.index.num_rows
    start, stop, _ = indices[0][0].indices(num_experts)
    parts = [
      jnp.zeros(
        leaf.sharding.shard_shape(leaf.shape), leaf.dtype, device=device
      )
      for leaf in jax.tree.leaves(abstract)
    ]
    for first, number in chunks(start, stop, dtype):
      records = self.read(np.arange(first, first + number), dtype)
      arrays = jax.tree.leaves(expert_records.to_arrays(records, *abstract))
      rows = [
        jax.device_put(array[:, *index[1:]], device)
        for array, index in zip(arrays, indices, strict=True)
      ]
      # Chunks that a busy device has not taken yet must not pile up.
      parts = jax.block_until_ready(_fill(parts, rows, first - start))
    return [
      table_layouts.put_in_order(part, leaf)
      for part, leaf in zip(parts, jax.tree.leaves(abstract), strict=True)
    ]


def chunks(start: int, stop: int, dtype: np.dtype) -> Iterator[tuple[int, int]]:
  """Cuts neighbouring experts into chunks of some megabytes.

  All chunks have the same number of experts, so that programs are compiled
  once; the last one may overlap the one before. If the work on them takes long,
  a line is printed from time to time.

  Args:
    start: the first expert.
    stop: the expert after the last one.
    dtype: the dtype of a record.

  Yields:
    The first expert of a chunk, and their number.
  """
  number = min(stop - start, at_once(dtype))
  said_at = time.monotonic()
  for first in range(start, stop, number or 1):
    yield min(first, stop - number), number
    if time.monotonic() - said_at > _SECONDS_BETWEEN_LINES:
      done, whole = (
        f'{experts * dtype.itemsize / 1e9:.1f}'
        for experts in (first + number - start, stop - start)
      )
      print(f'Experts: {done} of {whole} GB', flush=True)
      said_at = time.monotonic()


def at_once(dtype: np.dtype) -> int:
  """How many experts of this record a chunk has."""
  return max(1, _CHUNK_BYTES // dtype.itemsize)


@functools.partial(jax.jit, donate_argnums=0)
def _fill(parts, rows, first):
  """Writes rows into arrays in place, beginning at row `first`."""
  return jax.tree.map(
    lambda part, some: jax.lax.dynamic_update_slice_in_dim(
      part, some, first, 0
    ),
    parts,
    rows,
  )
