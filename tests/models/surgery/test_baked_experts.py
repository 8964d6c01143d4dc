"""Tests that a model with baked experts gives the same logits."""

import functools

import drawn_models
import flax
import jax
import pytest
import tiny_training

from mowe.layers.memory.payloads import lookup_experts
from mowe.models import initialization, token_memories
from mowe.models.families import families, saved_config
from mowe.models.surgery import baked_experts
from mowe.words.addresses import piece_address


def _config(shares_rows):
  memory = token_memories.Memory(
    'mole',
    piece_address.Pieces(tiny_training.VOCAB),
    functools.partial(lookup_experts.LookupExperts, 3, expert_dim=7),
    token_memories.BesideFeedForward((0,), (0, 1)),
    shares_rows=shares_rows,
  )
  return tiny_training.make_config(
    sparse=False, num_decoder_layers=2, memories=(memory,)
  )


def _logits(config, params):
  batch = drawn_models.batch(tiny_training.VOCAB)
  # Padding has no row.
  batch['encoder_input_tokens'][0, 4:] = 0
  tree = flax.traverse_util.unflatten_dict(params)
  return drawn_models.logits(config, tree, batch)


@pytest.mark.parametrize('shares_rows', [True, False])
@pytest.mark.parametrize('at_once', [50, 1024])
def test_a_baked_model_gives_the_same(monkeypatch, shares_rows, at_once):
  monkeypatch.setattr(baked_experts, '_AT_ONCE', at_once)
  config = _config(shares_rows)
  drawn = drawn_models.parameters(families.build(config))
  params = flax.traverse_util.flatten_dict(jax.device_get(drawn))
  assert params['mole', 'memory_rows'].shape == (
    128,
    1 if shares_rows else 3,
    24,
  )
  new, baked = baked_experts.baked(config, params)
  assert baked['mole', 'memory_rows'].shape == (128, 3, 3 * 24)
  names = {'/'.join(path) for path in baked}
  wanted = flax.traverse_util.flatten_dict(
    initialization.abstract_variables(families.build(new))['params'], sep='/'
  )
  assert names == set(wanted)
  tiny_training.assert_close(_logits(new, baked), _logits(config, params), 1e-5)
  assert saved_config.from_json(saved_config.to_json(new)) is not None


def test_a_model_without_such_experts_is_refused():
  config = tiny_training.make_config(sparse=False)
  with pytest.raises(ValueError, match='Only memories with LookupExperts'):
    baked_experts.baked(config, {})
