"""Tests the mixture of heads against float64 loops over tokens and modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from mowe.layers.attention import inner_attention, multi_head
from mowe.layers.dispatch import capacity_dispatch, token_groups
from mowe.layers.mixtures import mixture_of_heads
from mowe.layers.routers import experts_choose, tokens_choose

BATCH, QUERIES, KEYS, EMBED, HEADS, KV, MODULES, K = 2, 5, 7, 6, 3, 2, 4, 2
JOINED = HEADS * KV


def softmax_weights(logits, visible, own):
  del own
  shifted = np.exp(logits - logits[visible].max())
  return np.where(visible, shifted, 0) / shifted[visible].sum()


def stick_weights(logits, visible, own):
  """Weights of stick-breaking, from the newest key to the oldest."""
  del own
  return _break(logits, [j for j in reversed(range(len(logits))) if visible[j]])


def nearest_weights(logits, visible, own):
  """Stick-breaking weights from the nearest key to the farthest.

  The order is the query's own key, the next one, the one before, and so on.
  """
  order = [own]
  for distance in range(1, len(logits)):
    order += [own + distance, own - distance]
  known = [j for j in order if 0 <= j < len(logits) and visible[j]]
  return _break(logits, known)


def _break(logits, order):
  weights, stick = np.zeros(len(logits)), 1.0
  for j in order:
    weights[j] = stick * special.expit(logits[j])
    stick -= weights[j]
  return weights


INNER = {
  'softmax': (inner_attention.Softmax(), softmax_weights),
  'stick': (inner_attention.StickBreaking(), stick_weights),
  'nearest': (inner_attention.NearestFirst(), nearest_weights),
}


def loop(params, queries, memory, mask, bias, weigh, renormalize=False):
  """Outputs [batch, query, embed], for one token and one module at a time."""
  as_float = functools.partial(
    jax.tree.map, lambda x: np.asarray(x, np.float64)
  )
  params, queries, memory, bias = map(as_float, (params, queries, memory, bias))
  heads = lambda x: x.reshape(*x.shape[:-1], HEADS, KV)
  keys, values = (
    heads(memory @ params[name]['kernel'] + params[f'{name}_bias'])
    for name in ('key', 'value')
  )
  router = params['router']['router_weights']['w']['kernel']
  outputs = np.zeros(queries.shape)
  for b, i in np.ndindex(queries.shape[:2]):
    visible = mask[b, 0, i]
    if not visible.any():
      continue
    probs = special.softmax(queries[b, i] @ router)
    chosen = np.argsort(-probs)[:K]
    gates = probs[chosen] / (probs[chosen].sum() if renormalize else 1)
    for module, gate in zip(chosen, gates, strict=True):
      own = heads(queries[b, i] @ params['expert']['query']['kernel'][module])
      found = np.zeros((HEADS, KV))
      for h in range(HEADS):
        logits = keys[b, :, h] @ own[h] / np.sqrt(KV) + bias[0, h, i]
        found[h] = weigh(logits, visible, i) @ values[b, :, h]
      out = params['expert']['out']['kernel'][module]
      outputs[b, i] += gate * (found.reshape(-1) @ out)
  return outputs


def make_layer(inner='softmax', **fields):
  fields = {'routing': tokens_choose.TokensChoose(K), 'use_bias': True} | fields
  return mixture_of_heads.MixtureOfAttentionHeads(
    HEADS, KV, num_experts=MODULES, inner=INNER[inner][0], **fields
  )


def make_arrays(layer, num_keys=KEYS, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  queries, memory = (
    normal(BATCH, QUERIES, EMBED),
    normal(BATCH, num_keys, EMBED),
  )
  shapes = jax.eval_shape(layer.init, jax.random.key(0), queries, memory)
  params = jax.tree.map(lambda leaf: normal(*leaf.shape), shapes['params'])
  mask = rng.random((BATCH, 1, QUERIES, num_keys)) < 0.6
  mask[0, 0, 2] = False  # This query is padding.
  return params, queries, memory, mask


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, queries, memory, mask, bias=None):
  return layer.apply(
    {'params': params},
    queries,
    memory,
    bias=bias,
    mask=mask,
    mutable=['router_stats'],
  )


def close(got, expected, rtol=1e-5):
  largest = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * largest)


@pytest.mark.slow
@pytest.mark.parametrize('inner', INNER)
def test_equals_the_loop(inner):
  renormalize = inner == 'softmax'
  router = tokens_choose.TokensChoose(K, renormalize=renormalize)
  layer = make_layer(inner, routing=router)
  num_keys = QUERIES if inner == 'nearest' else KEYS
  params, queries, memory, mask = make_arrays(layer, num_keys)
  bias = np.zeros((1, HEADS, QUERIES, num_keys), np.float32)
  if inner == 'softmax':
    bias += np.random.default_rng(1).normal(size=bias.shape)
  got, sown = apply(layer, params, queries, memory, mask, bias)
  expected = loop(
    params, queries, memory, mask, bias, INNER[inner][1], renormalize
  )
  close(got, expected)
  np.testing.assert_array_equal(got[0, 2], 0)
  stats = sown['router_stats']['stats']
  assert (stats.num_tokens, stats.num_padding) == (BATCH * QUERIES, 1)
  assert stats.num_choices == K * (BATCH * QUERIES - 1)


def test_padding_may_be_routed_as_in_the_code_of_moduleformer():
  layer = make_layer(routes_padding=True)
  params, queries, memory, mask = make_arrays(layer)
  _, sown = apply(layer, params, queries, memory, mask)
  stats = sown['router_stats']['stats']
  assert (stats.num_padding, stats.num_loss_tokens) == (0, BATCH * QUERIES)


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {'groups': token_groups.TokenGroups(4)},
    {'groups': token_groups.SequenceGroups()},
    {'dispatch': capacity_dispatch.CapacityDispatch(9.0)},
  ],
  ids=['groups', 'sequences', 'capacity'],
)
def test_groups_and_ample_capacity_change_nothing(changes):
  layer = make_layer()
  params, queries, memory, mask = make_arrays(layer)
  expected, _ = apply(layer, params, queries, memory, mask)
  got, _ = apply(make_layer(**changes), params, queries, memory, mask)
  close(got, expected, 1e-6)


@pytest.mark.slow
def test_all_modules_with_even_gates_are_the_mean_of_dense_attentions():
  layer = make_layer(routing=tokens_choose.TokensChoose(MODULES))
  params, queries, memory, mask = make_arrays(layer)
  params['router'] = jax.tree.map(jnp.zeros_like, params['router'])
  mask[0, 0, 2, 1] = True
  total = 0.0
  for module in range(MODULES):
    own = jax.tree.map(lambda x, m=module: x[m], params['expert'])
    dense = multi_head.MultiHeadAttention(HEADS, KV)
    # The kernel of queries includes the division by sqrt(kv). There are no
    # biases.
    tree = {name: params[name] for name in ('key', 'value')} | {
      'query': {'kernel': own['query']['kernel'] / np.sqrt(KV)},
      'out': own['out'],
    }
    total += dense.apply({'params': tree}, queries, memory, mask=mask)
  params |= {f'{name}_bias': jnp.zeros(JOINED) for name in ('key', 'value')}
  got, _ = apply(layer, params, queries, memory, mask)
  close(got, total / MODULES)


@pytest.mark.slow
def test_nearest_first_is_stick_breaking_where_nothing_ahead_is_seen():
  params, queries, _, _ = make_arrays(make_layer('nearest'), QUERIES)
  causal = np.tril(np.ones((QUERIES, QUERIES), bool))[None, None]
  causal = np.broadcast_to(causal, (BATCH, 1, QUERIES, QUERIES))
  got, expected = (
    apply(make_layer(inner), params, queries, queries, causal)[0]
    for inner in ('nearest', 'stick')
  )
  close(got, expected)


def test_visits_are_by_distance_the_next_before_the_one_before():
  order = inner_attention.visits(5)[:, ::-1]
  np.testing.assert_array_equal(order[1], [1, 2, 0, 3, 4])
  np.testing.assert_array_equal(order[4], [4, 3, 2, 1, 0])


@pytest.mark.slow
@pytest.mark.parametrize('inner', INNER)
def test_gradients_are_finite_and_equal_differences(inner):
  layer = make_layer(inner)
  num_keys = QUERIES if inner == 'nearest' else KEYS
  params, queries, memory, mask = make_arrays(layer, num_keys)
  cotangent = np.random.default_rng(2).normal(size=queries.shape)
  bias = np.zeros((1, HEADS, QUERIES, num_keys), np.float32)

  def objective(params):
    outputs = layer.apply({'params': params}, queries, memory, mask=mask)
    return jnp.sum(outputs * cotangent)

  grads = jax.jit(jax.grad(objective))(params)
  direction = jax.tree.map(
    lambda x: np.random.default_rng(3).normal(size=x.shape), params
  )

  def shifted(step):
    moved = jax.tree.map(
      lambda x, d: np.asarray(x, np.float64) + step * d, params, direction
    )
    found = loop(moved, queries, memory, mask, bias, INNER[inner][1])
    return np.sum(found * cotangent)

  expected = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
  got = sum(
    np.sum(np.asarray(g, np.float64) * d)
    for g, d in zip(
      jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True
    )
  )
  assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_step_by_step_equals_all_at_once():
  """The decoder caches keys and values of a module's heads."""
  layer = make_layer('stick')
  params, tokens, _, _ = make_arrays(layer)
  causal = np.tril(np.ones((QUERIES, QUERIES), bool))[None, None]
  expected, _ = apply(layer, params, tokens, tokens, causal)

  @jax.jit
  def decode(cache, tokens):
    return layer.apply(
      {'params': params, 'cache': cache},
      tokens,
      tokens,
      decode=True,
      mutable=['cache'],
    )

  _, shapes = jax.eval_shape(decode, {}, tokens)
  variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  assert variables['cache']['cached_key'].shape == (BATCH, HEADS, KV, QUERIES)
  outputs = []
  for i in range(QUERIES):
    one, variables = decode(variables['cache'], tokens[:, i : i + 1])
    outputs.append(one)
  close(jnp.concatenate(outputs, axis=1), expected, 1e-6)


@pytest.mark.slow
def test_errors():
  make = functools.partial(mixture_of_heads.MixtureOfAttentionHeads, HEADS, KV)
  with pytest.raises(ValueError, match=r'but is 5. Lower k of TokensChoose'):
    make(num_experts=4, routing=tokens_choose.TokensChoose(5))
  with pytest.raises(ValueError, match=r'must be a TokensChoose, but is'):
    make(routing=experts_choose.ExpertsChoose())
  with pytest.raises(ValueError, match=r'num_heads must be 1, but is 3. Use'):
    make(identity_memory=True)
  with pytest.raises(ValueError, match=r'num_experts must be positive, but'):
    make(num_experts=0)
  layer = mixture_of_heads.MixtureOfAttentionHeads(1, 5, identity_memory=True)
  with pytest.raises(ValueError, match=r'the width of the model, 6, but is 5'):
    layer.init(jax.random.key(0), *2 * (jnp.ones((1, 2, EMBED)),))
  with pytest.raises(ValueError, match=r'there are 5 queries and 7 keys. Use'):
    make_arrays(make_layer('nearest'))
  with pytest.raises(ValueError, match=r'num_experts must be a multiple of'):
    make_layer().check_mesh({'data': 1, 'expert': 3, 'model': 1}, 3, 4096)
  with pytest.raises(ValueError, match=r'num_heads \* head_dim must be a'):
    make_layer().check_mesh({'data': 1, 'expert': 2, 'model': 4}, 2, 4096)
