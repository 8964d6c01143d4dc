"""One line that says how training goes: step, loss, tokens/s, time left.

In a terminal it is a live bar. Elsewhere, as in a log file or the pipe of a
notebook, there is one plain line per log period, and one whenever there is
something new to show.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

import rich.console
import rich.progress

from mowe.words import terminal_text


class Progress:
  """Shows the progress of a run; a context manager.

  Attributes:
    total_steps: the step at which the run ends.
    first_step: the step at which it starts; earlier ones were done by another
      process.
    log_period: steps between two plain lines; the last step always has one.
    stream: where to show the progress, as a bar if it is a terminal; None for
      the standard output.
    clock: returns the time in seconds; another one is for tests.
    unit: what is counted. Other units than steps are shown per second, too.
  """

  def __init__(
    self,
    total_steps: int,
    first_step: int = 0,
    log_period: int = 100,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    unit: str = 'step',
  ):
    if log_period < 1:
      raise ValueError(
        f'log_period must be at least 1, but is {log_period}. Give the number '
        'of steps between two lines.'
      )
    self.total_steps = total_steps
    self.first_step = first_step
    self.log_period = log_period
    self.unit = unit
    stream = sys.stdout if stream is None else stream
    self._stream = terminal_text.steerable(stream)
    self._clock = clock
    # Speed and the time that is left follow from the steps after the first one
    # of this process, which compiles the program.
    self._timed_from: int | None = None
    self._start = self._period_start = self._clock()
    self._tokens = 0
    self._values: dict[str, float] = {}
    self._bar = _Bar(self) if self._stream.isatty() else None

  def __enter__(self) -> 'Progress':
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *unused_exception) -> None:
    if self._bar:
      self._bar.stop()

  def say(self, text: str) -> None:
    """Shows a sentence at once."""
    if self._bar:
      self._bar.say(text)
    else:
      self._stream.write(text + '\n')
      self._stream.flush()

  def update(
    self,
    step: int,
    num_tokens: int = 0,
    values: Mapping[str, float] | None = None,
  ) -> None:
    """Shows that a step is done.

    Args:
      step: the number of steps done, so `total_steps` after the last.
      num_tokens: tokens since the last update.
      values: numbers to show by name, such as the loss. None shows the last
        ones again, so that a loop need not wait for the device at each step.
    """
    self._values.update(values or {})
    if self._timed_from is None:
      self._timed_from = step
      self._start = self._period_start = self._clock()
    else:
      self._tokens += num_tokens
    if self._bar:
      self._bar.update(step, self._numbers(step))
    elif values or step % self.log_period == 0 or step == self.total_steps:
      self._stream.write(self.line(step) + '\n')
      self._stream.flush()
    if step % self.log_period == 0:
      self._period_start = self._clock()
      self._tokens = 0

  def line(self, step: int) -> str:
    """Returns the plain line of a step."""
    return f'{self.unit} {step}/{self.total_steps}  {self._numbers(step)}'

  def _numbers(self, step: int) -> str:
    """Returns the values, tokens/s of this log period, and the time left."""
    now = self._clock()
    parts = [f'{name} {value:.4g}' for name, value in self._values.items()]
    if self._tokens and now > self._period_start:
      parts.append(
        f'{_short(self._tokens / (now - self._period_start))} tokens/s'
      )
    done = step - self._timed_from
    if done > 0:
      if self.unit != 'step':
        speed = done / max(now - self._start, 1e-9)
        parts.append(f'{_short(speed)} {self.unit}s/s')
      left = (now - self._start) / done * (self.total_steps - step)
      parts.append(f'ETA {duration(left)}')
    return '  '.join(parts)


class _Bar:
  """The live bar of a terminal."""

  def __init__(self, owner: Progress):
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn(owner.unit),
      rich.progress.MofNCompleteColumn(),
      rich.progress.BarColumn(bar_width=None),
      rich.progress.TextColumn('{task.fields[numbers]}', markup=False),
      console=rich.console.Console(file=owner._stream),
      expand=True,
    )
    self._task = self._bar.add_task(
      '', total=owner.total_steps, completed=owner.first_step, numbers=''
    )

  def start(self) -> None:
    self._bar.start()

  def update(self, step: int, numbers: str) -> None:
    self._bar.update(self._task, completed=step, numbers=numbers)

  def say(self, text: str) -> None:
    self._bar.console.print(text, markup=False, highlight=False)

  def stop(self) -> None:
    self._bar.stop()


def _short(number: float) -> str:
  """Returns three digits and a unit: 12345 is 12.3K."""
  for unit in ('', 'K', 'M'):
    if number < 999.5:
      return f'{number:.3g}{unit}'
    number /= 1000
  return f'{number:.3g}G'


def duration(seconds: float) -> str:
  """Returns a number of seconds as 59s, 12m05s, 3h07m or 2d04h."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m{seconds % 60:02}s'
  if seconds < 86400:
    return f'{seconds // 3600}h{seconds % 3600 // 60:02}m'
  return f'{seconds // 86400}d{seconds % 86400 // 3600:02}h'
