"""Tests checkpoints: same bits, damage found, kills survived, steps kept.

Also tests `manifests`.
"""

import json
import pathlib
import subprocess
import sys
import textwrap

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mowe.training import checkpointing, manifests

_SPEC = jax.sharding.PartitionSpec


class _State(flax.struct.PyTreeNode):
  step: jax.Array
  params: dict
  opt_state: optax.OptState
  tables: dict


def _state(seed=0, embed=3):
  key = jax.random.key(seed)
  params = {
    'mlp': {'kernel': jax.random.normal(key, (embed, 5))},
    'norm': {'scale': jnp.ones(embed, jnp.bfloat16) / 3},
  }
  optimizer = optax.multi_transform(
    {'train': optax.adam(0.1), 'frozen': optax.set_to_zero()},
    {'mlp': {'kernel': 'train'}, 'norm': {'scale': 'frozen'}},
  )
  tables = {'experts': {'wi': jax.random.normal(key, (8, embed, 2))}}
  return _State(jnp.int32(seed), params, optimizer.init(params), tables)


def _assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for one, other in pairs:
    assert one.dtype == other.dtype
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def _abstract(state):
  return jax.eval_shape(lambda: state)


@pytest.fixture
def saved(tmp_path):
  """A folder of checkpoints with steps 1 and 2."""
  with checkpointing.Checkpoints(tmp_path / 'run') as checkpoints:
    for step in (1, 2):
      metadata = {'vocabulary': 'abc', 'config': {'embed': 3, 'layers': [1]}}
      assert checkpoints.save(step, _state(step), metadata=metadata)
    checkpoints.wait()
    yield checkpoints


def test_round_trip_has_the_same_bits(saved):
  assert saved.all_steps() == [1, 2]
  _assert_same_bits(saved.restore(_abstract(_state())), _state(2))
  _assert_same_bits(saved.restore(_abstract(_state()), step=1), _state(1))
  # The abstract state may also be a state of arrays.
  _assert_same_bits(saved.restore(_state()), _state(2))


def test_only_some_parts(saved):
  state = _state()
  parts = {'params': state.params, 'tables': state.tables}
  restored = saved.restore_parameters(_abstract(parts))
  expected = _state(2)
  _assert_same_bits(
    restored, {'params': expected.params, 'tables': expected.tables}
  )


def test_restores_onto_other_devices(saved):
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices: jax_num_cpu_devices=8')
  mesh = jax.make_mesh((8,), ('expert',), (jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, _SPEC('expert'))
  everywhere = jax.sharding.NamedSharding(mesh, _SPEC())
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=split if x.shape[:1] == (8,) else everywhere
    ),
    _abstract(_state()),
  )
  restored = saved.restore(abstract)
  _assert_same_bits(restored, _state(2))
  assert restored.tables['experts']['wi'].sharding == split
  # The state goes back from eight devices to one.
  saved.save(3, restored)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), abstract
  )
  again = saved.restore(abstract, step=3)
  _assert_same_bits(again, _state(2))
  assert again.tables['experts']['wi'].sharding == one


def test_state_may_be_donated_right_after_save(tmp_path):
  state = {'w': jnp.arange(1000.0)}
  with checkpointing.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    jax.jit(lambda w: w * 0, donate_argnums=0)(state['w'])
    restored = checkpoints.restore({'w': jax.ShapeDtypeStruct((1000,), 'f4')})
  np.testing.assert_array_equal(restored['w'], np.arange(1000.0))


def _largest_file(checkpoints, step):
  folder = checkpoints.folder / f'checkpoint_{step}' / 'state'
  files = [path for path in folder.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def test_every_flipped_byte_is_found(saved):
  folder = saved.folder / 'checkpoint_2'
  files = [path for path in folder.rglob('*') if path.is_file()]
  assert len(files) > 5
  for path in files:
    data = bytearray(path.read_bytes())
    if path.name == manifests.FILE_NAME or not data:
      continue
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    name = path.relative_to(folder).as_posix()
    with pytest.raises(
      checkpointing.DamagedCheckpointError,
      match=f'{name} has other contents',
    ):
      saved.restore(_abstract(_state()))
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
  _assert_same_bits(saved.restore(_abstract(_state())), _state(2))


def test_truncated_missing_and_foreign_files_are_found(saved):
  error = checkpointing.DamagedCheckpointError
  path = _largest_file(saved, 2)
  data = path.read_bytes()
  path.write_bytes(data[:-1])
  with pytest.raises(error, match='restore another step'):
    saved.restore_parameters({'params': _abstract(_state().params)})
  path.unlink()
  with pytest.raises(error, match=f'{path.name} is missing'):
    saved.restore(_abstract(_state()))
  path.write_bytes(data)
  (path.parent / 'foreign').write_text('x')
  with pytest.raises(error, match='foreign is not in it'):
    saved.restore(_abstract(_state()))
  (saved.folder / 'checkpoint_2' / 'manifest.json').write_text('{')
  with pytest.raises(error, match='manifest.json cannot be read'):
    saved.restore(_abstract(_state()))
  # The checkpoint of the step before is still good.
  _assert_same_bits(saved.restore(_abstract(_state()), step=1), _state(1))


def test_an_older_damaged_step_is_set_aside(saved, capsys):
  (saved.folder / 'checkpoint_1' / 'metrics.json').write_text('{"x": 1}')
  saved.set_aside_damaged('*.npz')
  assert saved.all_steps() == [1, 2]
  saved.set_aside_damaged('metrics.*')
  assert saved.all_steps() == [2]
  said = capsys.readouterr().out
  assert 'metrics.json has other contents' in said
  assert 'It is set aside as aside_checkpoint_1.' in said
  assert (saved.folder / 'aside_checkpoint_1' / 'metrics.json').exists()
  # The latest is left to those who restore it.
  (saved.folder / 'checkpoint_2' / 'metrics.json').write_text('{"x": 1}')
  saved.set_aside_damaged('*')
  assert saved.all_steps() == [2]
  with pytest.raises(checkpointing.NoCheckpointError, match=r'\[2\] none is'):
    saved.go_back(None)


def test_going_back_keeps_what_is_later(saved, capsys):
  with pytest.raises(checkpointing.NoCheckpointError, match='of step 7'):
    saved.go_back(7)
  (saved.folder / 'checkpoint_2' / 'metadata.json').write_text('{}')
  with pytest.raises(
    checkpointing.DamagedCheckpointError, match='metadata.json has other'
  ):
    saved.check_metadata({})
  saved.go_back(None)
  assert saved.latest_step() == 1
  assert 'Step 2 is set aside as aside_checkpoint_2' in capsys.readouterr().out
  assert (saved.folder / 'aside_checkpoint_2').is_dir()
  _assert_same_bits(saved.restore(_abstract(_state())), _state(1))
  # A second one of the same step has a name of its own.
  saved.save(2, _state(2), metadata={}, metrics={})
  saved.wait()
  saved.go_back(1)
  assert (saved.folder / 'aside_checkpoint_2_2').is_dir()


def test_without_manifest_a_checkpoint_is_unfinished(saved):
  (saved.folder / 'checkpoint_2' / 'manifest.json').unlink()
  assert saved.latest_step() == 1
  _assert_same_bits(saved.restore(_abstract(_state())), _state(1))
  with pytest.raises(checkpointing.NoCheckpointError, match='of step 2'):
    saved.restore(_abstract(_state()), step=2)
  # The step can be saved again, which removes what was left of it.
  assert saved.save(2, _state(7))
  _assert_same_bits(saved.restore(_abstract(_state())), _state(7))


def test_killed_while_saving(tmp_path):
  script = textwrap.dedent(f"""
      import os
      import jax.numpy as jnp
      from mowe.training import checkpointing
      run = checkpointing.Checkpoints({str(tmp_path)!r})
      run.save(1, {{'w': jnp.ones(10)}})
      run.wait()
      run.save(2, {{'w': jnp.ones(10)}})
      os._exit(9)  # This acts like a kill: no thread reaches its end.
  """)
  root = pathlib.Path(__file__).parents[2]
  result = subprocess.run(
    [sys.executable, '-c', script], cwd=root, timeout=300, check=False
  )
  assert result.returncode == 9
  with checkpointing.Checkpoints(tmp_path) as checkpoints:
    steps = checkpoints.all_steps()
    assert 1 in steps
    restored = checkpoints.restore({'w': jax.ShapeDtypeStruct((10,), 'f4')})
    np.testing.assert_array_equal(restored['w'], np.ones(10))
    checkpoints.save(3, {'w': jnp.ones(10)})
    checkpoints.wait()
    # All folders that were half written are gone.
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f'checkpoint_{step}' for step in (*steps, 3)}


@pytest.mark.parametrize('mode, best', [('max', 2), ('min', 1)])
def test_keeps_the_last_and_the_best(tmp_path, mode, best):
  scores = {1: 0.1, 2: 0.9, 3: float('nan'), 4: 0.3, 5: 0.2}
  with checkpointing.Checkpoints(tmp_path, 2, 'em', mode) as checkpoints:
    assert checkpoints.best_step() is None
    for step, score in scores.items():
      checkpoints.save(
        step, {'w': jnp.ones(2)}, metrics={'em': np.float32(score)}
      )
    checkpoints.wait()
    assert checkpoints.all_steps() == [best, 4, 5]
    assert checkpoints.best_step() == best
    assert checkpoints.metrics(4)['em'] == pytest.approx(0.3)
    with pytest.raises(ValueError, match='or with metrics=None'):
      checkpoints.save(6, {'w': jnp.ones(2)}, metrics={'f1': 1.0})


def test_nothing_there(tmp_path):
  checkpoints = checkpointing.Checkpoints(tmp_path / 'absent')
  assert checkpoints.latest_step() is None
  with pytest.raises(checkpointing.NoCheckpointError, match='Check the path'):
    checkpoints.restore({})


def test_another_model_size_names_the_parameters(saved):
  with pytest.raises(
    checkpointing.CheckpointMismatchError,
    match=r'mu/mlp/kernel: \(3, 5\) there, \(4, 5\) here.* and \d more',
  ):
    saved.restore(_abstract(_state(embed=4)))
  with pytest.raises(
    checkpointing.CheckpointMismatchError,
    match=r'params/mlp/bias: absent there, \(2,\) here',
  ):
    extra = jax.ShapeDtypeStruct((2,), 'f4')
    saved.restore_parameters({'params': {'mlp': {'bias': extra}}})
  with pytest.raises(
    checkpointing.CheckpointMismatchError, match='there, absent here'
  ):
    saved.restore(_abstract(_state().replace(tables={})))


def test_metadata_is_compared_by_name(saved):
  saved.check_metadata({'vocabulary': 'abc', 'config': {'layers': (1,)}})
  with pytest.raises(
    checkpointing.CheckpointMismatchError,
    match="config.embed: 3 then, 4 now; vocabulary: 'abc' then, 'abd' now",
  ):
    saved.check_metadata({'vocabulary': 'abd', 'config': {'embed': 4}})
  with pytest.raises(
    checkpointing.CheckpointMismatchError,
    match=r"data: '\(nothing\)' then, 'x' now.* another folder for a new run",
  ):
    saved.check_metadata({'data': 'x'})
  text = (saved.folder / 'checkpoint_1' / 'metadata.json').read_text()
  assert json.loads(text) == saved.metadata(1)


def test_a_folder_with_another_run_is_refused(saved):
  assert not saved.save(2, _state(2))  # This step is saved already.
  with checkpointing.Checkpoints(saved.folder) as other:
    for step in (0, 2):
      with pytest.raises(
        checkpointing.CheckpointMismatchError, match='give another folder'
      ):
        other.save(step, _state())
    other.restore(_abstract(_state()))
    assert not other.save(2, _state(2))
    assert other.save(3, _state(3))


def test_what_goes_wrong_in_the_background_is_raised(tmp_path, monkeypatch):
  def fail(unused_folder):
    raise OSError('disk full')

  with checkpointing.Checkpoints(tmp_path) as checkpoints:
    monkeypatch.setattr(manifests, 'write', fail)
    checkpoints.save(1, {'w': jnp.ones(2)})
    with pytest.raises(OSError, match='disk full'):
      checkpoints.wait()
    assert checkpoints.latest_step() is None


def test_settings_are_checked(tmp_path):
  with pytest.raises(ValueError, match='Take None to keep all'):
    checkpointing.Checkpoints(tmp_path, keep_last=0)
  with pytest.raises(ValueError, match="Take 'min' for a loss"):
    checkpointing.Checkpoints(tmp_path, best_mode='maximum')


def test_typed_random_keys_are_kept(tmp_path):
  state = {'key': jax.random.key(3)}
  with checkpointing.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    restored = checkpoints.restore(_abstract(state))
  assert restored['key'].dtype == state['key'].dtype
  np.testing.assert_array_equal(
    jax.random.key_data(restored['key']), jax.random.key_data(state['key'])
  )
