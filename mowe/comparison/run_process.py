"""Starts runs as processes, one after the other, and stops them.

A run is a process of its own, so that its memory is free when it ends, and its
peak of memory can be measured. It is stopped by a signal, or when the process
that started it ends for any reason.
"""

import contextlib
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

from mowe.comparison import planned_runs, single_run
from mowe.words import atomic_files, writer_locks

_STOPPED = 'The experiment is stopped. Run the same command to continue.'


@contextlib.contextmanager
def only_one(folder: pathlib.Path) -> Iterator[int]:
  """Context in which no other process runs an experiment in a folder.

  A run that a killed process has started saves what it did and ends; this waits
  for it. Yields the lock of runs, a file descriptor: processes that inherit it
  hold the lock, too.

  Raises:
    PlaceInUseError: another process is doing an experiment there.
  """
  with writer_locks.of_folder(folder), _runs_locked(folder) as descriptor:
    yield descriptor


@contextlib.contextmanager
def _runs_locked(folder: pathlib.Path) -> Iterator[int]:
  descriptor = os.open(folder / '.runs.lock', os.O_RDWR | os.O_CREAT, 0o644)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'Waiting for the run of a process that has ended in {folder}.')
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
      # The file system has no locks, and so nobody can be waited for.
      pass
    yield descriptor
  finally:
    os.close(descriptor)


class Runner:
  """A context manager that does runs, one at a time, and catches signals.

  Ctrl-C and SIGTERM let the run finish its step and save; a second signal ends
  it at once. After a signal `do` raises KeyboardInterrupt.

  Attributes:
    lock: the file descriptor that `only_one` yields.
  """

  def __init__(self, lock: int):
    self.lock = lock
    self._process: subprocess.Popen | None = None
    self._is_stopped = False
    self._handlers: dict[int, object] = {}

  def __enter__(self) -> 'Runner':
    # Only the main thread of a process can catch signals.
    if threading.current_thread() is not threading.main_thread():
      return self
    for number in (signal.SIGINT, signal.SIGTERM):
      self._handlers[number] = signal.signal(number, self._stop)
    return self

  def __exit__(self, *unused_exception: object) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def do(self, planned: planned_runs.Run) -> None:
    """Does a run, or what is left of it.

    Raises:
      KeyboardInterrupt: a signal was received.
      ValueError: the run failed; it has printed why.
    """
    if self._is_stopped:
      raise KeyboardInterrupt(_STOPPED)
    folder = pathlib.Path(planned.folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / 'run.json'
    atomic_files.write_atomically(file, planned.to_json().encode())
    # The pipe to its standard input is closed when this process ends. The run
    # has a session of its own, so that Ctrl-C reaches this process alone, which
    # passes it on.
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
