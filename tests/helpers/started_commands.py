"""Waits for commands that run in processes of their own."""

import time

_SECONDS = 240


def finish(process) -> str:
  """Waits until a process ends, and returns what it printed."""
  output, _ = process.communicate(timeout=_SECONDS)
  return output


def wait_until(is_there, process) -> None:
  """Waits until `is_there()`; the process must not end before."""
  start = time.monotonic()
  while not is_there():
    assert process.poll() is None, finish(process)
    assert time.monotonic() - start < _SECONDS
    time.sleep(0.002)
