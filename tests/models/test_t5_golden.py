"""Dense T5 against arrays computed by Hugging Face transformers."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from mowe.models import t5


@pytest.fixture(scope='module')
def case(golden_dir):
  folder = golden_dir / 'hf_t5_tiny'
  return (
    json.loads((folder / 'config.json').read_text()),
    safetensors.load_file(folder / 'model.safetensors'),
    dict(np.load(folder / 'io.npz')),
    json.loads((folder / 'grad_norms.json').read_text()),
  )


def hf_name(path: tuple[str, ...]) -> str:
  """Name of the transformers tensor that holds the parameter at `path`."""
  if path == ('token_embedder', 'embedding'):
    return 'shared.weight'
  if path == ('decoder', 'logits_dense', 'kernel'):
    return 'lm_head.weight'
  stack, *rest = path
  if rest[0] == 'relpos_bias':
    return (
      f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    )
  if rest[0].endswith('_norm'):
    return f'{stack}.final_layer_norm.weight'
  block = f'{stack}.block.{rest[0].removeprefix("layers_")}.layer'
  mlp = 1 if stack == 'encoder' else 2
  part = {
    'attention': '0.SelfAttention',
    'self_attention': '0.SelfAttention',
    'encoder_decoder_attention': '1.EncDecAttention',
    'mlp': f'{mlp}.DenseReluDense',
    'pre_attention_layer_norm': '0.layer_norm',
    'pre_self_attention_layer_norm': '0.layer_norm',
    'pre_cross_attention_layer_norm': '1.layer_norm',
    'pre_mlp_layer_norm': f'{mlp}.layer_norm',
  }[rest[1]]
  if rest[1].endswith('norm'):
    return f'{block}.{part}.weight'
  short = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
  return f'{block}.{part}.{short.get(rest[2], rest[2])}.weight'


def to_ours(tensor: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
  transposed = path[-1] in ('kernel', 'rel_embedding')
  return tensor.T if transposed else tensor


@pytest.fixture(scope='module')
def model_and_params(case):
  config, tensors, _, _ = case
  model = t5.T5(
    t5.T5Config(
      vocab_size=config['vocab_size'],
      emb_dim=config['d_model'],
      num_heads=config['num_heads'],
      head_dim=config['d_kv'],
      mlp_dim=config['d_ff'],
      num_encoder_layers=config['num_layers'],
      num_decoder_layers=config['num_decoder_layers'],
    )
  )
  ids = jnp.ones((1, 2), jnp.int32)
  shapes = jax.eval_shape(
    lambda key: model.init(key, ids, ids, ids, enable_dropout=False),
    jax.random.key(0),
  )['params']
  flat = flax.traverse_util.flatten_dict(shapes)
  params = {
    path: jnp.asarray(to_ours(tensors[hf_name(path)], path)) for path in flat
  }
  assert {p: v.shape for p, v in params.items()} == {
    p: v.shape for p, v in flat.items()
  }
  return model, flax.traverse_util.unflatten_dict(params)


def apply(model, params, io):
  # No decoder padding mask was used: every target counts as real.
  real = np.ones_like(io['decoder_input_ids'])
  return model.apply(
    {'params': params},
    io['input_ids'],
    io['decoder_input_ids'],
    real,
    enable_dropout=False,
  )


def test_logits_equal_transformers(case, model_and_params):
  io = case[2]
  logits = apply(*model_and_params, io)
  np.testing.assert_allclose(
    logits, io['logits'], rtol=0, atol=1e-5 * np.abs(io['logits']).max()
  )


def test_encoder_equals_transformers(case, model_and_params):
  model, params = model_and_params
  io = case[2]
  encoded = model.apply(
    {'params': params}, io['input_ids'], enable_dropout=False, method='encode'
  )
  expected = io['encoder_last_hidden_state']
  real = io['attention_mask'].astype(bool)
  np.testing.assert_allclose(
    encoded[real], expected[real], rtol=0, atol=1e-5 * np.abs(expected).max()
  )


def test_loss_and_gradients_equal_transformers(case, model_and_params):
  model, params = model_and_params
  _, _, io, norms = case
  labels = io['labels']

  def loss(params):
    log_probs = jax.nn.log_softmax(apply(model, params, io))
    picked = jnp.take_along_axis(
      log_probs, np.maximum(labels, 0)[..., None], axis=-1
    )[..., 0]
    return -jnp.sum(picked * (labels >= 0)) / np.sum(labels >= 0)

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, io['loss'], rtol=1e-5)
  flat = flax.traverse_util.flatten_dict(grads)
  for path, grad in flat.items():
    np.testing.assert_allclose(
      np.linalg.norm(grad), norms[hf_name(path)], rtol=1e-4, err_msg=str(path)
    )
