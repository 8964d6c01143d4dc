"""Evaluates a model while it is trained, and shows and writes the numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mowe.commands import evaluations
from mowe.stores import expert_stores
from mowe.training import train_metrics, train_state


class PeriodicEvaluation:
  """Runs all evaluations of a run.

  Args:
    prepared: the evaluations, in the order in which they are run.
    writers: writers that get all numbers.
    experts: the word experts of the run, from which evaluations get the tables.

  Call: takes a step and its state, evaluates it, and prints one line.
  """

  def __init__(
    self,
    prepared: Sequence[evaluations.Evaluation],
    writers: Sequence[Any],
    experts: expert_stores.Experts,
  ):
    self._prepared = prepared
    self._writers = writers
    self._experts = experts
    self._latest: tuple[int, dict[str, float]] | None = None

  def __call__(self, step: int, state: train_state.TrainState) -> None:
    if not self._prepared:
      return
    values: dict[str, train_metrics.Value] = {}
    tables = self._experts.tables(state)
    for evaluation in self._prepared:
      values |= evaluation(state.params, tables)
    for writer in self._writers:
      writer.write(step, values)
    # A value per expert is too long for a line, and is in the files.
    numbers = {k: v for k, v in values.items() if np.ndim(v) == 0}
    self._latest = step, numbers
    shown = '  '.join(
      f'{name} {value:.4g}'
      for name, value in numbers.items()
      if '/layers_' not in name
    )
    print(f'step {step}  {shown}', flush=True)

  def of_step(self, step: int) -> dict[str, float] | None:
    """Returns the numbers of this very step; None if it was not evaluated."""
    if self._latest is None or self._latest[0] != step:
      return None
    return self._latest[1]
