"""Attention, routers and MLP modules of moduleformer.json, by the authors' code.

Runs on any folder in that format: `pytest tests/parity --golden_dir=DIR`. The
options of a case come from the JSON file alone.
"""

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mowe.layers import (
  module_router,
  moe,
  router_losses,
  routing,
  stick_breaking,
  token_groups,
  tokens_choose,
)

_KINDS = {
  'test_attention': 'stick_breaking',
  'test_router': 'module_router',
  'test_mlp_modules': 'mlp_modules',
}
_ACTIVATIONS = {'gelu_tanh': 'gelu', 'relu': 'relu', 'silu': 'silu'}


def pytest_generate_tests(metafunc):
  kind = _KINDS[metafunc.function.__name__]
  golden_cases.parametrize(metafunc, 'moduleformer', {kind})


@pytest.fixture(scope='module')
def golden(request):
  return golden_cases.read(request.config.parity_dir, 'moduleformer')


def test_attention(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  inputs = dict(arrays['inputs'])
  mask = visible(options, inputs.pop('keep', None))

  def run(params):
    query, key, value = params['q'], params['k'], params['v']
    # Values that show the weights.
    batch, length, heads, _ = key.shape
    ones = jnp.broadcast_to(
      jnp.eye(length)[None, :, None], (batch, length, heads, length)
    )
    attend = stick_breaking.stick_breaking_attention
    # [batch, query, groups, heads, key] -> [batch, groups, heads, query, key]
    weights = attend(query, key, ones, mask).transpose(0, 2, 3, 1, 4)
    return {'out': attend(query, key, value, mask), 'att': weights}

  with jax.default_matmul_precision('highest'):
    found, grads = golden_cases.values_and_gradients(
      options, run, inputs, arrays['cotangents']
    )
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)


def visible(options, keep):
  """<bool>[batch, 1, query, key]; queries stand at the last keys."""
  assert options['causal'] and options['remainder'] == 'dropped'
  num_queries, num_keys = options['query_length'], options['key_length']
  own = num_keys - num_queries + np.arange(num_queries)[:, None]
  behind = np.arange(num_keys)[None, :] - own
  mask = behind <= 0 if options['attend_current'] else behind < 0
  mask = np.broadcast_to(mask, (options['batch'], 1, num_queries, num_keys))
  return mask if keep is None else mask & (keep > 0)[:, None, None, :]


def test_router(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  num_modules, keep = options['num_modules'], arrays['inputs'].get('keep')
  is_valid = jnp.ones((1, options['num_tokens']), bool)
  if keep is not None:
    is_valid = keep[None] > 0
  router, losses = parts(options)
  learned = routing.LearnedRouting(router, num_modules, logits=logits(options))

  def run(params):
    z = learned.apply(
      {'params': router_tree(params)}, params['x'][None], deterministic=True
    )[0]
    choices = router(z, num_experts=num_modules, is_valid=is_valid)
    chosen = jnp.arange(num_modules)[None] == choices.experts[0, :, None]
    sums = losses.sums(z, choices.probs, chosen.sum(0)[None], is_valid)
    own = lambda x: x[0][choices.pairs[0]]
    return {
      'top_idx': own(choices.experts),
      'top_gates': own(choices.weights),
      'probs': jnp.where(is_valid[0, :, None], choices.probs[0], 0),
      'expert_size': chosen.sum(0).astype(jnp.int32),
      'loss': loss(options, as_stats(sums)),
    }

  params = arrays['params'] | {'x': arrays['inputs']['x']}
  found, grads = golden_cases.values_and_gradients(
    options, run, params, arrays['cotangents']
  )
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)


def test_mlp_modules(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  if options['module_bias']:
    pytest.skip('MoeLayer has one bias after all experts, not one for each')
  router, losses = parts(options)
  num_tokens = options['batch'] * options['length']
  layer = moe.MoeLayer(
    options['num_modules'],
    options['mlp_dim'],
    activations=(_ACTIVATIONS[options['activation']],),
    routing=router,
    logits=logits(options),
    losses=losses,
    groups=token_groups.TokenGroups(num_tokens),
  )

  def run(params):
    asked = []

    def look(call, args, kwargs, context):
      answer = call(*args, **kwargs)
      if isinstance(context.module, routing.LearnedRouting):
        asked.append(answer[0])
      return answer

    tree = {
      'router': router_tree(params),
      'expert': {
        'wi': {'kernel': params['w_in']},
        'wo': {'kernel': params['w_out']},
      },
    }
    with nn.intercept_methods(look):
      outputs, sown = layer.apply(
        {'params': tree}, params['x'], mutable=['router_stats']
      )
    stats = sown['router_stats']['stats']
    choices = router(
      asked[-1],
      num_experts=options['num_modules'],
      is_valid=jnp.ones((1, num_tokens), bool),
    )
    own = lambda x: x[0][choices.pairs[0]].reshape(*outputs.shape[:2], -1)
    return {
      'y': outputs,
      'loss': loss(options, stats),
      'top_idx': own(choices.experts),
      'top_gates': own(choices.weights),
      'probs': choices.probs.reshape(*outputs.shape[:2], -1),
      'expert_size': stats.load.astype(jnp.int32),
    }

  params = arrays['params'] | {'x': arrays['inputs']['x']}
  with jax.default_matmul_precision('highest'):
    found, grads = golden_cases.values_and_gradients(
      options, run, params, arrays['cotangents']
    )
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)


def parts(options):
  """The router and how its losses are formed."""
  router = tokens_choose.TokensChoose(
    options['k'], renormalize=options['renormalize_gates']
  )
  if options.get('keep_mask') == 'skip':
    return router, module_router.PaddedMeans()
  return router, router_losses.RouterLosses()


def logits(options):
  assert options['gate_activation'] in (None, 'gelu_erf')
  width = options['gating_dim']
  return {
    'linear': lambda: routing.LinearLogits(),
    'mlp': lambda: module_router.MlpLogits(width),
    'gmm': lambda: module_router.CentroidLogits(width),
  }[options['gate_type']]()


def router_tree(params):
  """Parameters of the module `router` for a case's parameters."""
  first = {'kernel': params['gate_w1']}
  if 'gate_centroids' in params:
    weights = {
      'hidden': first,
      'centroids': params['gate_centroids'],
      'log_scale': params['gate_logtemp'],
    }
  elif 'gate_w2' in params:
    weights = {
      'hidden': first | {'bias': params['gate_b1']},
      'w': {'kernel': params['gate_w2']},
    }
  else:
    weights = {'w': first}
  return {'router_weights': weights}


def as_stats(sums):
  zeros = dict.fromkeys(router_losses.RouterStats._fields, jnp.zeros(()))
  return router_losses.RouterStats(**(zeros | sums))


def loss(options, stats):
  losses = router_losses.losses(stats)
  mean = lambda name: losses[name][0] / losses[name][1]
  if options['aux_loss'] == 'mi':
    return mean('mutual_information_loss')
  assert options['aux_loss'] == 'switch', options['aux_loss']
  z_loss = options['z_loss_weight'] * mean('router_z_loss')
  return mean('load_balance_loss') + z_loss
