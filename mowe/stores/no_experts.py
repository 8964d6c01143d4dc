"""The store of a model without word experts, which does nothing."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from mowe.models import parameters
from mowe.stores import expert_sources
from mowe.training import train_metrics, train_state


class NoExperts:
  """Passes batches and states on as they are; see `expert_stores.Experts`."""

  num_slots = None
  rows_from = None

  def start(
    self, source: expert_sources.ExpertSource | None
  ) -> expert_sources.Arrays:
    """See `Experts.start`."""
    del source
    return {}, {}

  def feed(
    self, batches: Iterable[tuple[Any, None]]
  ) -> Iterator[tuple[Any, None]]:
    """See `Experts.feed`."""
    return iter(batches)

  def ready(
    self, state: train_state.TrainState, fed: None
  ) -> tuple[train_state.TrainState, parameters.Tables, None]:
    """See `Experts.ready`."""
    return state, {}, fed

  def metrics(self) -> dict[str, train_metrics.Mean]:
    """See `Experts.metrics`."""
    return {}

  def tables(self, state: train_state.TrainState) -> parameters.Tables:
    """See `Experts.tables`."""
    del state
    return {}

  def save(
    self, checkpoint: pathlib.Path, state: train_state.TrainState
  ) -> None:
    """See `Experts.save`."""

  def close(self) -> None:
    """See `Experts.close`."""
