"""Shows the progress of work whose end is not known, such as reading files."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from mowe.words import terminal_text

_SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
  """Gives a function that takes the number done so far, and shows it at times.

  A terminal shows one line, which is overwritten. Other outputs get a line
  every five seconds. Nothing is shown for work that ends before the first line
  is due.

  Args:
    what: what is counted, such as 'texts'.
  """
  stream = terminal_text.steerable(sys.stderr)
  is_terminal = stream.isatty()
  period = 0.2 if is_terminal else _SECONDS_BETWEEN_LINES
  start = last = time.monotonic()
  shown = False

  def progress(done: int) -> None:
    nonlocal last, shown
    now = time.monotonic()
    if now - last < period:
      return
    last, shown = now, True
    line = f'{done:,} {what}, {done / (now - start):,.0f}/s'
    stream.write(f'\r{line}\033[K' if is_terminal else line + '\n')
    stream.flush()

  yield progress
  if shown and is_terminal:
    stream.write('\n')
