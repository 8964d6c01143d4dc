"""Tests models whose memories or sparse feed-forwards are silenced.

Also tests `silent_address` and `silent_feed_forward`.
"""

import dataclasses
import functools

import drawn_models
import jax
import numpy as np
import pytest
import tiny_memories
import tiny_training

from mowe.layers.mixtures import moe
from mowe.layers.routers import hash_routing
from mowe.models import parameters
from mowe.models.families import families
from mowe.models.surgery import silenced


def _drawn(config):
  return drawn_models.parameters(families.build(config))


def _logits(config, params):
  batch = drawn_models.batch(tiny_training.VOCAB)
  ids = {
    f'{stream}_routing_ids': batch[f'{stream}_{name}'] % tiny_training.EXPERTS
    for stream, name in (
      ('encoder', 'input_tokens'),
      ('decoder', 'target_tokens'),
    )
  }
  return drawn_models.logits(config, params, batch | ids)


def test_a_silenced_model_does_not_read_its_tables():
  config = tiny_memories.make_config()
  params = _drawn(config)
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
  assert silenced.can_be_silenced(tiny_memories.make_config())
