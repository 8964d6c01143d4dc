"""The training loop: steps, actions with a period, and a clean stop."""

import collections
import contextlib
import dataclasses
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mowe.training import (
  loss_spikes,
  progress_lines,
  speed,
  train_metrics,
  train_state,
)

# Steps between two times at which the processes of a run ask each other whether
# one of them got a signal. Asking makes them wait for the device.
_AGREE_PERIOD = 10

# Steps that the host may hand to the device beyond the one that is being done.
# Without a limit the host runs ahead until it waits at the end of a log period,
# and a stop, which comes after all steps that were handed over, takes as long
# as they do.
_MOST_AHEAD = loss_spikes.LAG - 1

# A run shows its loss after so many steps, if its log period is longer.
_EARLY = 10

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# The metrics that the line of progress shows, where there are any of them, and
# the names by which it shows them.
_SHOWN = {
  'loss': 'loss',
  'accuracy': 'accuracy',
  # These two are of experts in host memory or on disk.
  'experts/hit_rate': 'hits',
  'experts/wait_ms': 'wait ms',
}


@dataclasses.dataclass(frozen=True)
class Every:
  """An action that is due every `period` steps, and after the last one.

  Attributes:
    period: the number of steps between two calls; 0 calls it at the end alone.
    action: called with the number of steps done and the state.
    at_stop: whether the action is also due when a signal ends the run early.
      Saving is. What takes long is not, as a sender of SIGTERM kills a process
      that has not ended after a short while.
  """

  period: int
  action: Callable[[int, train_state.TrainState], None]
  at_stop: bool = True

  def is_due(self, step: int, *, is_end: bool, is_stop: bool = False) -> bool:
    """Whether the action is due after a step.

    Args:
      step: the number of steps done.
      is_end: whether it is the last step of the run.
      is_stop: whether the run stops here because of a signal.
    """
    is_period = self.period and step % self.period == 0
    return bool(is_end or is_period or (is_stop and self.at_stop))


class StopSignal:
  """Ends the loop after the step that is handed to the device next.

  SIGINT (Ctrl-C) and SIGTERM set it, and it prints at once after which step the
  run will stop; a second Ctrl-C stops at once. In a run of several processes it
  is enough that one of them gets the signal: all stop after the same step, at
  most ten steps later.

  Attributes:
    requested: whether a stop was asked for. Code may set it instead of a
      signal.
  """

  def __init__(self):
    self.requested = False
    self._is_told = False
    self._is_handled = False
    self._num_interrupts = 0
    self._next_step = 0
    # Reentrant: Python may call `_catch` in a thread that holds the lock, and
    # `_catch` takes it again.
    self._lock = threading.RLock()

  @contextlib.contextmanager
  def listening(self, step: int) -> Iterator[None]:
    """Catches the signals as long as the context lasts.

    Only the main thread of a process can catch signals. In another thread, such
    as that of a notebook's executor, signals do what they did before.

    Args:
      step: the number of steps done.
    """
    self._next_step = step + 1
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    # Python calls a handler only between two of its own instructions: not while
    # XLA compiles, nor while the host waits for the device. So Python is told
    # to write the number of each signal to a socket at once, and a thread reads
    # it and answers meanwhile.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
    old = {number: signal.signal(number, self._catch) for number in _SIGNALS}
    old_descriptor = signal.set_wakeup_fd(
      writer.fileno(), warn_on_full_buffer=False
    )
    watcher.start()
    try:
      yield
    finally:
      signal.set_wakeup_fd(old_descriptor)
      for number, handler in old.items():
        signal.signal(number, handler)
      # The end of the stream ends the thread that reads it.
      writer.close()
      watcher.join()
      reader.close()

  def is_due(self, step: int) -> bool:
    """Whether to stop after this step; every process must ask."""
    if jax.process_count() > 1:
      if step % _AGREE_PERIOD:
        return False
      asked = multihost_utils.process_allgather(np.array(self.requested))
      self.requested = bool(asked.any())
    with self._lock:
      self._next_step = step + 1
      return self.requested

  def _request(self):
    """Asks for a stop, and says once when it will come."""
    with self._lock:
      self.requested = True
      if self._is_told:
        return
      self._is_told = True
      step = f'after step {self._next_step}'
    if jax.process_count() > 1:
      step = 'at the next step at which all processes ask each other'
    print(f'Stopping {step}, then saving.', flush=True)

  def _watch(self, reader):
    """Reads the numbers of signals until the stream ends; in a thread."""
    while number := reader.recv(1):
      if number[0] == signal.SIGINT:
        self._num_interrupts += 1
      if number[0] in _SIGNALS:
        self._request()

  def _catch(self, number, frame):
    """Handles a signal for Python; a second Ctrl-C interrupts at once."""
    del frame
    # Several signals that come while Python waits are handled as one, so the
    # interrupts that the thread has read count as well.
    is_second = self._is_handled or self._num_interrupts > 1
    self._is_handled = True
    if is_second and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._request()


class DivergedError(FloatingPointError):
  """The loss, the gradients or the logits of a router are no longer finite."""


def run(
  state: train_state.TrainState,
  *,
  train_step: Callable[..., tuple[train_state.TrainState, dict[str, Any]]],
  batches: Iterable[tuple[dict[str, np.ndarray], Any]],
  total_steps: int,
  actions: Sequence[Every] = (),
  writers: Sequence[train_metrics.Writer] = (),
  progress: progress_lines.Progress,
  meter: speed.SpeedMeter | None = None,
  log_period: int = 100,
  stop: StopSignal | None = None,
  spikes: loss_spikes.SpikeWatch | None = None,
  most_ahead: int | None = _MOST_AHEAD,
  is_enough: Callable[[], bool] = lambda: False,
) -> train_state.TrainState:
  """Trains until `total_steps` updates are made or a stop is asked for.

  Args:
    state: the state to begin with; it is donated.
    train_step: `(state, batch, plan) -> (state, metrics)`; brings batch and
      plan to the devices.
    batches: batches with their plans, beginning at `state.step`.
    total_steps: updates of the whole run, those before this call included.
    actions: what is done between steps.
    writers: write the metrics of each log period.
    progress: shows some of these metrics, and how far the run is.
    meter: times the steps; None does not.
    log_period: the number of steps between two lines of metrics.
    stop: listens to signals, and is asked after every step; None makes one.
    spikes: sees the loss of every step in order; None prints a line on spikes.
    most_ahead: how many steps are handed to the device beyond the one that is
      being done; None for as many as there are in a log period.
    is_enough: asked before the first step, and after each step with actions,
      whether the run ends early.

  Returns:
    The last state.

  Raises:
    DivergedError: the loss, the gradients or the logits of a router in a
      period are not finite, or the state at its end is not; nothing is saved
      then.
    LossSpikeError: the loss rose suddenly, and `spikes` says to stop then.
  """
  stop = stop or StopSignal()
  meter = meter or speed.SpeedMeter()
  spikes = spikes or loss_spikes.SpikeWatch(loss_spikes.SpikeConfig())
  period = _Period(spikes, most_ahead)
  step = first_step = int(state.step)
  train_step = _announced(train_step, progress)
  with stop.listening(step), progress:
    for batch, plan in batches:
      # A stop that came since the last step is seen after this one: leaving
      # here would lose the steps since the last checkpoint.
      if step >= total_steps or (step == first_step and is_enough()):
        break
      num_tokens = _num_tokens(batch)
      state, metrics = train_step(state, batch, plan)
      step += 1
      meter.step_done(num_tokens)
      period.add(step, metrics)
      is_end, is_stop = step == total_steps, stop.is_due(step)
      is_logged = step % log_period == 0 or is_end or is_stop
      is_early = log_period > _EARLY and step == first_step + _EARLY
      due = _due(actions, step, is_end, is_stop)
      values = {}
      if is_logged or is_early or due:
        values = period.values(step, state)
      if is_logged:
        period.clear()
        _log(step, values, meter, writers)
      is_shown = is_logged or is_early
      progress.update(step, num_tokens, _to_show(values) if is_shown else None)
      with meter.paused():
        for action in due:
          action.action(step, state)
      if is_end or is_stop or (due and is_enough()):
        break
  return state


def _due(actions, step, is_end, is_stop):
  """The actions that are due after a step."""
  ends = {'is_end': is_end, 'is_stop': is_stop}
  return [one for one in actions if one.is_due(step, **ends)]


def _log(step, values, meter, writers):
  """Writes the metrics of a log period, and how fast it was."""
  meter.write(step)
  for writer in writers:
    writer.write(step, values)


def _announced(train_step, progress):
  """The step, whose first call is told, as it compiles the program.

  The host waits for the end of that call: all later steps are timed from there.
  """
  is_first = True

  def step(*arguments):
    nonlocal is_first
    if not is_first:
      return train_step(*arguments)
    is_first = False
    progress.say('Compiling the step.')
    state, metrics = train_step(*arguments)
    return state, jax.block_until_ready(metrics)

  return step


class _Period:
  """The metrics of the steps since the last line of the log."""

  def __init__(self, spikes: loss_spikes.SpikeWatch, most_ahead: int | None):
    self._spikes = spikes
    self._most_ahead = most_ahead
    self._metrics = []
    # Steps whose loss the host has not looked at.
    self._in_flight = collections.deque()

  def add(self, step: int, metrics: dict[str, Any]) -> None:
    """Adds a step, and waits for one that is too many steps behind it."""
    self._metrics.append(metrics)
    self._in_flight.append((step, metrics))
    if self._most_ahead is not None and len(self._in_flight) > self._most_ahead:
      self._spikes.see(*self._in_flight.popleft())

  def values(self, step: int, state: Any) -> dict[str, train_metrics.Value]:
    """The means over the period, if the run has not diverged.

    Here the host waits for all steps. It does so before every action, so that
    no checkpoint is saved of a run that has diverged.
    """
    values = _mean_values(self._metrics)
    _check_finite(step, values)
    _check_state(step, state)
    while self._in_flight:
      self._spikes.see(*self._in_flight.popleft())
    return values

  def clear(self) -> None:
    """Begins the next period."""
    self._metrics = []


def _to_show(values: dict[str, train_metrics.Value]) -> dict[str, float]:
  """Those metrics that the line of progress shows, by their labels there."""
  return {
    label: values[name] for name, label in _SHOWN.items() if name in values
  }


def _mean_values(unlogged) -> dict[str, train_metrics.Value]:
  """The means over the steps since the last line; waits for the device."""
  totals: dict[str, train_metrics.Mean] = {}
  for metrics in jax.device_get(unlogged):
    totals = train_metrics.merge(totals, metrics)
  return train_metrics.compute(totals)


def _num_tokens(batch) -> int:
  """How many tokens of the batch of all processes are not padding."""
  names = ('encoder_input_tokens', 'decoder_target_tokens')
  own = sum(np.count_nonzero(batch[n]) for n in names if n in batch)
  # Rows that other processes make are empty here, and count as the mean of ours.
  is_made = batch[names[1]].any(axis=-1)
  return round(own * len(is_made) / max(1, np.count_nonzero(is_made)))


def _check_state(step, state):
  """Raises DivergedError if the last update made a state that is not finite.

  Its loss, which is that of the state before it, may well be finite.
  """
  names = train_state.not_finite(state)
  if names:
    raise DivergedError(
      f'Parameters and optimizer state must stay finite, but after step {step} '
      f'{len(names)} of their arrays hold NaN or infinity, such as {names[0]}. '
      'Lower the learning rate; this state is not saved, and the checkpoints '
      'before are untouched.'
    )


def _check_finite(step, values):
  """Raises DivergedError if a metric says that the run has diverged.

  The loss of a step is that of the parameters before it, and a step whose
  gradients are not finite changes no expert table.
  """
  for name in ('loss', 'gradient_norm', 'expert_gradient_bound'):
    if not math.isfinite(values.get(name, 0)):
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
