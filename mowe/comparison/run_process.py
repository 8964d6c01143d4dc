"""Runs as processes: started one by one, stopped together, never two of one.

A run is a process of its own: it takes its memory with it when it ends, and its
peak can be measured. It is told to stop by a signal, or by the end of the
process that started it, by whatever end.
"""

import contextlib
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

from mowe.comparison import planned_runs, single_run
from mowe.words import atomic_files

_STOPPED = 'The experiment is stopped. Run the same command to continue.'


@contextlib.contextmanager
def only_one(folder: pathlib.Path) -> Iterator[int]:
  """Waits until no other process works in a folder.

  Yields the lock, a file descriptor: processes that inherit it hold it too.
  """
  descriptor = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT, 0o644)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'Waiting for another process to end its work in {folder}.')
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield descriptor
  finally:
    os.close(descriptor)


class Runner:
  """Does runs, one at a time; a context manager that catches signals.

  Ctrl-C and SIGTERM let the run end its step and save; a second one ends it at
  once. After that `do` raises KeyboardInterrupt.

  Attributes:
    lock: of `only_one`.
  """

  def __init__(self, lock: int):
    self.lock = lock
    self._process: subprocess.Popen | None = None
    self._is_stopped = False
    self._handlers: dict[int, object] = {}

  def __enter__(self) -> 'Runner':
    for number in (signal.SIGINT, signal.SIGTERM):
      self._handlers[number] = signal.signal(number, self._stop)
    return self

  def __exit__(self, *unused_exception: object) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def do(self, planned: planned_runs.Run) -> None:
    """Does a run, or what is left of it.

    Raises:
      KeyboardInterrupt: a signal came.
      ValueError: the run failed; it has said why.
    """
    if self._is_stopped:
      raise KeyboardInterrupt(_STOPPED)
    folder = pathlib.Path(planned.folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / 'run.json'
    atomic_files.write_atomically(file, planned.to_json().encode())
    # The pipe of its input is closed when this process ends. A session of its
    # own: Ctrl-C comes here alone, and is passed on.
    self._process = subprocess.Popen(
      [sys.executable, '-m', single_run.__name__, str(file)],
      stdin=subprocess.PIPE,
      pass_fds=(self.lock,),
      start_new_session=True,
    )
    if self._is_stopped:
      self._process.terminate()
    status = self._process.wait()
    self._process = None
    if self._is_stopped or status == single_run.STOPPED:
      raise KeyboardInterrupt(_STOPPED)
    if status:
      raise ValueError(
        f'Every run of an experiment must end well, but that of {planned.name} '
        f'with seed {planned.seed} ended with status {status}. See what it '
        'says above; the same command continues.'
      )

  def _stop(self, number: int, frame: object) -> None:
    del number, frame
    process = self._process
    if process is not None:
      process.kill() if self._is_stopped else process.terminate()
    self._is_stopped = True
