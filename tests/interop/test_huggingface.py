"""Tests Hugging Face checkpoints: same bits, complete or not written at all."""

import dataclasses
import functools
import json
import re

import flax
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from mowe.interop import huggingface, huggingface_config, safetensors_format
from mowe.models import parameters
from mowe.models.families import saved_config
from mowe.models.t5 import t5, t5_config

_NAMES = ('t5', 'switch')
_EMBEDDING = ('token_embedder', 'embedding')
_HEAD = ('decoder', 'logits_dense', 'kernel')

_TIED = t5_config.T5Config(
  vocab_size=13,
  emb_dim=6,
  num_heads=2,
  head_dim=5,
  mlp_dim=7,
  num_encoder_layers=1,
  num_decoder_layers=2,
  mlp_activations=('relu',),
  logits_via_embedding=True,
)


@pytest.fixture(params=_NAMES)
def golden(request, golden_dir):
  return golden_dir / f'hf_{request.param}_tiny'


@pytest.fixture
def t5_folder(golden_dir):
  return golden_dir / 'hf_t5_tiny'


def _params(config, dtype=np.float32):
  """Parameters without two equal numbers, all of which `dtype` can hold."""
  shapes = jax.eval_shape(
    lambda key: parameters.initial_variables(t5.T5(config), key),
    jax.random.key(0),
  )['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(dtype).astype(np.float32), shapes
  )


def _assert_same(actual, expected):
  actual = flax.traverse_util.flatten_dict(actual)
  expected = flax.traverse_util.flatten_dict(expected)
  assert set(actual) == set(expected)
  for name, value in expected.items():
    assert actual[name].dtype == value.dtype
    assert actual[name].shape == value.shape
    assert actual[name].tobytes() == value.tobytes(), name


def _logits(config, params, io):
  inputs, targets = io['input_ids'], io['decoder_input_ids']
  real = io['attention_mask'].astype(bool)
  apply = functools.partial(t5.T5(config).apply, enable_dropout=False)
  return jax.jit(apply)(
    {'params': params},
    np.where(real, inputs, 0),
    targets,
    np.ones_like(targets),
  )


@pytest.mark.slow
def test_tensors_of_transformers_come_back(golden, tmp_path):
  config, params = huggingface.load(golden)
  huggingface.save(tmp_path / 'a', config, params)
  written = tmp_path / 'a' / 'model.safetensors'
  _assert_same(
    safetensors.load_file(written),
    safetensors.load_file(golden / 'model.safetensors'),
  )


@pytest.mark.slow
def test_what_is_written_has_the_logits_of_transformers(golden, tmp_path):
  config, params = huggingface.load(golden)
  huggingface.save(
    tmp_path / 'a', config, jax.tree.map(jax.numpy.asarray, params)
  )
  again, params_again = huggingface.load(tmp_path / 'a')
  assert saved_config.to_json(again) == saved_config.to_json(config)
  _assert_same(params_again, params)
  with np.load(golden / 'io.npz') as io:
    logits = _logits(again, params_again, io)
    expected = io['logits']
  np.testing.assert_allclose(
    logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )


@pytest.mark.slow
def test_bfloat16_in_parts(golden, tmp_path):
  config, params = huggingface.load(golden)
  huggingface.save(
    tmp_path / 'a', config, params, dtype='bfloat16', max_file_bytes=20000
  )
  files = sorted((tmp_path / 'a').glob('model-*.safetensors'))
  assert len(files) > 5
  tensors = {}
  for file in files:
    tensors |= safetensors_format.read(file)
  assert {x.dtype for x in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
  rounded = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params
  )
  again, read = huggingface.load(tmp_path / 'a')
  _assert_same(read, rounded)
  # What was rounded to bfloat16 once is not changed by rounding again.
  huggingface.save(tmp_path / 'b', again, read, dtype='bfloat16')
  _assert_same(
    safetensors_format.read(tmp_path / 'b' / 'model.safetensors'), tensors
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'change',
  [
    {},
    {'mlp_activations': ('gelu', 'linear'), 'logits_via_embedding': False},
    {'mlp_activations': ('silu', 'linear'), 'vocab_size': 384},
  ],
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_versions_of_t5_come_back(change, dtype, tmp_path):
  config = dataclasses.replace(_TIED, **change)
  params = _params(config, huggingface.DTYPES[dtype])
  huggingface.save(tmp_path / 'a', config, params, dtype=dtype)
  again, read = huggingface.load(tmp_path / 'a')
  assert again == config
  _assert_same(read, params)


@pytest.mark.slow
@pytest.mark.parametrize('is_tied', [False, True])
def test_a_switch_with_biases_comes_back(is_tied, tmp_path):
  config = huggingface_config.make_config(
    {
      'model_type': 'switch_transformers',
      'vocab_size': 13,
      'd_model': 6,
      'num_heads': 2,
      'd_kv': 5,
      'd_ff': 7,
      'num_layers': 3,
      'num_decoder_layers': 2,
      'num_experts': 11,
      'expert_capacity': 4,
      'encoder_sparse_step': 3,
      'decoder_sparse_step': 0,
      'router_bias': True,
      'tie_word_embeddings': is_tied,
    }
  )
  params = _params(config)
  huggingface.save(tmp_path / 'a', config, params)
  again, read = huggingface.load(tmp_path / 'a')
  assert saved_config.to_json(again) == saved_config.to_json(config)
  _assert_same(read, params)
  tensors = safetensors.load_file(tmp_path / 'a' / 'model.safetensors')
  mlp = params['encoder']['layers_1']['mlp']
  block = 'encoder.block.1.layer.1.mlp'
  np.testing.assert_array_equal(
    tensors[f'{block}.experts.expert_10.wi.weight'],
    mlp['expert']['wi']['kernel'][10].T,
  )
  np.testing.assert_array_equal(
    tensors[f'{block}.router.classifier.bias'],
    mlp['router']['router_weights']['w']['bias'],
  )
  # If embeddings are tied transformers writes one array, otherwise four.
  copies = {'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'}
  names = copies | {'lm_head.weight', 'shared.weight'}
  expected = {'shared.weight'} if is_tied else names
  assert names & set(tensors) == expected


def _copy(source, target, change=None, drop=(), add=None):
  """A copy of a checkpoint with other tensors or another config."""
  described = json.loads((source / 'config.json').read_text())
  target.mkdir()
  (target / 'config.json').write_text(json.dumps(described | (change or {})))
  tensors = safetensors.load_file(source / 'model.safetensors')
  tensors = {n: x for n, x in tensors.items() if n not in drop} | (add or {})
  safetensors.save_file(tensors, target / 'model.safetensors')
  return target


@pytest.mark.slow
def test_tensors_that_are_missing_or_left_over_are_listed(t5_folder, tmp_path):
  norm = 'encoder.final_layer_norm.weight'
  with pytest.raises(ValueError, match=f'but are missing: {norm}. Take both'):
    huggingface.load(_copy(t5_folder, tmp_path / 'a', drop=[norm]))
  extra = {'encoder.bias': np.zeros(2, np.float32)}
  with pytest.raises(ValueError, match='no rule is for encoder.bias. Take'):
    huggingface.load(_copy(t5_folder, tmp_path / 'b', add=extra))
  message = 'missing: encoder.block.2.layer.0.SelfAttention.k.weight, enc.*Take'
  with pytest.raises(ValueError, match=message):
    huggingface.load(_copy(t5_folder, tmp_path / 'c', {'num_layers': 3}))
  message = 'too many: encoder.block.1.layer.0.SelfAttention.k.weight, enc'
  with pytest.raises(ValueError, match=message):
    huggingface.load(_copy(t5_folder, tmp_path / 'd', {'num_layers': 1}))
  plain = {
    'feed_forward_proj': 'relu',
    'dense_act_fn': 'relu',
    'is_gated_act': False,
  }
  message = 'missing: decoder.block.0.layer.2.DenseReluDense.wi.weight, .*too '
  with pytest.raises(ValueError, match=message):
    huggingface.load(_copy(t5_folder, tmp_path / 'e', plain))


def test_more_blocks_than_tensors_are_refused_at_once(t5_folder, tmp_path):
  many = {'num_layers': 2**24}
  with pytest.raises(ValueError, match='16777219 blocks for 66 tensors. Take'):
    huggingface.load(_copy(t5_folder, tmp_path / 'a', many))


def test_other_shapes_are_refused(t5_folder, tmp_path):
  message = re.escape('another shape: lm_head.weight [96, 32] instead of [100,')
  with pytest.raises(ValueError, match=message):
    huggingface.load(_copy(t5_folder, tmp_path / 'a', {'vocab_size': 100}))
  name = 'encoder.block.0.layer.1.DenseReluDense.wo.weight'
  turned = {name: np.zeros((48, 32), np.float32)}
  message = re.escape(f'{name} [48, 32] instead of [32, 48]. Take')
  with pytest.raises(ValueError, match=message):
    huggingface.load(_copy(t5_folder, tmp_path / 'b', add=turned))


def test_experts_that_are_missing_are_listed(golden_dir, tmp_path):
  folder = golden_dir / 'hf_switch_tiny'
  name = 'encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight'
  with pytest.raises(ValueError, match=f'but are missing: {name}. Take'):
    huggingface.load(_copy(folder, tmp_path / 'a', drop=[name]))
  more = {name.replace('_2', '_7'): np.zeros((48, 32), np.float32)}
  with pytest.raises(ValueError, match='too many: .*expert_7.wi.weight. Take'):
    huggingface.load(_copy(folder, tmp_path / 'b', add=more))
  # Our models share the embedding of both stacks, so separate ones are refused.
  other = {'encoder.embed_tokens.weight': np.zeros((96, 32), np.float32)}
  with pytest.raises(ValueError, match='embed_tokens.weight must equal shared'):
    huggingface.load(_copy(folder, tmp_path / 'c', add=other))
  # transformers does not tie a Switch unless its config says so.
  with pytest.raises(ValueError, match='missing: lm_head.weight. Take'):
    huggingface.load(_copy(folder, tmp_path / 'd', drop=['lm_head.weight']))


def test_scaled_logits_need_a_tied_head(t5_folder, tmp_path):
  scaled = {'scale_decoder_outputs': True}
  with pytest.raises(ValueError, match='lm_head.weight must equal shared.weig'):
    huggingface.load(_copy(t5_folder, tmp_path / 'a', scaled))
  config, params = huggingface.load(
    _copy(t5_folder, tmp_path / 'b', scaled, drop=['lm_head.weight'])
  )
  assert config.logits_via_embedding
  assert 'logits_dense' not in params['decoder']


@pytest.mark.parametrize('kept', ['shared.weight', 'lm_head.weight'])
def test_without_scaling_one_array_is_read_for_both(kept, t5_folder, tmp_path):
  """transformers 5 ties every T5, and may write either of the tied arrays."""
  both = {'shared.weight', 'lm_head.weight'}
  folder = _copy(
    t5_folder,
    tmp_path / 'a',
    {'tie_word_embeddings': True},
    drop=both - {kept},
  )
  config, params = huggingface.load(folder)
  assert not config.logits_via_embedding
  array = safetensors.load_file(folder / 'model.safetensors')[kept]
  flat = flax.traverse_util.flatten_dict(params)
  np.testing.assert_array_equal(flat[_EMBEDDING], array)
  np.testing.assert_array_equal(flat[_HEAD], array.T)


def test_copies_and_what_no_model_reads_may_be_there(t5_folder, tmp_path):
  shared = safetensors.load_file(t5_folder / 'model.safetensors')[
    'shared.weight'
  ]
  attention = 'decoder.block.0.layer.1.EncDecAttention'
  more = {
    'encoder.embed_tokens.weight': shared,
    'decoder.embed_tokens.weight': shared,
    f'{attention}.relative_attention_bias.weight': np.ones((3, 2), np.float32),
  }
  _, expected = huggingface.load(t5_folder)
  _, actual = huggingface.load(_copy(t5_folder, tmp_path / 'a', add=more))
  _assert_same(actual, expected)
  # Some checkpoints have the embedding only under its other names.
  folder = _copy(t5_folder, tmp_path / 'b', add=more, drop=['shared.weight'])
  _assert_same(huggingface.load(folder)[1], expected)


def test_parameters_of_another_model_are_refused(tmp_path):
  params = _params(_TIED)
  deeper = dataclasses.replace(_TIED, num_encoder_layers=2)
  name = 'encoder.block.1.layer.0.SelfAttention.k.weight'
  with pytest.raises(ValueError, match=f'missing: {name}, '):
    huggingface.save(tmp_path / 'a', deeper, params)
  params['encoder']['bias'] = np.zeros(3, np.float32)
  with pytest.raises(ValueError, match='but encoder/bias matches none. The'):
    huggingface.save(tmp_path / 'a', _TIED, params)
  assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_and_other_dtypes_are_refused(tmp_path):
  params = _params(_TIED)
  with pytest.raises(FileExistsError, match='must not be there yet, but is. C'):
    huggingface.save(tmp_path, _TIED, params)
  with pytest.raises(ValueError, match="but is 'float16'. float16 cannot"):
    huggingface.save(tmp_path / 'a', _TIED, params, dtype='float16')
  assert not list(tmp_path.iterdir())
