"""Experts that all lie on the devices."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from mowe.models import parameters
from mowe.stores import expert_metrics, expert_sources, slot_rows
from mowe.stores.row_files import expert_records, row_file
from mowe.training import partitioning, train_metrics, train_state
from mowe.words.plans import batch_plans


class DeviceExperts:
  """The tables of a run as arrays; see `expert_stores.Experts`.

  Args:
    file: the file in which checkpoints keep experts.
    abstract: abstract tables and row state, in their shardings.
    is_trained: whether experts change. Frozen tables are held here, apart from
      the train state.
    is_resumed: whether the file already has the experts that the run begins
      with.
  """

  num_slots = None
  rows_from = None

  def __init__(
    self,
    file: row_file.RowFile,
    abstract: expert_sources.Arrays,
    is_trained: bool,
    is_resumed: bool,
  ):
    self._file = file
    self._abstract = abstract
    self._is_trained = is_trained
    # Experts that have changed since they were written to the file.
    self._is_changed = np.full(file.num_experts, not is_resumed)
    self._frozen: parameters.Tables = {}
    # A checkpoint fetches whole rows, also where a process has only a part of
    # each row, or none of it.
    sharding = jax.tree.leaves(abstract)[0].sharding
    self._everywhere = None
    if sharding.num_devices > 1:
      self._everywhere = partitioning.replicated(sharding.mesh)
    self._counts = expert_metrics.ExpertCounts(file.index, is_trained)

  def start(self, source: expert_sources.ExpertSource) -> expert_sources.Arrays:
    """See `Experts.start`."""
    tables, table_state = source.arrays(self._abstract)
    if self._is_trained:
      return tables, table_state
    self._frozen = tables
    return {}, {}

  def feed(
    self, batches: Iterable[tuple[Any, batch_plans.ExpertPlan]]
  ) -> Iterator[tuple[Any, batch_plans.ExpertPlan]]:
    """See `Experts.feed`."""
    return iter(batches)

  def ready(
    self, state: train_state.TrainState, fed: batch_plans.ExpertPlan
  ) -> tuple[train_state.TrainState, parameters.Tables, batch_plans.ExpertPlan]:
    """See `Experts.ready`."""
    present = self._counts.count(fed)
    if self._is_trained:
      self._is_changed[present] = True
    return state, self._frozen, fed

  def metrics(self) -> dict[str, train_metrics.Mean]:
    """See `Experts.metrics`."""
    return self._counts.metrics()

  def tables(self, state: train_state.TrainState) -> parameters.Tables:
    """See `Experts.tables`."""
    return state.tables or self._frozen

  def save(
    self, checkpoint: pathlib.Path, state: train_state.TrainState
  ) -> None:
    """See `Experts.save`; only what changed since the last save is written."""
    experts = np.flatnonzero(self._is_changed)
    arrays = self.tables(state), state.table_state
    dtype = self._file.dtype
    calls = slot_rows.calls(len(experts), dtype.itemsize)

    def fetch():
      """Starts to copy rows to the host; yields experts and their arrays."""
      for some, size in calls:
        rows = slot_rows.padded(experts[some], size)
        taken = slot_rows.get(arrays, rows, self._everywhere)
        jax.tree.map(lambda x: x.copy_to_host_async(), taken)
        yield experts[some], taken

    for some, taken in _one_ahead(fetch()):
      records = expert_records.from_arrays(dtype, *jax.device_get(taken))
      self._file.write(some, records[: len(some)])
    self._file.save(checkpoint)
    self._is_changed[:] = False

  def close(self) -> None:
    """See `Experts.close`."""
    self._file.close()


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
  """Yields the same items, each when the one after it has been taken."""
  items = iter(items)
  last = next(items, None)
  for item in items:
    yield last
    last = item
  if last is not None:
    yield last
