"""Tests that a new folder is there completely or not at all."""

import threading
import time

import pytest

from mowe.interop import new_folder


def test_nothing_is_left_of_writers_that_go_on(tmp_path):
  started = threading.Event()

  def write(folder):
    for number in range(300):
      folder.mkdir(exist_ok=True)
      (folder / str(number)).touch()
      started.set()
      time.sleep(0.001)

  def write_until_done(folder):
    # The other process may remove the folder at any moment.
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
      try:
        write(folder / 'state')
      except FileNotFoundError:
        continue

  with (
    pytest.raises(KeyboardInterrupt, match='by hand'),
    new_folder.new_folder(tmp_path / 'a') as partial,
  ):
    writer = threading.Thread(target=write_until_done, args=(partial,))
    writer.start()
    started.wait()
    raise KeyboardInterrupt('by hand')
  writer.join()
  assert not list(tmp_path.iterdir())
