"""Whole models with parameters of which each has an effect, and their logits."""

import functools

import jax
import numpy as np

from mowe.models import initialization
from mowe.models.families import families


def parameters(model, seed=0):
  """Fresh parameters with noise, so that none is zero or one."""
  params = initialization.initial_parameters(model, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params
  )


def batch(vocab_size, seed=1, rows=3, inputs=7, targets=5):
  """Random token ids for the model of an encoder and a decoder."""
  rng = np.random.default_rng(seed)
  draw = lambda length: rng.integers(3, vocab_size, (rows, length), np.int32)
  encoder, decoder = draw(inputs), draw(targets)
  return {
    'encoder_input_tokens': encoder,
    'decoder_input_tokens': np.pad(decoder, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': decoder,
  }


@functools.cache
def _function(model):
  return jax.jit(
    lambda params, batch: model.apply(
      {'params': params}, batch, enable_dropout=False, method='of_batch'
    )
  )


def logits(config, params, batch):
  """Logits <float32>[batch, targets, vocab] of a model without dropout."""
  return _function(families.build(config))(params, batch)
