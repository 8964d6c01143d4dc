"""Evaluates a model while it is trained, and shows and writes the numbers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mowe.commands import evaluations
from mowe.stores import expert_stores
from mowe.training import train_metrics, train_state


@dataclasses.dataclass
class Improvement:
  """Whether the evaluations of a run still get better.

  Attributes:
    metric: name of the metric by which they are compared.
    mode: 'max' or 'min', which of its values is best.
    patience: number of evaluations in a row, none of them the best so far,
      after which a run has trained enough.
    best: the best value so far; None before the first one. NaN is never best.
    num_no_better: number of evaluations since the first one with this value.
  """

  metric: str
  mode: str
  patience: int
  best: float | None = None
  num_no_better: int = 0

  def see(self, values: Mapping[str, float]) -> None:
    """Compares one more evaluation with the best one.

    Raises:
      ValueError: the evaluation lacks the metric.
    """
    if self.metric not in values:
      raise ValueError(
        f'Evaluations must give best_metric, but {self.metric!r} is not among '
        f'{sorted(values)}. Name one of these.'
      )
    value = values[self.metric]
    sign = 1 if self.mode == 'max' else -1
    best = -math.inf if self.best is None else sign * self.best
    if sign * value > best:
      self.best, self.num_no_better = value, 0
    else:
      self.num_no_better += 1

  @property
  def is_over(self) -> bool:
    """Whether it lasted too long that nothing got better."""
    return self.best is not None and self.num_no_better >= self.patience

  def kept(self) -> dict[str, Any]:
    """What a checkpoint keeps, for the run that goes on from it."""
    return dataclasses.asdict(self)

  def go_on(self, kept: Mapping[str, Any], best: float | None) -> None:
    """Continues as a run did before.

    Args:
      kept: what its last checkpoint has kept; {} if it compared nothing.
      best: the best value among its checkpoints, for a run that compared
        nothing, or by another metric; None if there is none.
    """
    if (kept.get('metric'), kept.get('mode')) == (self.metric, self.mode):
      self.best, self.num_no_better = kept['best'], kept['num_no_better']
    else:
      self.best = best

  def __str__(self) -> str:
    return (
      f'{self.metric} is not better than {self.best:.4g} in '
      f'{self.num_no_better} evaluations.'
    )


class PeriodicEvaluation:
  """Runs all evaluations of a run.

  Args:
    prepared: the evaluations, in the order in which they are run.
    writers: writers that get all numbers.
    experts: the word experts of the run, from which evaluations get the tables.
    improvement: sees the numbers; None if nobody asks whether they get better.

  Call: takes a step and its state, evaluates it, and prints one line.
  """

  def __init__(
    self,
    prepared: Sequence[evaluations.Evaluation],
    writers: Sequence[Any],
    experts: expert_stores.Experts,
    improvement: Improvement | None = None,
  ):
    self._prepared = prepared
    self._writers = writers
    self._experts = experts
    self._improvement = improvement
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
    if self._improvement is not None:
      self._improvement.see(numbers)
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
