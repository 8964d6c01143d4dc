import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_memories
import tiny_training

from mowe.layers.mixtures import moe
from mowe.layers.routers import hash_routing
from mowe.models import initialization, parameters
from mowe.models.families import families
from mowe.models.surgery import silenced


@functools.cache
def _memories():
  config = tiny_memories.make_config()
  return config, _drawn(config)


def _drawn(config):
  """Parameters of which none is zero, so that each has an effect."""
  params = initialization.initial_parameters(
    families.build(config), jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params
  )


def _logits(config, params):
  rng = np.random.default_rng(1)
  inputs = rng.integers(3, tiny_training.VOCAB, (3, 7)).astype(np.int32)
  targets = rng.integers(3, tiny_training.VOCAB, (3, 5)).astype(np.int32)
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
    'encoder_routing_ids': inputs % tiny_training.EXPERTS,
    'decoder_routing_ids': targets % tiny_training.EXPERTS,
  }
  model = families.build(config)
  return jax.jit(
    functools.partial(model.apply, enable_dropout=False, method='of_batch')
  )({'params': params}, batch)


def test_a_silenced_model_does_not_read_its_tables():
  config, params = _memories()
  whole = _logits(config, params)
  without = _logits(silenced.silenced(config), params)
  assert np.abs(whole - without).max() > 1e-3
  ordinary, tables = parameters.split_tables(params)
  changed = parameters.merge_tables(
    ordinary, jax.tree.map(lambda x: x + 1.0, tables)
  )
  assert np.abs(_logits(config, changed) - whole).max() > 1e-3
  np.testing.assert_array_equal(
    _logits(silenced.silenced(config), changed), without
  )


def _mixture():
  router = hash_routing.HashRouter(tiny_training.VOCAB)
  return tiny_training.make_config(
    sparse_feed_forward=functools.partial(moe.MoeLayer, 4, 12, routing=router),
    routing=None,
  )


@pytest.mark.parametrize('make', [tiny_training.make_config, _mixture])
def test_sparse_feed_forwards_add_nothing(make):
  config = make()
  params = _drawn(config)
  without = _logits(silenced.silenced(config), params)
  assert np.abs(_logits(config, params) - without).max() > 1e-3
  # The model without these blocks' feed-forwards: a dense one whose output
  # kernels are zero.
  dense = dataclasses.replace(
    config,
    sparse_feed_forward=None,
    sparse_encoder_layers=(),
    sparse_decoder_layers=(),
    routing=None,
  )
  zeroed = _drawn(dense)
  for stack in ('encoder', 'decoder'):
    kept = zeroed[stack]['layers_0']['mlp']
    zeroed[stack] = params[stack] | {
      'layers_0': params[stack]['layers_0'] | {'mlp': kept}
    }
    kept['wo']['kernel'] = np.zeros_like(kept['wo']['kernel'])
  zeroed = params | {k: zeroed[k] for k in ('encoder', 'decoder')}
  np.testing.assert_allclose(_logits(dense, zeroed), without, atol=1e-6)


def test_a_dense_model_has_nothing_to_silence():
  assert not silenced.can_be_silenced(tiny_training.make_config(sparse=False))
  assert silenced.can_be_silenced(tiny_training.make_config())
  assert silenced.can_be_silenced(_memories()[0])
