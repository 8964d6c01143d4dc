"""The training loop: steps, actions with a period, and a clean stop."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mowe.training import metrics as metrics_lib
from mowe.training import progress as progress_lib
from mowe.training import train_state

# Steps between two times at which the processes of a run ask each other: it
# makes them wait for the device.
_AGREE_PERIOD = 10


# What the line of progress shows of what there is.
_SHOWN = {
  'loss': 'loss',
  'accuracy': 'accuracy',
  # Of experts that do not all lie on the device.
  'experts/hit_rate': 'hits',
  'experts/wait_ms': 'wait ms',
}


@dataclasses.dataclass(frozen=True)
class Every:
  """An action that is due every `period` steps, and after the last one.

  Attributes:
    period: steps; 0 for never but at the end.
    action: called with the number of steps done and the state.
    at_stop: also due when a signal ends the run early: saving is, what takes
      long is not, as who sends SIGTERM does not wait long.
  """

  period: int
  action: Callable[[int, train_state.TrainState], None]
  at_stop: bool = True

  def is_due(self, step: int, is_end: bool, is_stop: bool = False) -> bool:
    is_period = self.period and step % self.period == 0
    return bool(is_end or is_period or (is_stop and self.at_stop))


class StopSignal:
  """Ends the loop after the step that is being done.

  SIGINT (Ctrl-C) and SIGTERM set it; a second Ctrl-C stops at once. In a run of
  several processes it is enough that one of them gets the signal: all stop
  after the same step, within ten.
  """

  def __init__(self):
    self.requested = False

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Catches the signals as long as the context lasts."""
    old = {
      number: signal.signal(number, self._catch)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
      yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)

  def is_due(self, step: int) -> bool:
    """Whether to stop after this step; every process must ask."""
    if jax.process_count() > 1 and step % _AGREE_PERIOD == 0:
      asked = multihost_utils.process_allgather(np.array(self.requested))
      self.requested = bool(asked.any())
    elif jax.process_count() > 1:
      return False
    return self.requested

  def _catch(self, number, frame):
    del frame
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True


class DivergedError(FloatingPointError):
  """The loss or the gradients are no longer numbers."""


def run(
  state: train_state.TrainState,
  *,
  train_step: Callable[..., tuple[train_state.TrainState, dict[str, Any]]],
  batches: Iterable[tuple[dict[str, np.ndarray], Any]],
  total_steps: int,
  actions: Sequence[Every] = (),
  writers: Sequence[metrics_lib.Writer] = (),
  progress: progress_lib.Progress,
  log_period: int = 100,
  stop: StopSignal | None = None,
) -> train_state.TrainState:
  """Trains until `total_steps` updates are made or a stop is asked for.

  Args:
    state: where to begin; donated.
    train_step: `(state, batch, plan) -> (state, metrics)`; brings batch and
      plan to the devices.
    batches: batches with their plans, beginning at `state.step`.
    total_steps: updates of the whole run, those before this call included.
    actions: what is done between steps.
    writers: get the metrics of each log period.
    progress: shows them.
    log_period: steps between two lines of metrics.
    stop: asked after every step.

  Returns:
    The last state.

  Raises:
    DivergedError: the loss or the gradients of a period are not finite;
      nothing is saved then.
  """
  stop = stop or StopSignal()
  step = int(state.step)
  pending = []
  with stop.listening(), progress:
    for batch, plan in batches:
      # A stop that came since the last step is seen after this one: leaving
      # here would lose the steps since the last checkpoint.
      if step >= total_steps:
        break
      num_tokens = _num_tokens(batch)
      state, metrics = train_step(state, batch, plan)
      step += 1
      pending.append(metrics)
      is_end, is_stop = step == total_steps, stop.is_due(step)
      is_logged = step % log_period == 0 or is_end or is_stop
      due = [one for one in actions if one.is_due(step, is_end, is_stop)]
      shown = None
      if is_logged or due:
        # Only here does the host wait for the device. Before every action, so
        # that no checkpoint is saved of a run that has diverged.
        values = _mean_values(pending)
        _check_finite(step, values)
      if is_logged:
        pending = []
        for writer in writers:
          writer.write(step, values)
        shown = {
          label: values[name]
          for name, label in _SHOWN.items()
          if name in values
        }
      progress.update(step, num_tokens, shown)
      for action in due:
        action.action(step, state)
      if is_end or is_stop:
        break
  return state


def _mean_values(pending) -> dict[str, metrics_lib.Value]:
  totals: dict[str, metrics_lib.Mean] = {}
  for metrics in jax.device_get(pending):
    totals = metrics_lib.merge(totals, metrics)
  return metrics_lib.compute(totals)


def _num_tokens(batch) -> int:
  names = ('encoder_input_tokens', 'decoder_target_tokens')
  return int(sum(np.count_nonzero(batch[n]) for n in names if n in batch))


def _check_finite(step, values):
  """The loss is that of the parameters before the step; gradients tell more."""
  for name in ('loss', 'gradient_norm'):
    if not math.isfinite(values[name]):
      raise DivergedError(
        f'{name} must stay finite, but is {values[name]} after step {step}. '
        'Lower the learning rate or clip gradients; the checkpoints before '
        'this step are untouched.'
      )
  for name, value in values.items():
    if name.endswith('/not_finite') and value > 0:
      raise DivergedError(
        f'Router logits must stay finite, but {name} is {value} after step '
        f'{step}. Lower the learning rate or raise the router z-loss; the '
        'checkpoints before this step are untouched.'
      )
