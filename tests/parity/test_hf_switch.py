"""Tests Switch against arrays that Hugging Face transformers computed.

The tests run on any folder in that format: `pytest tests/parity
--golden_dir=DIR` takes DIR/hf_switch_*. The README of hf_switch_tiny describes
the format.
"""

import functools
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.interop import huggingface, rules
from mowe.layers.routers import router_base, router_losses
from mowe.models import model_config
from mowe.models.t5 import t5


def pytest_generate_tests(metafunc):
  """Makes all tests for each folder; they skip if there is none."""
  if 'folder' not in metafunc.fixturenames:
    return
  parent = metafunc.config.parity_dir
  folders = sorted(path for path in parent.glob('hf_switch_*') if path.is_dir())
  if not folders:
    reason = f'needs {parent}/hf_switch_*; name its parent with --golden_dir'
    folders = [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
  metafunc.parametrize('folder', folders, scope='module', ids=str)


@pytest.fixture(scope='module')
def io(folder):
  with np.load(folder / 'io.npz') as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def loaded(folder):
  config, params = huggingface.load(folder)
  return t5.T5(config), jax.tree.map(jnp.asarray, params)


def assert_close(actual, expected):
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )


def run(model, params, embedded, io):
  """Runs the model like transformers: padding is routed, but masked as keys.

  Args:
    model: the model.
    params: its parameters.
    embedded: the embedded inputs of encoder and decoder. They are arguments
      because transformers has an embedding for each.
    io: the inputs.

  Returns:
    Logits, encoder outputs, and the router logits of both stacks.
  """
  inputs, targets = io['input_ids'], io['decoder_input_ids']
  mask = jnp.asarray(io['attention_mask'], bool)[:, None, None, :]
  length = targets.shape[1]
  causal = jnp.tril(jnp.ones((length, length), bool))[None, None]

  def call(module):
    routing = model_config.StreamRouting(jnp.zeros_like(inputs))
    encoded = module.encoder(embedded[0], mask, routing, True)
    tokens = module.decoder(
      embedded[1],
      encoded,
      causal,
      mask,
      model_config.StreamRouting(jnp.zeros_like(targets)),
      decode=False,
      max_decode_length=None,
      deterministic=True,
    )
    if module.config.logits_via_embedding:
      return module.token_embedder.attend(tokens), encoded
    return module.decoder.logits(tokens), encoded

  (logits, encoded), state = model.apply(
    {'params': params},
    method=call,
    mutable=['intermediates', 'router_stats'],
    capture_intermediates=lambda module, _: isinstance(
      module, router_base.RouterWeights
    ),
  )
  return logits, encoded, router_logits(model.config, state['intermediates'])


def router_logits(config, intermediates):
  return {
    stack: [
      intermediates[stack][f'layers_{i}']['mlp']['router']['router_weights'][
        '__call__'
      ][0]
      for i in getattr(config, f'sparse_{stack}_layers')
    ]
    for stack in ('encoder', 'decoder')
  }


def embed(params, io):
  table = params['token_embedder']['embedding']
  return table[io['input_ids']], table[io['decoder_input_ids']]


@pytest.fixture(scope='module')
def results(loaded, io):
  model, params = loaded
  return jax.jit(functools.partial(run, model, io=io))(
    params, embed(params, io)
  )


def test_the_config_says_which_blocks_are_sparse(folder, loaded):
  described = json.loads((folder / 'config.json').read_text())
  config = loaded[0].config
  for stack in ('encoder', 'decoder'):
    layers = getattr(config, f'sparse_{stack}_layers')
    assert len(layers) == described[f'num_sparse_{stack}_layers']
  layer, _ = config.make_sparse_layers()
  room = layer.dispatch.capacity(layer.routing, 10**6, layer.num_experts)
  assert room == described['expert_capacity']


@pytest.mark.slow
def test_logits_equal_transformers(results, io):
  assert_close(results[0], io['logits'])


def test_encoder_equals_transformers(results, io):
  # The outputs of padding must be equal too, as it was routed.
  assert_close(results[1], io['encoder_last_hidden_state'])


@pytest.mark.slow
def test_the_model_as_it_is_called_has_the_same_logits(loaded, io):
  """Padding at the end takes no slot of a real token; here it has no slot."""
  model, params = loaded
  inputs, targets = io['input_ids'], io['decoder_input_ids']
  real = io['attention_mask'].astype(bool)
  assert np.all(real[:, :-1] >= real[:, 1:])
  apply = functools.partial(model.apply, enable_dropout=False)
  logits = jax.jit(apply)(
    {'params': params},
    np.where(real, inputs, 0),
    targets,
    np.ones_like(targets),
  )
  assert_close(logits, io['logits'])


@pytest.mark.parametrize('stack', ['encoder', 'decoder'])
def test_routers_equal_transformers(stack, results, io):
  ours = results[2][stack]
  assert f'{stack}_router_logits_{len(ours)}' not in io
  for i, logits in enumerate(ours):
    assert_close(logits, io[f'{stack}_router_logits_{i}'])


@jax.jit
def losses(logits_of_layers):
  """The z-loss and aux loss of a stack; its layers are joined along tokens."""
  logits = jnp.concatenate(logits_of_layers, axis=1)
  probs = jax.nn.softmax(logits)
  num_experts = logits.shape[-1]
  chosen = jax.nn.one_hot(jnp.argmax(logits, axis=-1), num_experts)
  sums = router_losses.RouterLosses().sums(
    logits,
    probs,
    jnp.sum(chosen, axis=1).astype(jnp.int32),
    jnp.ones(logits.shape[:2], bool),
  )
  count = sums['num_loss_tokens']
  return sums['z_loss'] / count, sums['load_balance'] / count


def cross_entropy(logits, labels):
  log_probs = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(
    log_probs, np.maximum(labels, 0)[..., None], axis=-1
  )[..., 0]
  return -jnp.sum(picked * (labels >= 0)) / np.sum(labels >= 0)


@pytest.mark.slow
def test_losses_equal_transformers(folder, results, io):
  described = json.loads((folder / 'config.json').read_text())
  total = cross_entropy(results[0], io['labels'])
  np.testing.assert_allclose(total, io['cross_entropy'], rtol=1e-5)
  for stack in ('encoder', 'decoder'):
    if described[f'{stack}_sparse_step'] == 1:
      # For such a stack transformers leaves out both losses.
      assert io[f'{stack}_z_loss'] == io[f'{stack}_aux_loss'] == 0
      continue
    z_loss, aux_loss = losses(results[2][stack])
    np.testing.assert_allclose(z_loss, io[f'{stack}_z_loss'], rtol=1e-5)
    np.testing.assert_allclose(aux_loss, io[f'{stack}_aux_loss'], rtol=1e-5)
    total += described['router_z_loss_coef'] * z_loss
    total += described['router_aux_loss_coef'] * aux_loss
  np.testing.assert_allclose(total, io['loss'], rtol=1e-5)


@pytest.mark.slow
def test_gradients_equal_transformers(folder, loaded, io):
  model, params = loaded
  norms = json.loads((folder / 'grad_norms.json').read_text())

  def loss(params, embedded):
    return cross_entropy(run(model, params, embedded, io)[0], io['labels'])

  grads, of_embedded = jax.jit(jax.grad(loss, argnums=(0, 1)))(
    params, embed(params, io)
  )
  of_table = {
    f'{stack}.embed_tokens.weight': jnp.zeros_like(
      params['token_embedder']['embedding']
    )
    .at[io[name]]
    .add(grad)
    for stack, name, grad in zip(
      ('encoder', 'decoder'),
      ('input_ids', 'decoder_input_ids'),
      of_embedded,
      strict=True,
    )
  }
  flat = flax.traverse_util.flatten_dict(grads)
  # If both stacks share an embedding, it has the sum of both gradients.
  of_table['shared.weight'] = (
    sum(of_table.values()) + (flat['token_embedder', 'embedding'])
  )
  places = rules.places(norms, huggingface.SWITCH_RULES)
  for name, place in places.items():
    grad = of_table.get(name, flat[place.path])
    grad = grad if place.expert is None else grad[place.expert]
    np.testing.assert_allclose(
      np.linalg.norm(grad), norms[name], rtol=1e-4, err_msg=name
    )
