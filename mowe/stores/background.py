"""Threads that work beside the computation, and give way to it."""

import concurrent.futures
import os
import sys
import threading

# As `nice`: the computation is what everybody waits for.
_NICENESS = 10


def threads(number: int, name: str) -> concurrent.futures.ThreadPoolExecutor:
  """A pool of so many threads, whose names begin with `name`."""
  return concurrent.futures.ThreadPoolExecutor(number, name, _give_way)


def _give_way() -> None:
  # Linux has a priority for each thread; elsewhere it is that of the process.
  if sys.platform != 'linux':
    return
  thread = threading.get_native_id()
  if os.getpriority(os.PRIO_PROCESS, thread) < _NICENESS:
    os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)
