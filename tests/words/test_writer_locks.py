"""Tests locks of writers with real processes, with flock and without."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mowe.words import writer_locks

_HOLD = """
import pathlib, sys, time
from mowe.words import writer_locks
if sys.argv[2] == 'no locks':
  def refuse(*unused):
    raise OSError(95, 'Operation not supported')
  writer_locks.fcntl.flock = refuse
with writer_locks.of_folder(sys.argv[1]):
  print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def no_locks(request, monkeypatch):
  if request.param == 'no locks':

    def refuse(*unused):
      raise OSError(errno.EOPNOTSUPP, 'Operation not supported')

    monkeypatch.setattr(fcntl, 'flock', refuse)
  return request.param


@pytest.mark.parametrize('no_locks', ['locks', 'no locks'], indirect=True)
def test_one_process_at_a_time_and_a_dead_one_is_followed(tmp_path, no_locks):
  folder = tmp_path / 'run'
  root = pathlib.Path(__file__).resolve().parents[2]
  process = subprocess.Popen(
    [sys.executable, '-c', _HOLD, str(folder), no_locks],
    stdout=subprocess.PIPE,
    env=os.environ | {'PYTHONPATH': str(root)},
  )
  assert process.stdout.readline() == b'held\n'
  start = time.monotonic()
  with (
    pytest.raises(
      writer_locks.PlaceInUseError,
      match=rf'may write in .*run, but process {process.pid} on .* since 20.*'
      'Wait until it ends, or give another place',
    ),
    writer_locks.of_folder(folder),
  ):
    pass
  assert time.monotonic() - start < 1
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  with writer_locks.of_folder(folder):
    (file,) = (one for one in folder.iterdir() if one.stat().st_size)
    assert json.loads(file.read_text())['pid'] == os.getpid()
  # The holder leaves nothing behind that could be taken for a holder.
  assert not any(one.stat().st_size for one in folder.iterdir())


@pytest.mark.parametrize('no_locks', ['locks', 'no locks'], indirect=True)
def test_a_lock_of_a_path_lies_beside_it(tmp_path, no_locks):
  with writer_locks.of_path(tmp_path / 'cache'):
    assert not (tmp_path / 'cache').exists()
    with writer_locks.of_path(tmp_path / 'other'):
      pass
    with (
      pytest.raises(writer_locks.PlaceInUseError, match='cache, but process'),
      writer_locks.of_path(tmp_path / 'cache'),
    ):
      pass
  with writer_locks.of_path(tmp_path / 'cache'):
    pass


@pytest.mark.parametrize('no_locks', ['no locks'], indirect=True)
def test_without_a_sign_of_life_a_holder_elsewhere_is_dead(tmp_path, no_locks):
  file = tmp_path / '.lock.alive'
  file.write_text(
    json.dumps({'pid': 1, 'host': 'x', 'since': 'y', 'command': 'z'})
  )
  with (
    pytest.raises(writer_locks.PlaceInUseError, match='process 1 on x'),
    writer_locks.of_folder(tmp_path),
  ):
    pass
  long_ago = time.time() - 100
  os.utime(file, (long_ago, long_ago))
  with writer_locks.of_folder(tmp_path):
    pass
