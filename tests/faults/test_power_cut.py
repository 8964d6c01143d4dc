"""A power cut at any moment loses no checkpoint that was said to be saved.

Also tests `atomic_files` and `manifests`. What is left after a cut is said in
helpers/power_cuts.py.
"""

import shutil
import sys

import jax
import numpy as np
import power_cuts
import pytest

from mowe.commands import cache_task, train
from mowe.data.caches import token_cache
from mowe.stores import expert_stores
from mowe.training import checkpointing, manifests, train_metrics

_TOTAL = 6
_STORES = {
  'device': expert_stores.DeviceStore(),
  'disk': expert_stores.DiskStore(num_slots=16),
}
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc/self/fd'),
]


def _train(world, folder, store):
  save = train.SaveConfig(period=2, keep_last=1)
  return world.train(folder, _TOTAL, store=store, save=save)


@pytest.fixture(scope='module', params=_STORES)
def cut_run(request, world, tmp_path_factory):
  """A run that was watched: its store, disk, root's inode and last state."""
  jax.config.update('jax_disable_most_optimizations', True)
  root = tmp_path_factory.mktemp('watched')
  disk = power_cuts.Disk(root)
  write = manifests.write

  def noted(folder):
    write(folder)
    disk.finish(int(folder.name.removeprefix('checkpoint_')))

  with disk.watching(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(manifests, 'write', noted)
    store = _STORES[request.param]
    state = jax.device_get(_train(world, root / 'run', store))
  return store, disk, root.stat().st_ino, state


def _trees(disk, root, numbers, out):
  """Yields each moment and, at `out`, the tree after a cut in the worst cases."""
  last = None
  for number in numbers:
    moment = disk.moments[number]
    trees = []
    if last is None or moment.forced != last.forced:
      trees.append(lambda: power_cuts.write_least(moment, root, out))  # noqa: B023
    if last is None or moment != last:
      trees.append(lambda: power_cuts.write_names(moment, out))  # noqa: B023
    last = moment
    for write in trees:
      write()
      yield moment
      shutil.rmtree(out)


def test_what_is_saved_stays(cut_run, tmp_path):
  _, disk, root, _ = cut_run
  run, last = tmp_path / 'after' / 'run', 0
  numbers = [n for n, moment in enumerate(disk.moments) if moment.done]
  for moment in _trees(disk, root, numbers, run.parent):
    checkpoints = checkpointing.Checkpoints(run)
    steps = checkpoints.all_steps()
    last = max(steps)
    assert last >= moment.done[-1]
    for step in steps:
      manifests.verify(run / f'checkpoint_{step}')
    # Metrics are on the disk before the checkpoint of their step.
    lines = train_metrics.JsonLinesWriter(run / 'train_metrics.jsonl', last)
    written = train_metrics.read_json_lines(lines.path)
    assert [line['step'] for line in written] == [*range(2, last + 1, 2)]
    lines.close()
    checkpoints.close()
  assert last == _TOTAL


@pytest.mark.parametrize('cut_run', ['disk'], indirect=True)
def test_a_run_after_a_cut_ends_with_the_same_bits(cut_run, tmp_path, world):
  store, disk, root, expected = cut_run
  # In and after the save of step 4.
  after = [4 in moment.done for moment in disk.moments].index(True)
  run = tmp_path / 'after' / 'run'
  for _ in _trees(disk, root, [after - 5, after + 1], run.parent):
    state = _train(world, run, store)
    jax.tree.map(
      np.testing.assert_array_equal,
      (state.params, state.opt_state),
      (expected.params, expected.opt_state),
    )


def test_a_token_cache_is_there_whole_or_not(tmp_path):
  root = tmp_path / 'watched'
  root.mkdir()
  (tmp_path / 'a.txt').write_text('one\ntwo\nthree\n')
  source = cache_task.TextFiles([str(tmp_path / 'a.txt')])
  disk = power_cuts.Disk(root)
  with disk.watching():
    cache_task.cache_task(root / 'cache', 'bytes', source)
  found, out = [], tmp_path / 'after'
  numbers = range(len(disk.moments))
  for _ in _trees(disk, root.stat().st_ino, numbers, out):
    found.append((out / 'cache').exists())
    if found[-1]:
      token_cache.TokenCache.open(out / 'cache').verify(lambda: False)
  assert found[-1] and not any(found[:6])


def test_the_tool_sees_what_is_not_forced(tmp_path):
  root = tmp_path / 'watched'
  root.mkdir()
  disk = power_cuts.Disk(root)
  with disk.watching(), (root / 'a').open('w') as file:
    file.write('one')
    file.flush()
    power_cuts.os.fsync(file.fileno())
    file.write('two')
    (root / 'a').rename(root / 'b')
    (root / 'c').write_text('three')
    power_cuts.os.fsync(file.fileno())
  least, named = tmp_path / 'least', tmp_path / 'named'
  power_cuts.write_least(disk.moments[-1], root.stat().st_ino, least)
  power_cuts.write_names(disk.moments[-1], named)
  assert [*least.iterdir()] == []
  contents = {path.name: path.read_text() for path in named.iterdir()}
  assert contents == {'b': 'one', 'c': ''}
