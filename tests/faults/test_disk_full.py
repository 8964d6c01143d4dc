"""A disk without room: every verb says so, and harms nothing that is finished.

The disk is a small file system in memory, which only some users may mount.
"""

import contextlib
import json
import pathlib
import subprocess

import jax
import numpy as np
import pytest

from mowe.cli import main
from mowe.commands import train
from mowe.model_folders import model_folder
from mowe.stores import expert_stores
from mowe.training import checkpointing

pytestmark = pytest.mark.slow


class _SmallDisk:
  """A file system of a given size, at `path`."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    path.mkdir()
    self._mount('-t', 'tmpfs', '-o', 'size=64k', 'none')

  def resize(self, size: str) -> None:
    self._mount('-o', f'remount,size={size}')

  def fill(self, room: int = 0) -> None:
    with (self.path / 'other').open('wb', buffering=0) as file:
      with contextlib.suppress(OSError):
        while True:
          file.write(bytes(1 << 12))
      file.truncate(file.tell() - room)

  def close(self) -> None:
    subprocess.run(['umount', self.path], check=True)

  def _mount(self, *options):
    subprocess.run(
      ['mount', *options, self.path], check=True, capture_output=True
    )


@pytest.fixture
def disk(tmp_path):
  try:
    made = _SmallDisk(tmp_path / 'disk')
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f'needs the right to mount a small file system: {error}')
  yield made
  made.close()


def _texts(path):
  lines = [json.dumps({'text': f'number {n} of Quimby'}) for n in range(900)]
  path.write_text('\n'.join(lines) + '\n')
  return path


_VERBS = {
  'cache-task': ['cache-task', '{disk}/out', '{file}', '--vocabulary', 'bytes'],
  'words': ['train-vocabulary', '{disk}/out.txt', '{file}', '--words'],
  'pieces': ['train-vocabulary', '{disk}/out.model', '{file}', '--size', '50'],
  'routing': ['build-routing-vocabulary', '{disk}/out.npz', '{file}']
  + ['--vocabulary', 'bytes', '--num_experts', '4'],
  'convert': ['convert', '{run}', '{disk}/out', '--to', 'mowe'],
  'safetensors': ['convert', '{run}', '{disk}/out', '--to', 'safetensors'],
}


@pytest.fixture(scope='module')
def run(world, tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  world.train(folder, 2)
  return folder


@pytest.mark.parametrize('name', _VERBS)
def test_a_verb_says_so_and_works_with_room(name, disk, run, tmp_path, capfd):
  places = {'disk': disk.path, 'run': run, 'file': _texts(tmp_path / 'a.jsonl')}
  arguments = [one.format(**places) for one in _VERBS[name]]
  disk.fill()
  assert main.main(arguments) == 1
  shown = capfd.readouterr().err.splitlines()[-1]
  assert shown.startswith('mowe: ') and 'No space left on device' in shown
  assert str(disk.path) in shown and 'run the same command again' in shown
  left = [path.name for path in disk.path.iterdir()]
  assert [name for name in left if not name.endswith('.lock')] == ['other']
  disk.resize('64m')
  assert main.main(arguments) == 0


def _train(world, folder, step, store):
  save = train.SaveConfig(period=2)
  return jax.device_get(world.train(folder, step, store=store, save=save))


@pytest.fixture(scope='module')
def straight(world, tmp_path_factory):
  jax.config.update('jax_disable_most_optimizations', True)
  folder = tmp_path_factory.mktemp('straight')
  return _train(world, folder, 4, expert_stores.DeviceStore())


@pytest.mark.parametrize(
  'store, room',
  [
    # The disk is full while arrays are written, and before the first file.
    (expert_stores.DeviceStore(), 24 << 10),
    (expert_stores.DiskStore(num_slots=16), 0),
  ],
)
def test_a_run_keeps_its_checkpoints_and_goes_on(
  store, room, disk, straight, world
):
  disk.resize('64m')
  folder = disk.path / 'run'
  _train(world, folder, 2, store)
  disk.fill(room)
  with pytest.raises(OSError, match='No space left on device') as raised:
    _train(world, folder, 4, store)
  assert str(folder) in str(raised.value)
  with checkpointing.Checkpoints(folder) as checkpoints:
    assert checkpoints.all_steps() == [2]
  model_folder.load(str(folder))
  (disk.path / 'other').unlink()
  state = _train(world, folder, 4, store)
  jax.tree.map(
    np.testing.assert_array_equal,
    (state.params, state.opt_state),
    (straight.params, straight.opt_state),
  )
