"""Tests parameters and FLOPs of tiny models, counted by hand."""

import dataclasses
import fractions
import functools

import jax
import jax.numpy as jnp
import pytest

from mowe.layers.dispatch import token_groups
from mowe.layers.memory import product_keys, word_experts
from mowe.layers.mixtures import moe
from mowe.layers.routers import experts_choose, hash_routing, tokens_choose
from mowe.models import parameters
from mowe.models.families import costs
from mowe.models.t5 import t5, t5_config

_V, _D, _H, _K, _F = 11, 6, 2, 5, 7
# _E is the number of experts, and _X that of hidden units of an expert.
_E, _X = 13, 3


@dataclasses.dataclass(frozen=True)
class _Routing:
  num_experts: int = _E


def _config(**changes):
  sizes = {
    'vocab_size': _V,
    'emb_dim': _D,
    'num_heads': _H,
    'head_dim': _K,
    'mlp_dim': _F,
    'num_encoder_layers': 3,
    'num_decoder_layers': 2,
  }
  return t5_config.T5Config(**(sizes | changes))


def _mowe(**layer):
  return _config(
    sparse_feed_forward=functools.partial(
      word_experts.MoweLayer, _E, _X, **layer
    ),
    sparse_encoder_layers=(0, 2),
    sparse_decoder_layers=(1,),
    routing=_Routing(),
  )


_ATTENTION = 4 * _D * _H * _K
_MLP = 3 * _D * _F
# There are two norms in an encoder block, three in a decoder block, and one at
# the end of each stack.
_NORMS = (3 * 2 + 2 * 3 + 2) * _D
_RELPOS = 2 * 32 * _H


def test_a_dense_model_by_hand():
  cost = costs.model_costs(_config())
  kernels = 3 * (_ATTENTION + _MLP) + 2 * (2 * _ATTENTION + _MLP)
  assert cost.total_parameters == kernels + _NORMS + _RELPOS + 2 * _V * _D
  assert cost.active_parameters == cost.total_parameters
  assert cost.expert_parameters == cost.active_expert_parameters == 0
  # An input token goes through the encoder. Each decoder block then projects it
  # to a key and a value.
  memory = 2 * 2 * _D * _H * _K
  assert cost.flops_per_input_token == 2 * (3 * (_ATTENTION + _MLP) + memory)
  assert cost.flops_per_target_token == 2 * (
    2 * (2 * _ATTENTION + _MLP) - memory + _V * _D
  )
  assert cost.flops_per_example(5, 4) == (
    5 * cost.flops_per_input_token + 4 * cost.flops_per_target_token
  )


def test_logits_from_the_embedding_cost_as_much_and_have_no_parameters():
  own = costs.model_costs(_config())
  shared = costs.model_costs(_config(logits_via_embedding=True))
  assert own.total_parameters - shared.total_parameters == _V * _D
  assert own.flops_per_target_token == shared.flops_per_target_token


def test_a_shared_table_is_stored_and_counted_once():
  dense, cost = costs.model_costs(_config()), costs.model_costs(_mowe())
  row = 3 * _D * _X
  assert cost.expert_parameters == _E * row
  assert cost.active_expert_parameters == row
  assert cost.total_parameters == dense.total_parameters - 3 * _MLP + _E * row
  assert cost.active_parameters == dense.total_parameters - 3 * _MLP + row
  # Two encoder blocks and one decoder block read from the table.
  assert cost.flops_per_input_token == dense.flops_per_input_token + 2 * 2 * (
    row - _MLP
  )
  assert cost.flops_per_target_token == dense.flops_per_target_token + 2 * (
    row - _MLP
  )


def test_tables_of_single_layers_are_counted_for_each():
  shared = costs.model_costs(_mowe())
  single = costs.model_costs(_mowe(share_experts=False))
  assert single.expert_parameters == 3 * shared.expert_parameters
  assert single.active_expert_parameters == 3 * shared.active_expert_parameters
  assert single.flops_per_input_token == shared.flops_per_input_token
  assert single.flops_per_target_token == shared.flops_per_target_token


def test_equal_widths_are_equal_flops():
  config = dataclasses.replace(
    _mowe(),
    sparse_feed_forward=functools.partial(word_experts.MoweLayer, _E, _F),
  )
  dense, sparse = costs.model_costs(_config()), costs.model_costs(config)
  assert sparse.flops_per_input_token == dense.flops_per_input_token
  assert sparse.flops_per_target_token == dense.flops_per_target_token
  assert sparse.total_parameters > dense.total_parameters


def _moe(routing, decoder_routing=None, **fields):
  make = lambda routing: functools.partial(
    moe.MoeLayer, _E, _X, routing=routing, **fields
  )
  return _config(
    sparse_feed_forward=make(routing),
    sparse_decoder_feed_forward=decoder_routing and make(decoder_routing),
    sparse_encoder_layers=(0, 2),
    sparse_decoder_layers=(1,),
  )


_EXPERT = 3 * _D * _X
_ROUTER = _D * _E


@pytest.mark.parametrize(
  ('routing', 'per_token', 'router'),
  [
    (tokens_choose.TokensChoose(), 1, _ROUTER),
    (tokens_choose.TokensChoose(3), 3, _ROUTER),
    (hash_routing.HashRouter(_V), 1, 0),
  ],
)
def test_a_mixture_of_experts_by_hand(routing, per_token, router):
  dense, cost = costs.model_costs(_config()), costs.model_costs(_moe(routing))
  # There are three layers, each with experts of its own.
  assert cost.expert_parameters == 3 * _E * _EXPERT
  assert cost.active_expert_parameters == 3 * per_token * _EXPERT
  rest = dense.total_parameters + 3 * (router - _MLP)
  assert cost.total_parameters == rest + cost.expert_parameters
  assert cost.active_parameters == rest + cost.active_expert_parameters
  # Two of these layers are in the encoder and one is in the decoder.
  more = 2 * (per_token * _EXPERT + router - _MLP)
  assert cost.flops_per_input_token == dense.flops_per_input_token + 2 * more
  assert cost.flops_per_target_token == dense.flops_per_target_token + more


def test_experts_that_choose_are_counted_by_their_choices():
  config = _moe(
    experts_choose.ExpertsChoose(2.0),
    tokens_choose.TokensChoose(),
    groups=token_groups.TokenGroups(52),
  )
  dense, cost = costs.model_costs(_config()), costs.model_costs(config)
  # Each of 13 experts chooses 2.0 * 52 / 13 = 8 tokens, so 52 tokens have 104
  # pairs.
  assert cost.active_expert_parameters == (2 * 2 + 1) * _EXPERT
  assert cost.flops_per_input_token == dense.flops_per_input_token + 2 * 2 * (
    2 * _EXPERT + _ROUTER - _MLP
  )
  assert cost.flops_per_target_token == dense.flops_per_target_token + 2 * (
    _EXPERT + _ROUTER - _MLP
  )


def test_choices_that_do_not_come_out_even():
  config = _moe(
    experts_choose.ExpertsChoose(),
    tokens_choose.TokensChoose(),
    groups=token_groups.TokenGroups(20),
  )
  # Each of 13 experts chooses round(20 / 13) = 2 tokens, so 20 tokens have 26
  # pairs.
  layer, _ = config.make_sparse_layers()
  assert costs.experts_per_token(layer) == fractions.Fraction(26, 20)
  cost = costs.model_costs(config)
  assert cost.active_expert_parameters == round((2 * 1.3 + 1) * _EXPERT)


def test_a_shared_expert_is_met_by_every_token():
  routing = tokens_choose.TokensChoose()
  alone = costs.model_costs(_moe(routing))
  cost = costs.model_costs(_moe(routing, shared_expert_dim=5))
  shared = 3 * _D * 5
  assert cost.expert_parameters == alone.expert_parameters
  assert cost.total_parameters == alone.total_parameters + 3 * shared
  assert cost.active_parameters == alone.active_parameters + 3 * shared
  assert cost.flops_per_input_token == (
    alone.flops_per_input_token + 2 * 2 * shared
  )


@pytest.mark.parametrize('sparse', [True, False])
def test_a_product_key_memory_is_counted_by_what_it_reads(sparse):
  # The 25 values have 5 + 5 half-keys of 3 numbers, for each of 2 heads, which
  # choose 4 values each.
  make = functools.partial(product_keys.DenseProductKeyMemory, 25, 2)
  values, num_read = 25 * _D, 25 * _D
  if sparse:
    make = functools.partial(product_keys.ProductKeyMemory, 25, 2, knn=4)
    num_read = 2 * 4 * _D
  config = _config(sparse_feed_forward=make, sparse_encoder_layers=(0, 2))
  dense, cost = costs.model_costs(_config()), costs.model_costs(config)
  keys = 2 * 2 * 5 * 3
  assert cost.total_parameters == (
    dense.total_parameters + 2 * (values + keys - _MLP)
  )
  assert cost.expert_parameters == (2 * values if sparse else 0)
  assert cost.active_expert_parameters == (2 * num_read if sparse else 0)
  assert cost.flops_per_input_token == (
    dense.flops_per_input_token + 2 * 2 * (num_read + keys - _MLP)
  )


def test_word_experts_below_and_a_mixture_above():
  words = _mowe(share_experts=False)
  config = dataclasses.replace(
    words, sparse_decoder_feed_forward=functools.partial(moe.MoeLayer, 4, 5)
  )
  words, cost = costs.model_costs(words), costs.model_costs(config)
  row, expert, router = 3 * _D * _X, 3 * _D * 5, _D * 4
  assert cost.expert_parameters == 2 * _E * row + 4 * expert
  assert cost.active_expert_parameters == 2 * row + expert
  assert cost.flops_per_input_token == words.flops_per_input_token
  assert cost.flops_per_target_token == words.flops_per_target_token + 2 * (
    expert + router - row
  )


def test_the_formula_is_what_the_compiled_program_counts():
  """Compares one more encoder block, but for attention scores and small parts."""
  width = {'emb_dim': 64, 'num_heads': 4, 'head_dim': 16, 'mlp_dim': 128}
  length, batch = 4, 8

  def compiled_flops(depth):
    config = _config(**width, num_encoder_layers=depth)
    model = t5.T5(config)
    variables = jax.eval_shape(
      lambda key: parameters.initial_variables(model, key), jax.random.key(0)
    )
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    encode = lambda params, ids: model.apply(
      {'params': params}, ids, enable_dropout=False, method='encode'
    )
    lowered = jax.jit(encode).lower(variables['params'], ids)
    return lowered.cost_analysis()['flops']

  more, less = (
    costs.model_costs(_config(**width, num_encoder_layers=depth))
    for depth in (2, 1)
  )
  counted = compiled_flops(2) - compiled_flops(1)
  expected = more.flops_per_input_token - less.flops_per_input_token
  assert counted == pytest.approx(batch * length * expected, rel=0.1)
