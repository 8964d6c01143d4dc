"""Tests a dense T5 against arrays that Hugging Face transformers computed."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.interop import huggingface, rules
from mowe.models.t5 import t5


@pytest.fixture(scope='module')
def case(golden_dir):
  folder = golden_dir / 'hf_t5_tiny'
  return (
    dict(np.load(folder / 'io.npz')),
    json.loads((folder / 'grad_norms.json').read_text()),
  )


@pytest.fixture(scope='module')
def model_and_params(golden_dir):
  config, params = huggingface.load(golden_dir / 'hf_t5_tiny')
  return t5.T5(config), jax.tree.map(jnp.asarray, params)


def apply(model, params, io):
  # The arrays were made without a padding mask for the decoder, so every target
  # counts as real.
  real = np.ones_like(io['decoder_input_ids'])
  return model.apply(
    {'params': params},
    io['input_ids'],
    io['decoder_input_ids'],
    real,
    enable_dropout=False,
  )


@pytest.mark.slow
def test_logits_equal_transformers(case, model_and_params):
  io, _ = case
  logits = apply(*model_and_params, io)
  np.testing.assert_allclose(
    logits, io['logits'], rtol=0, atol=1e-5 * np.abs(io['logits']).max()
  )


def test_encoder_equals_transformers(case, model_and_params):
  model, params = model_and_params
  io, _ = case
  encoded = model.apply(
    {'params': params}, io['input_ids'], enable_dropout=False, method='encode'
  )
  expected = io['encoder_last_hidden_state']
  real = io['attention_mask'].astype(bool)
  np.testing.assert_allclose(
    encoded[real], expected[real], rtol=0, atol=1e-5 * np.abs(expected).max()
  )


@pytest.mark.slow
def test_loss_and_gradients_equal_transformers(case, model_and_params):
  model, params = model_and_params
  io, norms = case
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
  places = rules.places(norms, huggingface.T5_RULES)
  assert {place.path for place in places.values()} == set(flat)
  for name, place in places.items():
    np.testing.assert_allclose(
      np.linalg.norm(flat[place.path]), norms[name], rtol=1e-4, err_msg=name
    )
