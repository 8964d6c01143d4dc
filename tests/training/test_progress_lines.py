"""Tests progress: plain lines with exact numbers, and a bar in a terminal."""

import io

import pytest

from mowe.training import progress_lines


class _Clock:
  """A clock that is set by hand."""

  seconds = 0.0

  def __call__(self):
    return self.seconds


class _Terminal(io.StringIO):
  """A stream that says it is a terminal."""

  def isatty(self):
    return True


def _run(stream, first_step=0, total_steps=5, log_period=2):
  clock = _Clock()
  with progress_lines.Progress(
    total_steps, first_step, log_period, stream, clock
  ) as line:
    for step in range(first_step + 1, total_steps + 1):
      clock.seconds += 2.0
      values = {'loss': 10.0 / step} if step % 2 == 0 else None
      line.update(step, num_tokens=3000, values=values)
  return stream.getvalue()


def test_plain_lines_once_per_period():
  # There are 3000 tokens in 2 seconds, and 2 seconds for each step that is
  # left.
  assert _run(io.StringIO()).splitlines() == [
    'step 2/5  loss 5  1.5K tokens/s  ETA 6s',
    'step 4/5  loss 2.5  1.5K tokens/s  ETA 2s',
    'step 5/5  loss 2.5  1.5K tokens/s  ETA 0s',
  ]


def test_other_units_are_shown_per_second():
  clock, stream = _Clock(), io.StringIO()
  with progress_lines.Progress(
    900, 0, 100, stream, clock, unit='example'
  ) as line:
    for done in (200, 500):
      clock.seconds += 2.0
      line.update(done)
  # The first examples are compiled for, and do not count.
  assert stream.getvalue().splitlines() == [
    'example 200/900  ',
    'example 500/900  150 examples/s  ETA 3s',
  ]


def test_the_first_step_counts_for_neither_speed_nor_time():
  clock, stream = _Clock(), io.StringIO()
  with progress_lines.Progress(5, 0, 1, stream, clock) as line:
    line.say('Compiling.')
    for step, seconds in ((1, 100.0), (2, 2.0)):
      clock.seconds += seconds
      line.update(step, num_tokens=3000)
  assert stream.getvalue().splitlines() == [
    'Compiling.',
    'step 1/5  ',
    'step 2/5  1.5K tokens/s  ETA 6s',
  ]


def test_a_resumed_run_counts_its_own_steps_only():
  lines = _run(io.StringIO(), first_step=1000, total_steps=1004).splitlines()
  assert lines[0] == 'step 1002/1004  loss 0.00998  1.5K tokens/s  ETA 4s'


def test_a_terminal_gets_a_bar():
  text = _run(_Terminal())
  assert '5/5' in text and 'loss 2.5' in text and 'ETA 0s' in text
  # The bar is redrawn in place, and not line after line.
  assert '\x1b[' in text


@pytest.mark.parametrize(
  'seconds, text',
  [(0, '0s'), (59.6, '1m00s'), (725, '12m05s'), (11_220, '3h07m')]
  + [(187_200, '2d04h')],
)
def test_durations(seconds, text):
  assert progress_lines.duration(seconds) == text


@pytest.mark.parametrize(
  'number, text', [(1.5, '1.5'), (999.6, '1K'), (12_345, '12.3K'), (2e9, '2G')]
)
def test_short_numbers(number, text):
  assert progress_lines._short(number) == text


def test_period_is_checked():
  with pytest.raises(ValueError, match='steps between two lines'):
    progress_lines.Progress(10, log_period=0)
