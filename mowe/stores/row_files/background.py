"""Threads that work beside the computation, and give way to it."""

import concurrent.futures
import os
import sys
import threading

# How much these threads give way to others, as for `nice`. Everybody waits for
# the computation, and nobody for them.
_NICENESS = 10


def threads(number: int, name: str) -> concurrent.futures.ThreadPoolExecutor:
  """A pool of `number` threads, whose names begin with `name`."""
  return concurrent.futures.ThreadPoolExecutor(number, name, _give_way)


def _give_way() -> None:
  # Linux has a priority for each thread. Elsewhere a priority is that of the
  # whole process, and is left as it is.
  if sys.platform != 'linux':
    return
  thread = threading.get_native_id()
  if os.getpriority(os.PRIO_PROCESS, thread) < _NICENESS:
    os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)
