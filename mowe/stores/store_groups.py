"""The tables of a run in several groups, each with a store of its own.

All tables of word experts are one group. The table of a memory is a group by
itself, because its rows are named differently (see `words.plans.step_plans`).
"""

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from mowe.layers.memory import host_rows
from mowe.models import parameters
from mowe.stores import expert_sources, expert_stores
from mowe.training import train_metrics, train_state
from mowe.words.plans import step_plans


class StoreGroups:
  """Joins the stores of all groups; see `expert_stores.Experts`.

  Args:
    groups: name of a group -> its open store. The order is that in which they
      bring their rows to the device.

  Attributes:
    num_slots: rows of the tables of word experts in the step; None if they have
      all experts, or there are none.
    rows_from: from where the model of an evaluation reads tables; None if it is
      given `tables`.
  """

  def __init__(self, groups: Mapping[str, expert_stores.Experts]):
    self._groups = dict(groups)
    experts = self._groups.get(step_plans.EXPERTS)
    self.num_slots = experts.num_slots if experts is not None else None
    readers = {
      name: group.rows_from
      for name, group in self._groups.items()
      if group.rows_from is not None
    }
    self.rows_from = RowsOfGroups(readers) if readers else None

  def start(
    self, source: Mapping[str, expert_sources.ExpertSource]
  ) -> expert_sources.Arrays:
    """See `Experts.start`; there is a source for each group."""
    tables, table_state = {}, {}
    for name, group in self._groups.items():
      own_tables, own_state = group.start(source[name])
      tables |= own_tables
      table_state |= own_state
    return tables, table_state

  def feed(
    self, batches: Iterable[tuple[Any, step_plans.StepPlan]]
  ) -> Iterator[tuple[Any, dict[str, Any]]]:
    """See `Experts.feed`."""
    stream = ((batch, plan.groups(), {}) for batch, plan in batches)
    for name, group in self._groups.items():
      stream = _fed(name, group, stream)
    for batch, _, fed in stream:
      yield batch, fed

  def ready(
    self, state: train_state.TrainState, fed: dict[str, Any]
  ) -> tuple[train_state.TrainState, parameters.Tables, step_plans.StepPlan]:
    """See `Experts.ready`."""
    tables, table_state, frozen, plans = {}, {}, {}, {}
    for name, group in self._groups.items():
      own, of_group, plans[name] = group.ready(
        _of_group(name, state), fed[name]
      )
      tables |= own.tables
      table_state |= own.table_state
      frozen |= of_group
    state = state.replace(tables=tables, table_state=table_state)
    return state, frozen, step_plans.StepPlan.of_groups(plans)

  def metrics(self) -> dict[str, train_metrics.Mean]:
    """See `Experts.metrics`; the names begin with that of the group."""
    return {
      f'{name}/{metric.partition("/")[2]}': value
      for name, group in self._groups.items()
      for metric, value in group.metrics().items()
    }

  def tables(self, state: train_state.TrainState) -> parameters.Tables:
    """See `Experts.tables`."""
    tables = {}
    for name, group in self._groups.items():
      tables |= group.tables(_of_group(name, state))
    return tables

  def save(
    self, checkpoint: pathlib.Path, state: train_state.TrainState
  ) -> None:
    """See `Experts.save`."""
    for name, group in self._groups.items():
      group.save(checkpoint, _of_group(name, state))

  def close(self) -> None:
    """See `Experts.close`."""
    for group in self._groups.values():
      group.close()


class RowsOfGroups:
  """Reads rows of any group on the host; a `host_rows.RowsFrom`.

  Args:
    readers: name of a group -> what reads its rows.
  """

  def __init__(self, readers: Mapping[str, host_rows.RowsFrom]):
    self._readers = dict(readers)

  def __call__(self, table: str, experts: np.ndarray) -> dict[str, np.ndarray]:
    """See `host_rows.RowsFrom`."""
    (group,) = parameters.in_groups({table: None})
    return self._readers[group](table, experts)


def open_for_reading(
  checkpoint: pathlib.Path,
  model: nn.Module,
  abstract: parameters.Tables,
  store: expert_stores.Store,
) -> tuple[parameters.Tables, host_rows.RowsFrom | None]:
  """Opens the tables of a checkpoint for inference.

  Args:
    checkpoint: the folder of the checkpoint.
    model: the model whose tables they are.
    abstract: abstract tables of all groups.
    store: where they lie.

  Returns:
    See `expert_stores.Store.open_for_reading`.
  """
  tables: parameters.Tables = {}
  readers = {}
  for group, own in parameters.in_groups(abstract).items():
    source = expert_sources.SavedExperts(
      checkpoint, group, model=model, kernels_only=True
    )
    of_group, rows_from = store.open_for_reading(source, own)
    tables |= of_group
    if rows_from is not None:
      readers[group] = rows_from
  return tables, RowsOfGroups(readers) if readers else None


def _of_group(
  name: str, state: train_state.TrainState
) -> train_state.TrainState:
  """The state with the tables of one group alone."""
  return state.replace(
    tables=parameters.in_groups(state.tables).get(name, {}),
    table_state=parameters.in_groups(state.table_state).get(name, {}),
  )


def _fed(name, group, stream):
  """Passes batches through one group, which may work some batches ahead."""
  pairs = (((batch, plans, fed), plans[name]) for batch, plans, fed in stream)
  for (batch, plans, fed), own in group.feed(pairs):
    yield batch, plans, fed | {name: own}
