"""Tests checkpoints of T5X in both layouts: same bits, or a named error.

Also tests `orbax_arrays`, `t5x_legacy`, `t5x_orbax`, `t5x_tree`, and
`zarr_array`.
"""

import dataclasses
import functools
import json
import pickle

import flax
import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from mowe.interop import rules, weights
from mowe.interop.t5x import t5x_checkpoint, t5x_legacy, t5x_orbax, t5x_tree
from mowe.models.t5 import t5, t5_config
from mowe.training.optimization import optimizers

_LAYOUTS = {'legacy': t5x_legacy, 'orbax': t5x_orbax}

# A folder of golden arrays, and the parameter in the msgpack file that names
# it.
_FOLDER = 'target.decoder.layers_1.mlp.wo.kernel'
_PATH = tuple(_FOLDER.split('.'))


@pytest.fixture(params=_LAYOUTS)
def layout(request):
  return request.param


def _assert_same(actual, expected):
  assert set(actual) == set(expected)
  for path, array in expected.items():
    found, wanted = np.asarray(actual[path][...]), np.asarray(array[...])
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), path
    assert found.tobytes() == wanted.tobytes(), path


def _change(checkpoint, path, value):
  """Replaces a leaf in the msgpack file; None removes it."""
  file = checkpoint / 'checkpoint'
  tree = serialization.msgpack_restore(file.read_bytes())
  flat = flax.traverse_util.flatten_dict(
    tree['optimizer'], is_leaf=lambda _, x: 'kvstore' in x
  )
  old = flat.pop(path, None)
  if value is not None:
    flat[path] = value(old) if callable(value) else value
  tree['optimizer'] = flax.traverse_util.unflatten_dict(flat)
  file.write_bytes(serialization.msgpack_serialize(tree))


@pytest.mark.slow
def test_the_logits_are_those_of_t5x(layout, t5x_golden):
  given = t5x_checkpoint.load(t5x_golden(layout))
  assert given.config == t5_config.T5Config(11, 8, 3, 5, 7, 1, 2)
  assert given.step == 3
  params = jax.tree.map(
    lambda array: array[...],
    flax.traverse_util.unflatten_dict(dict(given.params)),
    is_leaf=lambda leaf: not isinstance(leaf, dict),
  )
  with np.load(t5x_golden.folder / 'io.npz') as io:
    apply = functools.partial(t5.T5(given.config).apply, enable_dropout=False)
    logits = jax.jit(apply)(
      {'params': params},
      io['encoder_input_tokens'],
      io['decoder_input_tokens'],
      io['decoder_target_tokens'],
    )
    np.testing.assert_allclose(logits, io['logits'], rtol=0, atol=1e-6)


def test_both_layouts_hold_the_same(t5x_golden):
  _assert_same(
    t5x_checkpoint.read(t5x_golden('orbax')),
    t5x_checkpoint.read(t5x_golden('legacy')),
  )


def test_what_is_written_is_read_again(layout, t5x_golden, tmp_path):
  given = t5x_checkpoint.load(t5x_golden(layout))
  written = t5x_checkpoint.save(tmp_path / 'run', given, _LAYOUTS[layout])
  assert written == tmp_path / 'run' / 'checkpoint_3'
  assert [one.name for one in tmp_path.iterdir()] == ['run']
  again = t5x_checkpoint.load(written)
  assert (again.config, again.step) == (given.config, given.step)
  _assert_same(again.params, given.params)
  for name in t5x_tree.MOMENTS:
    _assert_same(again.moments[name], given.moments[name])
  with pytest.raises(FileExistsError, match='run must not be there yet'):
    t5x_checkpoint.save(tmp_path / 'run', given, _LAYOUTS[layout])


def test_moments_are_those_of_our_adafactor(t5x_golden):
  given = t5x_checkpoint.load(t5x_golden('legacy'))
  optimizer = optimizers.Adafactor(0.1, min_dim_size_to_factor=6).build(None)
  state = jax.eval_shape(
    optimizer.init,
    flax.traverse_util.unflatten_dict(weights.shapes(given.config)),
  )
  for name in t5x_tree.MOMENTS:
    wanted = flax.traverse_util.flatten_dict(getattr(state, name))
    shapes = {path: leaf.shape for path, leaf in wanted.items()}
    found = {path: array.shape for path, array in given.moments[name].items()}
    assert found == shapes


def test_bfloat16(layout, t5x_golden, tmp_path):
  given = t5x_checkpoint.load(t5x_golden('legacy'))
  half = np.dtype(ml_dtypes.bfloat16)
  rounded = {
    path: weights.Cast(array, half) for path, array in given.params.items()
  }
  t5x_checkpoint.save(
    tmp_path / 'run',
    dataclasses.replace(given, params=rounded, moments=None),
    _LAYOUTS[layout],
  )
  state = t5x_checkpoint.read(tmp_path / 'run')
  assert {str(state[p].dtype) for p in state if p[0] == 'target'} == {
    'bfloat16'
  }
  again = t5x_checkpoint.load(tmp_path / 'run')
  assert again.moments is None
  _assert_same(
    again.params,
    {
      path: array[...].astype(half).astype(np.float32)
      for path, array in given.params.items()
    },
  )


@pytest.mark.slow
def test_large_arrays_are_chunked(t5x_golden, tmp_path, monkeypatch):
  monkeypatch.setattr(t5x_legacy, '_CHUNK_BYTES', 100)
  monkeypatch.setattr(weights, '_PIECE_BYTES', 90)
  given = t5x_checkpoint.load(t5x_golden('legacy'))
  written = t5x_checkpoint.save(tmp_path / 'run', given, t5x_legacy)
  # An array of 7 x 8 numbers has 224 bytes. Chunks of [7, 4] have 112 bytes,
  # and those of [4, 4] have 64.
  assert json.loads((written / _FOLDER / '.zarray').read_text())['chunks'] == [
    4,
    4,
  ]
  _assert_same(t5x_checkpoint.load(written).params, given.params)


def test_a_checkpoint_of_a_bucket(t5x_golden):
  checkpoint = t5x_golden('legacy') / 'checkpoint_3'
  expected = t5x_checkpoint.read(checkpoint)[_PATH][...]
  # Released checkpoints have the path beside the store.
  _change(
    checkpoint,
    _PATH,
    lambda spec: (
      spec
      | {
        'kvstore': {'driver': 'gcs', 'bucket': 't5x-dummy-bucket'},
        'path': _FOLDER,
      }
    ),
  )
  np.testing.assert_array_equal(
    t5x_checkpoint.read(checkpoint)[_PATH][...], expected
  )


def test_the_latest_of_a_run_is_taken(t5x_golden):
  run = t5x_golden('legacy')
  (run / 'checkpoint_3').rename(run / 'checkpoint_20')
  (run / 'checkpoint_100').mkdir()
  (run / 'checkpoint_200.tmp-17').mkdir()
  assert t5x_checkpoint.find(run).name == 'checkpoint_20'
  with pytest.raises(FileNotFoundError, match='checkpoint_100 must be a check'):
    t5x_checkpoint.load(run / 'checkpoint_100')


def test_another_optimizer_is_left_out(t5x_golden):
  checkpoint = t5x_golden('legacy') / 'checkpoint_3'
  _change(
    checkpoint,
    ('state', 'param_states', '0', 'mu', 'x'),
    np.zeros(3, np.float32),
  )
  given = t5x_checkpoint.load(checkpoint)
  assert given.moments is None
  assert given.has_other_state


def test_a_state_of_adafactor_must_be_whole(t5x_golden):
  checkpoint = t5x_golden('legacy') / 'checkpoint_3'
  state = t5x_checkpoint.read(checkpoint)
  name = ('state', 'param_states', 'decoder', 'decoder_norm', 'scale', 'v')
  others = {path: array for path, array in state.items() if path != name}
  with pytest.raises(
    ValueError, match='must be that of all .*/v are not there'
  ):
    t5x_tree.to_weights(others)
  for wrong in (np.zeros(3, np.float32), np.zeros(()), np.zeros((1, 1))):
    with pytest.raises(ValueError, match='must be a part of its state of Adaf'):
      t5x_tree.to_weights(state | {name: wrong})
  for moment in ('v_row', 'v_col'):
    wrong = {(*name[:-1], moment): np.zeros(7)}
    with pytest.raises(ValueError, match=rf'{moment} of .* has \[7\]. The ch'):
      t5x_tree.to_weights(state | wrong)


@pytest.mark.parametrize(
  'step', [np.int32(-1), np.float32(1), np.zeros(3, np.int32), np.int64(2**31)]
)
def test_a_step_must_be_a_number_of_updates(step, t5x_golden):
  state = t5x_checkpoint.read(t5x_golden('legacy') / 'checkpoint_3')
  with pytest.raises(ValueError, match='must be a number of updates, from 0'):
    t5x_tree.to_weights(state | {('state', 'step'): np.asarray(step)})


def test_a_model_has_no_more_blocks_than_arrays():
  config = dataclasses.replace(
    t5x_tree.RELEASED['t5_1_1_small'], num_encoder_layers=3000
  )
  with pytest.raises(ValueError, match='there are 0 arrays for 3,008 blocks'):
    weights.for_model({}, config, 'config.json')


@pytest.mark.slow
@pytest.mark.parametrize('name', t5x_tree.RELEASED)
def test_sizes_of_released_models_follow_from_shapes(name):
  config = t5x_tree.RELEASED[name]
  found = t5x_tree.infer_config(weights.shapes(config))
  assert found == config
  assert t5x_tree.released_name(found) == name


def test_t5_of_1_0_is_recognised():
  config = t5_config.T5Config(
    13, 6, 2, 5, 7, 2, 1, mlp_activations=('relu',), logits_via_embedding=True
  )
  assert t5x_tree.infer_config(weights.shapes(config)) == config
  assert t5x_tree.released_name(config) is None


def test_parameters_that_do_not_fit_are_listed(t5x_golden):
  checkpoint = t5x_golden('legacy') / 'checkpoint_3'
  _change(checkpoint, _PATH, None)
  _change(checkpoint, ('target', 'more', 'scale'), np.zeros(2, np.float32))
  scale = ('target', 'decoder', 'decoder_norm', 'scale')
  _change(checkpoint, scale, np.zeros(9, np.float32))
  with pytest.raises(
    ValueError,
    match=r'missing: decoder/layers_1/mlp/wo/kernel; too many: more/scale; of '
    r'another shape: decoder/decoder_norm/scale \[9\] instead of \[8\]',
  ):
    t5x_checkpoint.load(checkpoint)


def test_scanned_layers_are_refused(t5x_golden):
  checkpoint = t5x_golden('legacy') / 'checkpoint_3'
  query = ('target', 'encoder', 'layers_0', 'attention', 'query', 'kernel')
  _change(checkpoint, query, np.zeros((8, 1, 15), np.float32))
  with pytest.raises(ValueError, match=r'but is \[8, 1, 15\]. Layers that are'):
    t5x_checkpoint.load(checkpoint)


@pytest.mark.parametrize('outside', ['../other', '/etc', '..', 'a/../../b', ''])
def test_a_spec_names_folders_beside_it(outside, t5x_golden):
  checkpoint = t5x_golden('legacy') / 'checkpoint_3'
  _change(
    checkpoint,
    _PATH,
    lambda spec: spec | {'kvstore': {'driver': 'file', 'path': outside}},
  )
  with pytest.raises(ValueError, match='must name folders beside it'):
    t5x_checkpoint.load(checkpoint)


def _remove_chunk(folder):
  (folder / _FOLDER / '0.0').unlink()


def _cut_chunk(folder):
  content = (folder / _FOLDER / '0.0').read_bytes()
  (folder / _FOLDER / '0.0').write_bytes(content[:-9])


def _flip_bit(folder):
  content = bytearray((folder / _FOLDER / '0.0').read_bytes())
  content[len(content) // 2] ^= 4
  (folder / _FOLDER / '0.0').write_bytes(content)


def _cut_metadata(folder):
  (folder / _FOLDER / '.zarray').write_text('{"zarr_format": 2,')


@pytest.mark.parametrize(
  'damage', [_remove_chunk, _cut_chunk, _flip_bit, _cut_metadata]
)
def test_damaged_arrays_are_errors(damage, t5x_golden):
  checkpoint = t5x_golden('legacy') / 'checkpoint_3'
  damage(checkpoint)
  with pytest.raises(ValueError, match='wo.kernel must be a whole zarr array'):
    t5x_checkpoint.read(checkpoint)[_PATH][...]


def test_damaged_trees_are_errors(t5x_golden):
  checkpoint = t5x_golden('legacy') / 'checkpoint_3'
  file = checkpoint / 'checkpoint'
  content = file.read_bytes()
  for wrong, text in (
    (content[:-100], 'must be msgpack, as t5x writes it, but reading it'),
    (b'', 'must be msgpack'),
    (pickle.dumps({'version': 3}), 'is a pickle, which can run any code'),
    (serialization.msgpack_serialize({'version': 1}), 'is of version 1'),
    (serialization.msgpack_serialize({}), 'is of version None'),
  ):
    file.write_bytes(wrong)
    with pytest.raises(ValueError, match=text):
      t5x_checkpoint.load(checkpoint)
  file.write_bytes(content)
  _change(checkpoint, _PATH, np.zeros((7, 8), np.uint16))
  with pytest.raises(ValueError, match='wo/kernel of .* is uint16. Save it in'):
    t5x_checkpoint.load(checkpoint)


def test_a_missing_folder_is_an_error(t5x_golden):
  checkpoint = t5x_golden('legacy') / 'checkpoint_3'
  (checkpoint / _FOLDER).rename(checkpoint / 'away')
  with pytest.raises(FileNotFoundError, match='Fetch the rest of the check'):
    t5x_checkpoint.load(checkpoint)


def test_half_an_orbax_checkpoint_is_an_error(t5x_golden):
  checkpoint = t5x_golden('orbax') / 'checkpoint_3'
  state = checkpoint / 'state'
  expected = t5x_checkpoint.read(checkpoint)

  def cut(files):
    """Whether reading fails if these files are cut in half.

    If it does not fail, it must read what was there before.
    """
    contents = {file: file.read_bytes() for file in files}
    for file, content in contents.items():
      file.write_bytes(content[: len(content) // 2])
    try:
      _assert_same(t5x_checkpoint.read(checkpoint), expected)
      return False
    except ValueError as error:
      assert 'fetch it again' in str(error)
      return True
    finally:
      for file, content in contents.items():
        file.write_bytes(content)

  assert cut([state / '_METADATA'])
  nodes = [path for path in state.rglob('*') if path.parent.name == 'd']
  assert cut(nodes)
  # Some nodes of the tree were written again later, so old ones are not read.
  assert any([cut([node]) for node in nodes])
  (state / 'manifest.ocdbt').unlink()
  with pytest.raises(ValueError, match='must be a whole zarr array'):
    t5x_checkpoint.load(checkpoint)


def test_names_of_orbax_are_plain(t5x_golden):
  checkpoint = t5x_golden('orbax') / 'checkpoint_3'
  file = checkpoint / 'state' / '_METADATA'
  text = file.read_text()
  assert text.count('"key": "token_embedder"')
  file.write_text(
    text.replace('"key": "token_embedder"', '"key": "../../token"')
  )
  with pytest.raises(
    ValueError, match="must name arrays beside it, but has '../../"
  ):
    t5x_checkpoint.load(checkpoint)


def test_nothing_is_left_of_a_failure(t5x_golden, tmp_path):
  given = t5x_checkpoint.load(t5x_golden('legacy'))
  _cut_chunk(t5x_golden('legacy') / 'checkpoint_3')
  with pytest.raises(ValueError, match='must be a whole zarr array'):
    t5x_checkpoint.save(tmp_path / 'run', given, t5x_legacy)
  assert not list(tmp_path.iterdir())


def test_names_of_our_t5_are_those_of_t5x(t5x_golden):
  state = t5x_checkpoint.read(t5x_golden('legacy'))
  given = t5x_tree.to_weights(state)
  rules.check_names(
    {'/'.join(path): array for path, array in given.params.items()},
    {'/'.join(path[1:]): state[path] for path in state if path[0] == 'target'},
  )


def test_two_arrays_cannot_share_a_folder(t5x_golden):
  checkpoint = t5x_golden('legacy') / 'checkpoint_3'
  file = checkpoint / 'checkpoint'
  spec = serialization.msgpack_restore(file.read_bytes())['optimizer']
  for name in _PATH:
    spec = spec[name]
  _change(checkpoint, (*_PATH[:-1], 'other'), spec)
  with pytest.raises(ValueError, match='must name a folder for every array, b'):
    t5x_checkpoint.read(checkpoint)
