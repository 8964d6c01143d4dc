"""Tests every case of moe_routers.json against arrays made with flaxformer.

The tests run on any folder in that format: `pytest tests/parity
--golden_dir=DIR`. All options of a case come from the JSON file.
"""

import dataclasses

import flaxformer_moe
import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.dispatch import capacity_dispatch
from mowe.layers.mixtures import moe, router_statistics
from mowe.layers.routers import (
  experts_choose,
  router_base,
  router_losses,
  tokens_choose,
)

_ACTIVATIONS = {'gelu_tanh': 'gelu', 'relu': 'relu', 'linear': 'linear'}


def pytest_generate_tests(metafunc):
  kind = 'router' if metafunc.function is test_router else 'layer'
  golden_cases.parametrize(metafunc, 'moe_routers', {kind})


@pytest.fixture(scope='module')
def golden(request):
  return golden_cases.read(request.config.parity_dir, 'moe_routers')


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.mark.slow
def test_router(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  inputs = arrays['inputs']['inputs']
  num_experts, capacity = options['num_experts'], options['capacity']
  router = make_router(options, options['group_size'], capacity)
  is_valid = is_not_padding(inputs, options)

  def run(params):
    logits = router_logits(inputs, params)
    choices = router(
      router_base.RouterInputs(
        is_valid=is_valid, logits=logits, routing_ids=None, selection_bias=None
      ),
      num_experts=num_experts,
    )
    plan = Exactly(room=capacity).plan(choices, router, num_experts=num_experts)
    stats = router_statistics.measure(
      logits,
      choices,
      plan,
      router=router,
      losses=flaxformer_moe.FlaxformerLosses(),
      is_valid=is_valid,
    )
    return losses_of(stats) | {'choices': choices, 'plan': plan}

  found, grads = golden_cases.values_and_gradients(
    options, run, arrays['params']
  )
  as_arrays = as_masks if options['dispatch'] == 'mask' else as_indices
  found |= as_arrays(found['choices'], found['plan'], num_experts, capacity)
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)


@dataclasses.dataclass(frozen=True)
class Exactly(capacity_dispatch.CapacityDispatch):
  """Has exactly the capacity of the case, however that was computed."""

  room: int = 0

  def capacity(self, router, group_size, num_experts):
    return self.room


@pytest.mark.slow
def test_layer(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  tokens = arrays['inputs']['inputs']
  layer = make_layer(options)
  assert layer.groups.split(tokens, 0).shape[:2] == (
    options['num_groups'],
    options['group_size'],
  )
  assert options['capacity'] == layer.dispatch.capacity(
    layer.routing, options['group_size'], options['num_experts']
  )
  is_real = is_not_padding(tokens, options)
  ids = None
  if options['ignore_padding']:
    ids = jnp.where(is_real, 0, -1)

  def run(params):
    outputs, sown = layer.apply(
      {'params': as_tree(params)},
      params['inputs'],
      ids,
      # In evaluation flaxformer drops tokens with another factor, and we drop
      # none. The cases of both kinds run in training mode, which differs only
      # in dropout, and there is none here.
      deterministic=False,
      mutable=['router_stats'],
    )
    stats = sown['router_stats']['stats']
    metrics = flaxformer_metrics(options, stats, is_real)
    return {'outputs': outputs} | losses_of(stats) | metrics

  params = arrays['params'] | {'inputs': tokens}
  found, grads = golden_cases.values_and_gradients(
    options, run, params, arrays['cotangents']
  )
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)


def make_router(options, group_size, capacity):
  """The router of a case; if experts choose, each takes `capacity` tokens."""
  # In flaxformer only masked tokens-choose leaves padding out completely.
  routes_padding = options['ignore_padding'] and not (
    options['router'] == 'tokens_choose' and options['dispatch'] == 'mask'
  )
  common = {
    'use_bias': options['router_bias'],
    'routes_padding': routes_padding,
  }
  if options['router'] == 'experts_choose':
    factor = capacity * options['num_experts'] / group_size
    return experts_choose.ExpertsChoose(factor, **common)
  assert options['router'] == 'tokens_choose', options['router']
  assert options['score_function'] in ('softmax', 'sigmoid')
  return tokens_choose.TokensChoose(
    options['k'],
    sigmoid=options['score_function'] == 'sigmoid',
    renormalize=options['renormalize_gates'],
    first_choices_first=True,
    batch_prioritized=options['batch_prioritized'],
    **common,
  )


def make_layer(options):
  assert not options['expert_bias'], 'our experts have no bias'
  # flaxformer counts the devices; these arrays were made on one device.
  devices = options['num_expert_partitions'] * options['num_model_partitions']
  copies = max(1, 1 // devices)
  dispatch = capacity_dispatch.CapacityDispatch
  if not options['capacity_scaled_by_k']:
    dispatch = flaxformer_moe.FlaxformerCapacity
  return moe.MoeLayer(
    options['num_experts'],
    options['mlp_dim'],
    tuple(_ACTIVATIONS[name] for name in options['activations']),
    routing=make_router(options, options['group_size'], options['capacity']),
    dispatch=dispatch(
      options['capacity_factors'][options['mode']], options['min_capacity']
    ),
    groups=flaxformer_moe.FlaxformerGroups(
      options['max_group_size'], options['num_experts'] * copies
    ),
    losses=flaxformer_moe.FlaxformerLosses(),
  )


def is_not_padding(tokens, options):
  if not options['ignore_padding']:
    return jnp.ones(tokens.shape[:2], bool)
  return jnp.sum(jnp.abs(tokens), axis=-1) > 0


def router_logits(inputs, params):
  logits = jnp.einsum('gtm,me->gte', inputs, params['router_kernel'])
  if 'router_bias' in params:
    logits += params['router_bias'][None, None, :]
  return logits


def as_tree(params):
  """Puts the parameters of a case under the names of the layer."""
  w = {'kernel': params['router_kernel']}
  if 'router_bias' in params:
    w['bias'] = params['router_bias']
  return {
    'router': {'router_weights': {'w': w}},
    'expert': {
      name: {'kernel': kernel}
      for name, kernel in params.items()
      if name.startswith('w')
    },
  }


def losses_of(stats):
  losses = router_losses.losses(stats)
  ratio = lambda name: losses[name][0] / losses[name][1]
  return {
    'auxiliary_loss': ratio('load_balance_loss'),
    'router_z_loss': ratio('router_z_loss'),
  }


def flaxformer_metrics(options, stats, is_real):
  computed = (
    stats.num_tokens
    - stats.num_padding
    - stats.num_skipped
    - stats.num_left_behind
  )
  num_tokens = stats.num_tokens
  if options['ignore_padding']:
    num_tokens = jnp.sum(is_real)
    # flaxformer's scatter dispatch counts tokens after it has repeated them k
    # times.
    if options['dispatch'] == 'scatter':
      num_tokens *= options['k']
  load = jnp.sum(stats.load)
  always_full = options['router'] == 'experts_choose'
  return {
    'fraction_tokens_left_behind': 1 - computed / num_tokens,
    'router_confidence': stats.weight / load,
    'expert_usage': 1.0 if always_full else load / stats.num_slots,
  }


def as_masks(choices, plan, num_experts, capacity):
  """Masks as flaxformer has them, [groups, tokens, experts, capacity]."""
  num_groups, num_tokens, _ = choices.pairs.shape
  sources = np.asarray(plan.sources)
  mask = np.zeros((num_groups, num_tokens, num_experts, capacity))
  combined = mask.copy()
  shape = (num_experts, num_groups, capacity)
  weights = np.append(choices.weights, 0)[np.asarray(plan.pairs)]
  for slot in np.flatnonzero(sources < num_groups * num_tokens):
    expert, group, position = np.unravel_index(slot, shape)
    at = (group, sources[slot] % num_tokens, expert, position)
    mask[at], combined[at] = 1, weights[slot]
  return {'dispatch_mask': mask.astype(np.uint8), 'combine_array': combined}


def as_indices(choices, plan, num_experts, capacity):
  """flaxformer's indices [groups, tokens, k, 2] and weights without the 2."""
  num_groups, num_pairs = choices.experts.shape
  pairs = np.asarray(choices.pairs)
  group = np.arange(num_groups)[:, None, None]
  slots = np.asarray(plan.slots_of_pairs).reshape(num_groups, num_pairs)
  slots = slots[group, pairs]
  has_slot = slots < plan.sources.size
  position = np.where(has_slot, slots % capacity, capacity)
  experts = np.asarray(choices.experts)[group, pairs]
  weights = np.asarray(choices.weights)[group, pairs] * has_slot
  return {
    'dispatch_indices': np.stack([experts, position], -1).astype(np.int32),
    'combine_weights': weights,
  }
