"""Lets a process clean up when SIGTERM ends it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(KeyboardInterrupt):
  """SIGTERM was received."""


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
  """Context in which SIGTERM raises `Terminated`, as Ctrl-C raises an error.

  By itself SIGTERM ends a process at once, and what it was writing stays. A
  handler that is set already stays, and only the main thread can set one.
  """
  is_main = threading.current_thread() is threading.main_thread()
  if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
    yield
    return
  signal.signal(signal.SIGTERM, _raise)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise(number: int, frame: Any) -> None:
  del number, frame
  raise Terminated('stopped by SIGTERM.')
