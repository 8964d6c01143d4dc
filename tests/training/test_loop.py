"""Tests the loop: order of actions, clean stops, divergence, resuming."""

import gc
import io
import os
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from mowe.training import loop, loss_spikes, progress_lines, speed, train_state
from mowe.training.train_metrics import Mean


def _batch(number):
  """A batch of four tokens: three of inputs and one of targets."""
  return {
    'encoder_input_tokens': np.array([[5, 6, 1, 0]]),
    'decoder_target_tokens': np.array([[7, 0]]),
    'number': number,
  }


class _Recorder:
  """A writer that keeps what it is given."""

  def __init__(self):
    self.lines = []

  def write(self, step, values):
    self.lines.append((step, dict(values)))


def _run(
  total_steps,
  *,
  first_step=0,
  losses=None,
  norms=None,
  actions=(),
  log_period=1,
  on_step=None,
  stop=None,
  updates=None,
  spikes=None,
  meter=None,
  stream=None,
):
  """Runs fake steps; step n has the loss `losses[n]`, or n if there is none.

  It replaces the parameter by `updates[n]`, if there is one.
  """
  seen = []

  def train_step(state, batch, plan):
    assert plan == batch['number'] + 100
    number = batch['number']
    seen.append(number)
    if on_step:
      on_step(number)
    loss = (losses or {}).get(number, float(number))
    metrics = {
      'loss': Mean(jnp.float32(loss * 2), jnp.float32(2)),
      'accuracy': Mean(jnp.float32(1), jnp.float32(2)),
      'gradient_norm': Mean(
        jnp.float32((norms or {}).get(number, 1.0)), jnp.float32(1)
      ),
    }
    params = {'w': jnp.float32((updates or {}).get(number, 1.0))}
    return state.replace(step=state.step + 1, params=params), metrics

  writer = _Recorder()
  stream = stream or io.StringIO()
  state = train_state.TrainState(jnp.int32(first_step), {}, {}, {}, {})
  error = None
  try:
    state = loop.run(
      state,
      train_step=train_step,
      batches=((_batch(n), n + 100) for n in range(first_step, total_steps)),
      total_steps=total_steps,
      actions=actions,
      writers=[writer],
      progress=progress_lines.Progress(
        total_steps, first_step, log_period, stream
      ),
      meter=meter,
      log_period=log_period,
      stop=stop,
      spikes=spikes,
    )
  except (loop.DivergedError, loss_spikes.LossSpikeError) as diverged:
    error = diverged
  return state, seen, writer.lines, error


def _recording(period):
  done = []
  return done, loop.Every(period, lambda step, state: done.append(step))


def test_actions_are_due_every_period_and_at_the_end():
  saved, save = _recording(3)
  never, only_last = _recording(0)
  state, seen, lines, _ = _run(7, actions=[save, only_last])
  assert seen == list(range(7)) and int(state.step) == 7
  assert saved == [3, 6, 7]
  assert never == [7]
  assert [step for step, _ in lines] == list(range(1, 8))


def test_an_action_gets_the_state_after_its_step():
  states = []
  save = loop.Every(2, lambda step, state: states.append((step, state)))
  _run(4, actions=[save])
  assert [(step, int(state.step)) for step, state in states] == [(2, 2), (4, 4)]


def test_metrics_are_means_over_the_log_period():
  _, _, lines, _ = _run(5, log_period=2)
  # The losses 0 to 4 are averaged in pairs; the last step has a line of its
  # own.
  assert [(step, values['loss']) for step, values in lines] == [
    (2, 0.5),
    (4, 2.5),
    (5, 4.0),
  ]


def test_the_first_loss_is_shown_soon():
  stream = io.StringIO()
  _, _, lines, _ = _run(14, first_step=1, log_period=14, stream=stream)
  # The log has the mean of all thirteen steps, from 1 to 13.
  assert [(step, values['loss']) for step, values in lines] == [(14, 7.0)]
  told, early, last = stream.getvalue().splitlines()
  assert told == 'Compiling the step.'
  # The mean of 1 to 10.
  assert early.startswith('step 11/14  loss 5.5  accuracy 0.5')
  assert last.startswith('step 14/14  loss 7 ')


def test_a_short_log_period_has_no_other_lines():
  stream = io.StringIO()
  _run(14, log_period=7, stream=stream)
  steps = [line.split()[1] for line in stream.getvalue().splitlines()[1:]]
  assert steps == ['7/14', '14/14']


def test_steps_are_timed_without_what_is_between_them():
  lines = []
  now = [0.0]

  class _Writer:
    write = lambda self, step, values: lines.append((step, values))

  def pass_time(seconds):
    now[0] += seconds

  _run(
    4,
    log_period=2,
    on_step=lambda number: pass_time(9.0 if number == 0 else 2.0),
    actions=[loop.Every(1, lambda step, state: pass_time(30.0))],
    meter=speed.SpeedMeter([_Writer()], clock=lambda: now[0]),
  )
  assert [step for step, _ in lines] == [2, 4]
  for _, values in lines:
    # There are four tokens in a batch.
    assert values['speed/step_seconds'] == 2.0
    assert values['speed/tokens_per_second'] == 2.0


def test_a_resumed_run_makes_the_remaining_steps():
  saved, save = _recording(2)
  state, seen, _, _ = _run(5, first_step=3, actions=[save])
  assert seen == [3, 4] and saved == [4, 5] and int(state.step) == 5


def test_a_finished_run_does_nothing():
  saved, save = _recording(2)
  state, seen, lines, _ = _run(4, first_step=4, actions=[save])
  assert (seen, saved, lines) == ([], [], []) and int(state.step) == 4


def _kill(number):
  def on_step(step):
    if step == number:
      os.kill(os.getpid(), signal.SIGTERM)

  return on_step


def test_a_signal_ends_the_run_after_its_step_and_saves():
  saved, save = _recording(100)
  stop = loop.StopSignal()
  before = signal.getsignal(signal.SIGTERM)
  state, seen, lines, _ = _run(
    9, actions=[save], log_period=4, on_step=_kill(1), stop=stop
  )
  assert stop.requested
  assert seen == [0, 1] and saved == [2] and int(state.step) == 2
  assert [step for step, _ in lines] == [2]
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_during_an_action_loses_no_step():
  # The signal comes after the loop has decided whether step 2 is the last.
  saved, save = _recording(100)
  interrupt = loop.Every(
    2, lambda step, state: os.kill(os.getpid(), signal.SIGTERM)
  )
  state, seen, _, _ = _run(9, actions=[interrupt, save])
  assert saved and saved[-1] == int(state.step) == len(seen)
  assert len(seen) <= 3


def test_what_takes_long_is_not_done_at_a_stop():
  saved, save = _recording(100)
  evaluated = []
  evaluate = loop.Every(
    3, lambda step, state: evaluated.append(step), at_stop=False
  )
  _run(9, actions=[evaluate, save], on_step=_kill(3))
  assert evaluated == [3] and saved == [4]
  evaluated.clear()
  # But it runs at the end, and also when it is due.
  _run(4, actions=[evaluate])
  assert evaluated == [3, 4]
  evaluated.clear()
  _run(9, actions=[evaluate], on_step=_kill(2))
  assert evaluated == [3]


def test_the_step_of_the_stop_is_told_while_the_host_is_busy(capsys):
  """A handler of Python would run only after the sleep, or a compilation."""
  told_after = []

  def on_step(number):
    if number != 1:
      return
    start = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    # This single call does not return to Python's instructions until it ends.
    time.sleep(0.5)
    told_after.append(time.monotonic() - start)

  state, _, _, _ = _run(9, on_step=on_step)
  assert int(state.step) == 2 and told_after
  assert capsys.readouterr().out == 'Stopping after step 2, then saving.\n'


def test_a_loop_in_another_thread_leaves_signals_alone():
  before = signal.getsignal(signal.SIGTERM)
  found = []
  thread = threading.Thread(target=lambda: found.append(_run(3)))
  thread.start()
  thread.join()
  ((state, seen, _, error),) = found
  assert seen == [0, 1, 2] and error is None and int(state.step) == 3
  assert signal.getsignal(signal.SIGTERM) == before


def test_the_host_is_at_most_two_steps_ahead():
  """Before the third step after it is handed over, a step must be finished."""
  waited = []

  class Loss:
    def __init__(self, number):
      self.number = number

    def compute(self):
      waited.append(self.number)
      return 1.0

  given = []

  def train_step(state, batch, plan):
    del plan
    given.append((batch['number'], list(waited)))
    return state, {'loss': Loss(batch['number'])}

  # At the end the loop would merge these metrics, which are no numbers.
  batches = ((_batch(n), None) for n in range(5))
  loop.run(
    train_state.TrainState(jnp.int32(0), {}, {}, {}, {}),
    train_step=train_step,
    batches=batches,
    total_steps=100,
    progress=progress_lines.Progress(100, stream=io.StringIO()),
    log_period=100,
  )
  assert [(n, len(done)) for n, done in given] == [
    (0, 0), (1, 0), (2, 0), (3, 1), (4, 2),
  ]  # fmt: skip


@pytest.fixture
def no_collection():
  """An exception in a callback of the garbage collector would be lost."""
  gc.disable()
  yield
  gc.enable()


def test_a_second_ctrl_c_stops_at_once(no_collection):
  def on_step(step):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    _run(9, on_step=on_step)


@pytest.mark.parametrize('loss', [float('nan'), float('inf')])
def test_divergence_is_an_error_and_nothing_is_saved(loss):
  saved, save = _recording(1)
  _, seen, _, error = _run(5, losses={2: loss}, actions=[save])
  assert seen == [0, 1, 2] and saved == [1, 2]
  assert 'after step 3' in str(error) and 'learning rate' in str(error)


def test_divergence_between_two_log_lines_is_not_saved():
  saved, save = _recording(3)
  _, _, lines, error = _run(
    20, losses={4: float('nan')}, actions=[save], log_period=10
  )
  assert saved == [3] and lines == []
  assert 'after step 6' in str(error)


def test_gradients_that_are_not_finite_are_not_saved():
  # The loss belongs to the parameters before the update, so these are lost
  # already.
  saved, save = _recording(3)
  _, _, _, error = _run(
    20, norms={2: float('nan')}, actions=[save], log_period=10
  )
  assert saved == [] and 'gradient' in str(error)


def test_looking_at_the_loss_before_a_save_does_not_change_the_log():
  _, save = _recording(1)
  _, _, lines, _ = _run(4, log_period=2, actions=[save])
  assert [(step, values['loss']) for step, values in lines] == [
    (2, 0.5),
    (4, 2.5),
  ]


@pytest.mark.parametrize('period', [1, 3, 100])
def test_a_spike_ends_the_run_before_it_is_saved(period):
  saved, save = _recording(period)
  spikes = loss_spikes.SpikeWatch(loss_spikes.SpikeConfig('stop'))
  losses = dict.fromkeys(range(99), 2.0) | {40: 9.0}
  _, seen, _, error = _run(
    99, losses=losses, actions=[save], log_period=100, spikes=spikes
  )
  assert 'batch 41 is 9' in str(error)
  assert all(step <= 40 for step in saved)
  # The host is at most two steps ahead.
  assert len(seen) <= 43


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(value):
  # Its losses are finite, as the last update alone made it so.
  saved, save = _recording(2)
  _, seen, _, error = _run(
    6, actions=[save], updates={3: value}, log_period=100
  )
  assert saved == [2] and seen == [0, 1, 2, 3]
  assert (
    'after step 4 1 of their arrays hold NaN or infinity, such as params/w'
    in str(error)
  )
