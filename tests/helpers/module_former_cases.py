"""Makes parts, parameters and the loss of a layer from options of a case."""

import jax.numpy as jnp
import numpy as np

from mowe.layers.attention import inner_attention
from mowe.layers.dispatch import token_groups
from mowe.layers.routers import (
  module_router,
  router_base,
  router_losses,
  tokens_choose,
)

_ACTIVATIONS = {'gelu_tanh': 'gelu', 'relu': 'relu', 'silu': 'silu'}


def visible(options, keep=None):
  """<bool>[batch, 1, query, key]; the queries have the places of last keys."""
  assert options['causal'] and options['remainder'] == 'dropped'
  num_queries = options.get('query_length', options.get('length'))
  num_keys = options.get('key_length', num_queries)
  own = num_keys - num_queries + np.arange(num_queries)[:, None]
  behind = np.arange(num_keys)[None, :] - own
  mask = behind <= 0 if options['attend_current'] else behind < 0
  mask = np.broadcast_to(mask, (options['batch'], 1, num_queries, num_keys))
  return mask if keep is None else mask & (keep > 0)[:, None, None, :]


def parts(options):
  """The router of a case, and the class that computes its losses."""
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
    'linear': lambda: router_base.LinearLogits(),
    'mlp': lambda: module_router.MlpLogits(width),
    'gmm': lambda: module_router.CentroidLogits(width),
  }[options['gate_type']]()


def router_tree(params, prefix=''):
  """The parameters of the layer's `router` from those of a case."""
  own = {
    name.removeprefix(prefix): value
    for name, value in params.items()
    if name.startswith(prefix)
  }
  first = {'kernel': own['gate_w1']}
  if 'gate_centroids' in own:
    weights = {
      'hidden': first,
      'centroids': own['gate_centroids'],
      'log_scale': own['gate_logtemp'],
    }
  elif 'gate_w2' in own:
    weights = {
      'hidden': first | {'bias': own['gate_b1']},
      'w': {'kernel': own['gate_w2']},
    }
  else:
    weights = {'w': first}
  return {'router_weights': weights}


def mlp_fields(options, num_tokens):
  """Fields of the MoeLayer of a case."""
  router, losses = parts(options)
  return {
    'num_experts': options['num_modules'],
    'expert_dim': options['mlp_dim'],
    'activations': (_ACTIVATIONS[options['activation']],),
    'routing': router,
    'logits': logits(options),
    'losses': losses,
    'groups': token_groups.TokenGroups(num_tokens),
    'use_bias': options['module_bias'],
    'expert_output_bias': options['module_bias'],
  }


def mlp_tree(params, prefix=''):
  """Parameters of the MoeLayer of a case."""
  expert = {
    'wi': {'kernel': params[f'{prefix}w_in']},
    'wo': {'kernel': params[f'{prefix}w_out']},
  }
  if f'{prefix}b_in' in params:
    expert['wi']['bias'] = params[f'{prefix}b_in']
    expert['wo']['bias'] = params[f'{prefix}b_out']
  return {'router': router_tree(params, prefix), 'expert': expert}


def attention_fields(options, num_tokens):
  """Fields of the mixture of heads, without those that config and stack set."""
  router, losses = parts(options)
  return {
    'num_experts': options['num_modules'],
    'routing': router,
    'logits': logits(options),
    'losses': losses,
    'groups': token_groups.TokenGroups(num_tokens),
    'use_bias': not options['identity_kv'],
    'identity_memory': options['identity_kv'],
    # Queries that see no key are routed all the same, unless they are skipped.
    'routes_padding': options.get('keep_mask') != 'skip',
  }


def attention_tree(params, prefix='att_'):
  """Parameters of the mixture of heads of a case."""
  tree = {
    'router': router_tree(params, prefix),
    'expert': {
      'query': {'kernel': params[f'{prefix}w_in']},
      'out': {'kernel': params[f'{prefix}w_out']},
    },
  }
  if 'wk' in params:
    tree |= {
      'key': {'kernel': params['wk']},
      'key_bias': params['bk'],
      'value': {'kernel': params['wv']},
      'value_bias': params['bv'],
    }
  return tree


class Seen:
  """Records the logits of routers and the weights of attentions.

  Attributes:
    logits: the logits of each router, in the order of the calls.
    weights: the weights of each attention,
      <float>[batch, selected, heads, query, key].
  """

  def __init__(self):
    self.logits, self.weights = [], []

  def __call__(self, call, args, kwargs, context):
    answer = call(*args, **kwargs)
    if isinstance(context.module, router_base.LearnedRouting):
      self.logits.append(answer[0])
    return answer


class Weighing(inner_attention.StickBreaking):
  """Stick-breaking attention that records the weights which it gives to keys.

  Attributes:
    seen: the Seen that holds the weights.
  """

  def __init__(self, seen):
    object.__setattr__(self, 'seen', seen)

  def __call__(self, query, key, value, **others):
    batch, length, heads, _ = key.shape
    ones = jnp.broadcast_to(
      jnp.eye(length)[None, :, None], (batch, length, heads, length)
    )
    # [batch, query, groups, heads, key] -> [batch, groups, heads, query, key]
    weights = super().__call__(query, key, ones, **others)
    self.seen.weights.append(weights.transpose(0, 2, 3, 1, 4))
    return super().__call__(query, key, value, **others)


def choices(options, router_logits, shape, keep=None):
  """The arrays top_idx, top_gates and probs for tokens [batch, length]."""
  is_valid = jnp.ones(shape, bool)
  if options.get('keep_mask') == 'skip':
    is_valid = keep > 0
  # There is one group, as in the layers of the cases.
  groups = token_groups.TokenGroups(shape[0] * shape[1])
  is_valid = groups.split(is_valid, False)
  router, _ = parts(options)
  found = router(
    router_base.RouterInputs(is_valid=is_valid, logits=router_logits),
    num_experts=options['num_modules'],
  )
  merge = lambda array: groups.merge(array, *shape)
  own = lambda pairs: merge(pairs[0][found.pairs])
  return {
    'top_idx': own(found.experts),
    'top_gates': own(found.weights),
    'probs': merge(jnp.where(is_valid[..., None], found.probs, 0)),
  }


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
