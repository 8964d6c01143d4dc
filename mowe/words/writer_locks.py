"""Lets one process at a time write in a place."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from mowe.words import atomic_files

_INSIDE = '.lock'
_BESIDE = '.{}.lock'

# Seconds between two signs of life of the holder of a lock, on file systems
# that have no locks, and after how many of them it counts as dead.
_PERIOD = 10
_DEAD_AFTER = 60


class PlaceInUseError(OSError):
  """Another process writes in the same place."""


@contextlib.contextmanager
def of_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
  """Context in which no other process writes in a folder, which is made.

  Raises:
    PlaceInUseError: another process has the lock. That of a process that has
      ended, however it did, is taken over.
    ValueError: the folder is a file.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and not folder.is_dir():
    raise ValueError(
      f'The place to write to must be a folder, but {folder} is a file. Choose '
      'another.'
    )
  atomic_files.make_folder(folder)
  with _held(folder / _INSIDE, folder):
    yield


@contextlib.contextmanager
def of_path(path: str | os.PathLike[str]) -> Iterator[None]:
  """Context in which no other process makes a file or folder at a path.

  Raises:
    PlaceInUseError: see `of_folder`.
  """
  path = pathlib.Path(path).absolute()
  atomic_files.make_folder(path.parent)
  with _held(path.parent / _BESIDE.format(path.name), path):
    yield


@contextlib.contextmanager
def _held(file, place) -> Iterator[None]:
  descriptor = _open(file)
  try:
    try:
      while not _is_locked(descriptor, file):
        os.close(descriptor)
        descriptor = _open(file)
    except BlockingIOError:
      raise _in_use(place, file) from None
    except OSError:
      # The file system has no locks.
      with _kept_alive(file.with_name(f'{file.name}.alive'), place):
        yield
      return
    os.truncate(descriptor, 0)
    os.write(descriptor, _own_name())
    try:
      yield
    finally:
      # Still locked, so that nobody else has this file.
      file.unlink(missing_ok=True)
  finally:
    os.close(descriptor)


def _open(file) -> int:
  return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)


def _is_locked(descriptor, file) -> bool:
  """Locks an open file; False if it has been removed meanwhile."""
  fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  try:
    there = os.stat(file)
  except FileNotFoundError:
    return False
  return os.path.samestat(os.fstat(descriptor), there)


@contextlib.contextmanager
def _kept_alive(file, place) -> Iterator[None]:
  """Holds a file that only its maker has, and touches it again and again."""
  while True:
    try:
      descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
      break
    except FileExistsError:
      if not _is_dead(file):
        raise _in_use(place, file) from None
      file.unlink(missing_ok=True)
  os.write(descriptor, _own_name())
  os.close(descriptor)
  is_over = threading.Event()

  def touch():
    while not is_over.wait(_PERIOD):
      os.utime(file)

  toucher = threading.Thread(target=touch, daemon=True)
  toucher.start()
  try:
    yield
  finally:
    is_over.set()
    toucher.join()
    file.unlink(missing_ok=True)


def _is_dead(file) -> bool:
  holder = _read(file)
  if holder.get('host') == socket.gethostname():
    try:
      # The signal 0 only asks whether the process is there.
      os.kill(holder['pid'], 0)
    except ProcessLookupError:
      return True
    except PermissionError:
      pass
    return False
  try:
    return time.time() - os.stat(file).st_mtime > _DEAD_AFTER
  except FileNotFoundError:
    return True


def _own_name() -> bytes:
  now = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  return json.dumps(
    {
      'pid': os.getpid(),
      'host': socket.gethostname(),
      'since': now,
      'command': shlex.join(sys.argv)[:200],
    }
  ).encode()


def _read(file) -> dict[str, Any]:
  """Who holds a lock; {} if it is just being written."""
  try:
    return json.loads(file.read_text('utf-8'))
  except (OSError, ValueError):
    return {}


def _in_use(place, file) -> PlaceInUseError:
  holder = _read(file)
  who = 'another one does'
  if holder:
    who = 'process {pid} on {host} does since {since} ({command})'.format(
      **holder
    )
  return PlaceInUseError(
    f'One process at a time may write in {place}, but {who}. Wait until it '
    'ends, or give another place.'
  )
