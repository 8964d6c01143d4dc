"""Tests experts on disk and in host memory, from training to answers."""

import functools
import shutil

import jax
import numpy as np
import pytest
import small_runs

from mowe.cli import main
from mowe.commands import ask, evaluations, train
from mowe.model_folders import model_folder
from mowe.models.families import families
from mowe.stores import expert_sources, expert_stores
from mowe.stores.row_files import row_file
from mowe.training import manifests, partitioning, train_metrics

_TOTAL = 5
_DISK = expert_stores.DiskStore(num_slots=13)
_ALL_ON_DISK = expert_stores.DiskStore(num_slots=small_runs.NUM_EXPERTS)


def _train(world, folder, total_steps=_TOTAL, **changes):
  settings = {
    # With one row in a batch, few experts are present.
    'data': world.data(batch_size=1),
    'eval_configs': [
      evaluations.LossEvaluation(world.data(), num_batches=1),
      evaluations.QuestionEvaluation(world.data('questions'), name='qa'),
    ],
    'eval_period': 2,
  }
  return world.train(folder, total_steps, **(settings | changes))


def _experts(folder, step):
  """The records of all experts of a checkpoint."""
  model = families.build(model_folder.load_config(folder)[0])
  source = expert_sources.SavedExperts(
    folder / f'checkpoint_{step}', model=model
  )
  return source.read(np.arange(small_runs.NUM_EXPERTS))


@pytest.fixture(scope='module')
def runs(world, tmp_path_factory):
  """For each store, the folder of a run with it, and its last state."""
  made = {}
  jax.config.update('jax_disable_most_optimizations', True)
  for name, store in (
    ('device', expert_stores.DeviceStore()),
    ('disk', _DISK),
  ):
    folder = tmp_path_factory.mktemp(name)
    made[name] = folder, jax.device_get(_train(world, folder, store=store))
  return made


@pytest.mark.slow
def test_disk_ends_with_the_bits_of_the_device(runs):
  folder, state = runs['device']
  other, on_disk = runs['disk']
  for step in (3, _TOTAL):
    assert _experts(folder, step).tobytes() == _experts(other, step).tobytes()
  jax.tree.map(
    np.testing.assert_array_equal,
    (state.params, state.opt_state),
    (on_disk.params, on_disk.opt_state),
  )
  assert on_disk.tables == {}


def test_evaluations_agree_and_metrics_say_what_moved(runs):
  lines = {
    name: train_metrics.read_json_lines(folder / 'eval_metrics.jsonl')
    for name, (folder, _) in runs.items()
  }
  assert [line['step'] for line in lines['disk']] == [2, 4, 5]
  for one, other in zip(lines['device'], lines['disk'], strict=True):
    assert one.keys() == other.keys()
    for name, value in one.items():
      assert other[name] == pytest.approx(value, rel=1e-5)
  folder, _ = runs['disk']
  (*_, last) = train_metrics.read_json_lines(folder / 'train_metrics.jsonl')
  assert 0 < last['experts/hit_rate'] < 1
  assert last['experts/moved_mb'] > 0 and last['experts/wait_ms'] >= 0
  assert 0 < last['experts/distinct'] <= small_runs.NUM_EXPERTS
  assert 0 <= last['experts/never_seen'] < small_runs.NUM_EXPERTS


@pytest.mark.slow
def test_two_devices_have_the_same_bits_with_every_store(world, tmp_path):
  if jax.device_count() < 2:
    pytest.skip('needs 2 devices')
  states = {}
  for name, store in (
    ('device', expert_stores.DeviceStore()),
    ('host', expert_stores.HostStore(num_slots=15)),
  ):
    states[name] = world.train(
      tmp_path / name,
      6,
      data=world.data(batch_size=2),
      store=store,
      make_mesh=functools.partial(
        partitioning.make_mesh, devices=jax.devices()[:2]
      ),
      eval_configs=[
        evaluations.QuestionEvaluation(world.data('questions'), name='qa')
      ],
      eval_period=4,
    )
  one, other = ((state.params, state.opt_state) for state in states.values())
  jax.tree.map(np.testing.assert_array_equal, one, other)
  for step in (3, 6):
    expected = _experts(tmp_path / 'device', step)
    assert _experts(tmp_path / 'host', step).tobytes() == expected.tobytes()
  (*_, last) = train_metrics.read_json_lines(
    tmp_path / 'host' / 'train_metrics.jsonl'
  )
  assert last['experts/moved_mb'] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
  'store', [expert_stores.HostStore(), expert_stores.DiskStore()]
)
def test_answers_do_not_depend_on_where_experts_are(runs, capsys, store):
  folder, _ = runs['device']
  questions = ['Who met Quimby?', 'Who met Anna in Delft?']
  expected = ask.ask(str(folder), questions, max_length=6)
  loaded = model_folder.load(str(folder), store)
  assert 'experts' not in loaded.params
  assert ask.ask(str(folder), questions, max_length=6, store=store) == expected


@pytest.mark.slow
def test_damaged_experts_are_told_in_one_line(runs, tmp_path, capsys):
  folder = tmp_path / 'copy'
  shutil.copytree(runs['device'][0], folder)
  data = folder / 'experts.0.rows'
  data.write_bytes(bytes(data.stat().st_size))
  arguments = ['ask', str(folder), 'Who met Quimby?', '--experts_on', 'disk']
  assert main.main(arguments) == 1
  (line,) = capsys.readouterr().err.splitlines()[-1:]
  assert line.startswith('mowe: Expert ') and 'other contents' in line


@pytest.mark.slow
def test_a_run_goes_on_beside_and_before_damaged_steps(world, runs, tmp_path):
  folder = tmp_path / 'copy'
  shutil.copytree(runs['disk'][0], folder)
  index = folder / 'checkpoint_3' / 'experts.0.npz'
  index.write_bytes(index.read_bytes()[:100])
  state = _train(world, folder, _TOTAL + 1, store=_DISK)
  assert int(state.step) == _TOTAL + 1
  assert (folder / 'aside_checkpoint_3' / 'experts.0.npz').exists()
  # Now the newest is damaged: only who says so goes on from the one before.
  path = folder / f'checkpoint_{_TOTAL + 1}' / 'metrics.json'
  path.write_text('{"x": 1}')
  with pytest.raises(
    manifests.DamagedCheckpointError, match='metrics.json has'
  ):
    _train(world, folder, _TOTAL + 1, store=_DISK)
  again = _train(world, folder, _TOTAL + 1, store=_DISK, back_to=train.BackTo())
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get((again.params, again.opt_state)),
    jax.device_get((state.params, state.opt_state)),
  )
  assert (folder / f'aside_checkpoint_{_TOTAL + 1}').is_dir()


def test_large_tables_are_read_from_disk(runs, monkeypatch):
  folder, _ = runs['device']
  assert 'experts' in model_folder.load(str(folder)).params
  monkeypatch.setattr(expert_stores, '_LARGE', 100)
  assert 'experts' not in model_folder.load(str(folder)).params


@pytest.mark.slow
def test_finetuning_frozen_experts_from_another_store(world, runs, tmp_path):
  folder, _ = runs['device']
  _train(
    world,
    tmp_path,
    2,
    store=_DISK,
    data=world.data('questions'),
    initial_checkpoint_path=str(folder),
    freeze_experts=True,
  )
  tuned, source = _experts(tmp_path, 2), _experts(folder, _TOTAL)
  kernels = [name for name in source.dtype.names if name[:2] == 'ke']
  # A finetuned checkpoint with frozen experts has no row state, and the same
  # kernels.
  assert list(tuned.dtype.names) == kernels
  for name in kernels:
    np.testing.assert_array_equal(tuned[name], source[name])


@pytest.mark.slow
def test_experts_on_several_devices_continue_and_move_to_one(world, tmp_path):
  make_mesh = functools.partial(
    partitioning.make_mesh, data=2, expert=2, devices=jax.devices()[:4]
  )
  straight, stopped = tmp_path / 'straight', tmp_path / 'stopped'
  changes = {'data': world.data(), 'eval_configs': ()}
  _train(world, straight, make_mesh=make_mesh, **changes)
  _train(world, stopped, 2, make_mesh=make_mesh, **changes)
  state = _train(world, stopped, make_mesh=make_mesh, **changes)
  table = state.tables['experts']['wo']
  assert table.sharding.spec[0] == 'expert'
  assert (
    table.sharding.shard_shape(table.shape)[0] == small_runs.NUM_EXPERTS // 2
  )
  assert (
    _experts(straight, _TOTAL).tobytes() == _experts(stopped, _TOTAL).tobytes()
  )
  # One device resumes, on disk, what several devices have written.
  state = _train(world, stopped, _TOTAL + 1, store=_ALL_ON_DISK, **changes)
  assert int(state.step) == _TOTAL + 1
  before, after = _experts(stopped, _TOTAL), _experts(stopped, _TOTAL + 1)
  name = 'state/experts/counts'
  assert (after[name] >= before[name]).all() and (after != before).any()


def test_two_runs_in_one_folder(world, runs):
  folder, _ = runs['disk']
  source = expert_sources.SavedExperts(folder / f'checkpoint_{_TOTAL}')
  file = row_file.RowFile(row_file.LockedFile(folder), source.index)
  with pytest.raises(row_file.TableInUseError, match='One process at a time'):
    _train(world, folder, _TOTAL + 1, store=_DISK)
  file.close()
