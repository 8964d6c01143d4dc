"""Tests MoeLayer against a float64 loop over tokens, and its properties.

The loop does not know of slots. It takes the router's logits, decides pair by
pair, and computes one token with one expert at a time.

Also tests `capacity_dispatch`, `dispatch_base`, `dropless_dispatch`, `experts`,
`mixture`, `router_statistics`, and `slots`.
"""

import dataclasses
import functools

import drawn_parameters
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers import feed_forward
from mowe.layers.dispatch import (
  capacity_dispatch,
  dropless_dispatch,
  token_groups,
)
from mowe.layers.mixtures import moe
from mowe.layers.routers import (
  experts_choose,
  hash_routing,
  router_losses,
  tokens_choose,
)

BATCH, LENGTH, EMBED, EXPERT_DIM, NUM_EXPERTS = 6, 7, 5, 3, 4
NUM_IDS = 9

ROUTERS = {
  'top1': tokens_choose.TokensChoose(),
  'top2': tokens_choose.TokensChoose(2, renormalize=True),
  'top2_firsts': tokens_choose.TokensChoose(
    2, renormalize=True, first_choices_first=True
  ),
  'top3_priority': tokens_choose.TokensChoose(
    3, renormalize=True, batch_prioritized=True
  ),
  'sigmoid': tokens_choose.TokensChoose(2, sigmoid=True, bias_rate=0.01),
  'experts': experts_choose.ExpertsChoose(1.5),
  'hash': hash_routing.HashRouter(NUM_IDS),
  'table': hash_routing.HashRouter(
    NUM_IDS, table=hash_routing.balanced_table(np.arange(NUM_IDS), NUM_EXPERTS)
  ),
}
DISPATCHES = {
  'dropless': dropless_dispatch.DroplessDispatch(),
  'tight': capacity_dispatch.CapacityDispatch(0.5, 1),
  'ample': capacity_dispatch.CapacityDispatch(9.0),
}
COMBINATIONS = [
  (router, dispatch)
  for router in ROUTERS
  for dispatch in DISPATCHES
  if (router, dispatch) != ('experts', 'tight')
]


def make_case(seed, router, dispatch, **fields):
  """A layer with two groups of three sequences with padding, and its inputs."""
  rng = np.random.default_rng(seed)
  fields = {'groups': token_groups.TokenGroups(22)} | fields
  layer = moe.MoeLayer(
    NUM_EXPERTS,
    EXPERT_DIM,
    routing=ROUTERS.get(router, router),
    dispatch=DISPATCHES.get(dispatch, dispatch),
    **fields,
  )
  tokens = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
  ids = rng.integers(0, NUM_IDS, size=(BATCH, LENGTH)).astype(np.int32)
  ids[:, 5:] = -1
  ids[1, :3] = -1
  params = drawn_parameters.variables(layer, tokens, ids, seed=seed)['params']
  if 'router' in params:
    # Logits are far from even, so that capacities bind.
    kernel = rng.normal(size=(EMBED, NUM_EXPERTS)).astype(np.float32)
    params['router']['router_weights']['w']['kernel'] = jnp.asarray(kernel)
    if 'selection_bias' in params['router']:
      bias = jnp.asarray([0.3, -0.2, 0.1, 0.0])
      params['router']['selection_bias'] = bias
  return layer, params, tokens, ids


@functools.partial(jax.jit, static_argnums=0)
def run(layer, params, tokens, ids):
  outputs, sown = layer.apply(
    {'params': params},
    tokens,
    ids,
    # As in training, capacities bind; but there is no dropout.
    deterministic=False,
    mutable=['router_stats'],
  )
  return outputs, sown['router_stats']['stats']


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def scores_of(layer, logits):
  if getattr(layer.routing, 'sigmoid', False):
    return 1 / (1 + np.exp(-logits))
  exp = np.exp(logits - logits.max(-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


def decide(layer, params, tokens, ids):
  """The (token, expert) pairs that are kept, decided in float64 one by one."""
  flat_ids = ids.reshape(-1)
  rows = layer.groups.size // LENGTH
  num_groups = -(-BATCH // rows)
  size = rows * LENGTH
  if layer.routing.is_learned:
    kernel = params['router']['router_weights']['w']['kernel']
    logits = tokens.reshape(-1, EMBED).astype(np.float64) @ np.asarray(kernel)
    scores = scores_of(layer, logits)
  kept = []
  for group in range(num_groups):
    # The first tokens of all sequences of a group come before all second ones.
    real = [
      row * LENGTH + position
      for position in range(LENGTH)
      for row in range(group * rows, min((group + 1) * rows, BATCH))
      if ids[row, position] >= 0
    ]
    router = layer.routing
    if isinstance(router, experts_choose.ExpertsChoose):
      room = round(router.factor * len(real) / NUM_EXPERTS)
      pairs = [
        (t, e)
        for e in range(NUM_EXPERTS)
        for t in sorted(real, key=lambda t, e=e: -scores[t, e])[:room]
      ]
    elif router.is_learned:
      bias = np.asarray(
        params['router'].get('selection_bias', np.zeros(NUM_EXPERTS))
      )
      chosen = {t: np.argsort(-(scores[t] + bias))[: router.k] for t in real}
      if router.batch_prioritized:
        real = sorted(real, key=lambda t: -scores[t, chosen[t][0]])
      if router.looks_ahead:
        pairs = [(t, chosen[t][j]) for j in range(router.k) for t in real]
      else:
        pairs = [(t, chosen[t][j]) for t in real for j in range(router.k)]
    else:
      assigned = np.asarray(
        router._assigned(jnp.asarray(flat_ids), NUM_EXPERTS)
      )
      pairs = [(t, assigned[t]) for t in real if flat_ids[t] < NUM_IDS]
    room = len(pairs)
    if isinstance(layer.dispatch, capacity_dispatch.CapacityDispatch):
      share = router.num_pairs(size, NUM_EXPERTS) / NUM_EXPERTS
      room = max(
        round(layer.dispatch.factor * share), layer.dispatch.min_capacity
      )
    taken = np.zeros(NUM_EXPERTS, int)
    for t, e in pairs:
      taken[e] += 1
      if taken[e] <= room:
        kept.append((t, e))
  return kept


def oracle(layer, kept, params, tokens):
  """Outputs for the given pairs in float64."""
  params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  x = np.asarray(tokens, np.float64).reshape(-1, EMBED)
  outputs = np.zeros(x.shape)
  expert = {name: w['kernel'] for name, w in params['expert'].items()}
  if layer.routing.is_learned:
    logits = x @ params['router']['router_weights']['w']['kernel']
    scores = scores_of(layer, logits)
  chosen = {}
  if getattr(layer.routing, 'renormalize', False):
    chosen = {t: np.argsort(-scores[t])[: layer.routing.k] for t, _ in kept}
  for t, e in kept:
    weight = scores[t, e] if layer.routing.is_learned else 1.0
    if chosen:
      weight /= scores[t, chosen[t]].sum()
    hidden = gelu(x[t] @ expert['wi_0'][e]) * (x[t] @ expert['wi_1'][e])
    outputs[t] += weight * (hidden @ expert['wo'][e])
  return outputs.reshape(tokens.shape)


def close(actual, expected):
  expected = np.asarray(expected)
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )


@pytest.mark.slow
@pytest.mark.parametrize(('router', 'dispatch'), COMBINATIONS)
def test_values_and_gradients_equal_the_loop(router, dispatch):
  layer, params, tokens, ids = make_case(0, router, dispatch)
  kept = decide(layer, params, tokens, ids)
  rng = np.random.default_rng(1)
  cotangent = rng.normal(size=tokens.shape)

  def objective(params, tokens):
    outputs, stats = run(layer, params, tokens, ids)
    return jnp.sum(outputs * cotangent.astype(np.float32)), (outputs, stats)

  gradient = jax.jit(jax.grad(objective, (0, 1), has_aux=True))
  (d_params, d_tokens), (outputs, stats) = gradient(params, tokens)
  close(outputs, oracle(layer, kept, params, tokens))
  # The pairs are constant. Gradients are compared with central differences
  # along random directions.
  value = lambda p, x: np.sum(oracle(layer, kept, p, x) * cotangent)
  step = 1e-5
  trained = {'params': params, 'tokens': tokens}
  found = {'params': d_params, 'tokens': d_tokens}
  for part in trained:
    leaves, structure = jax.tree.flatten(trained[part])
    for i, leaf in enumerate(leaves):
      leaf = np.asarray(leaf, np.float64)
      direction = rng.normal(size=leaf.shape)
      moved = [
        {
          **trained,
          part: structure.unflatten(leaves[:i] + [x] + leaves[i + 1 :]),
        }
        for x in (leaf + step * direction, leaf - step * direction)
      ]
      up, down = (value(m['params'], m['tokens']) for m in moved)
      expected = (up - down) / (2 * step)
      d = np.asarray(jax.tree.leaves(found[part])[i], np.float64)
      scale = np.linalg.norm(d) * np.linalg.norm(direction) + 1e-6
      assert abs(np.sum(d * direction) - expected) < 2e-5 * scale
  load = np.bincount([e for _, e in kept], minlength=NUM_EXPERTS)
  np.testing.assert_array_equal(stats.load, load)


@pytest.mark.slow
@pytest.mark.parametrize(('router', 'dispatch'), COMBINATIONS)
@pytest.mark.parametrize('seed', range(2))
def test_every_token_and_choice_is_counted(router, dispatch, seed):
  layer, params, tokens, ids = make_case(seed, router, dispatch)
  ids[0, :3] = NUM_IDS  # Routers by id give these tokens no expert.
  _, stats = run(layer, params, tokens, ids)
  kept = decide(layer, params, tokens, ids)
  # The batch is exactly two groups of three sequences, so no group is filled
  # up.
  assert stats.num_tokens == BATCH * LENGTH
  assert stats.num_padding == np.sum(ids < 0)
  computed = len({t for t, _ in kept})
  assert stats.num_tokens == (
    stats.num_padding + stats.num_skipped + stats.num_left_behind + computed
  )
  assert stats.num_choices == np.sum(stats.load) + np.sum(stats.dropped)
  k = getattr(layer.routing, 'k', 1)
  if router != 'experts':
    assert stats.num_choices == k * (
      stats.num_tokens - stats.num_padding - stats.num_skipped
    )
  if dispatch != 'tight':
    assert np.sum(stats.dropped) == 0
  else:
    assert np.sum(stats.dropped) > 0
  assert stats.num_not_finite == 0


@pytest.mark.parametrize('router', ROUTERS)
def test_ample_capacity_equals_dropless(router):
  found = []
  for dispatch in ('ample', 'dropless'):
    layer, params, tokens, ids = make_case(3, router, dispatch)
    found.append(run(layer, params, tokens, ids)[0])
  close(*found)


@pytest.mark.slow
@pytest.mark.parametrize(('router', 'dispatch'), COMBINATIONS)
def test_padding_changes_no_real_token(router, dispatch):
  layer, params, tokens, ids = make_case(4, router, dispatch)
  outputs, _ = run(layer, params, tokens, ids)
  padding = (ids < 0)[:, :, None]
  noise = 100 * np.random.default_rng(0).normal(size=tokens.shape)
  noisy = np.where(padding, noise, tokens).astype(np.float32)
  changed, _ = run(layer, params, noisy, ids)
  np.testing.assert_array_equal(outputs, changed)
  np.testing.assert_array_equal(np.where(padding, outputs, 0), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('router', 'dispatch'),
  [c for c in COMBINATIONS if not ROUTERS[c[0]].looks_ahead],
)
def test_causal_in_training(router, dispatch):
  """Later tokens of any sequence must not change an earlier output of any."""
  layer, params, tokens, ids = make_case(8, router, dispatch)
  outputs, _ = run(layer, params, tokens, ids)
  # These are other numbers than those of the case.
  rng = np.random.default_rng(80)
  for first in (2, 4):
    is_later = np.arange(LENGTH)[None, :] >= first
    others = rng.normal(size=tokens.shape).astype(np.float32)
    other_ids = np.where(ids < 0, ids, rng.integers(0, NUM_IDS, ids.shape))
    changed, _ = run(
      layer,
      params,
      np.where(is_later[:, :, None], others, tokens),
      np.where(is_later, other_ids, ids).astype(np.int32),
    )
    close(changed[:, :first], outputs[:, :first])
    assert np.any(changed[:, first:5] != outputs[:, first:5])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('router', 'dispatch'), [('experts', 'dropless'), ('top2', 'tight')]
)
def test_a_sequence_is_evaluated_as_if_it_were_alone(router, dispatch):
  layer, params, tokens, ids = make_case(9, router, dispatch)
  evaluate = jax.jit(
    lambda tokens, ids: layer.apply({'params': params}, tokens, ids)
  )
  together = evaluate(tokens, ids)
  for row in (0, 1, 5):
    one = slice(row, row + 1)
    close(evaluate(tokens[one], ids[one]), together[one])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('router', 'dispatch'),
  [c for c in COMBINATIONS if c[0] in ('top1', 'top3_priority', 'experts')],
)
def test_renumbering_experts_changes_nothing(router, dispatch):
  layer, params, tokens, ids = make_case(5, router, dispatch)
  order = np.random.default_rng(5).permutation(NUM_EXPERTS)
  moved = {
    'expert': jax.tree.map(lambda w: w[order], params['expert']),
    'router': jax.tree.map(lambda w: w[:, order], params['router']),
  }
  outputs, stats = run(layer, params, tokens, ids)
  others, other_stats = run(layer, moved, tokens, ids)
  close(others, outputs)
  np.testing.assert_array_equal(stats.load[order], other_stats.load)


@pytest.mark.slow
@pytest.mark.parametrize('dispatch', ['dropless', 'ample'])
def test_one_expert_is_the_dense_feed_forward(dispatch):
  layer = moe.MoeLayer(1, EXPERT_DIM, dispatch=DISPATCHES[dispatch])
  tokens = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, EMBED))
  params = drawn_parameters.variables(layer, tokens)['params']
  dense = jax.tree.map(lambda w: w[0], params['expert'])
  expected = jax.jit(feed_forward.DenseFeedForward(EXPERT_DIM).apply)(
    {'params': dense}, tokens
  )
  # With one expert, the softmax of the single logit is one.
  close(jax.jit(layer.apply)({'params': params}, tokens), expected)


@pytest.mark.slow
def test_shared_expert_is_added():
  layer, params, tokens, ids = make_case(
    6, 'top2', 'dropless', shared_expert_dim=7
  )
  shared = jax.jit(feed_forward.DenseFeedForward(7).apply)(
    {'params': params['shared_expert']}, tokens
  )
  both, _ = run(layer, params, tokens, ids)
  alone = layer.clone(shared_expert_dim=0)
  routed, _ = run(
    alone, {k: params[k] for k in ('router', 'expert')}, tokens, ids
  )
  close(both, routed + shared)


@pytest.mark.slow
@pytest.mark.parametrize('dispatch', ['dropless', 'ample'])
def test_dropout_and_jitter_draw_from_the_dropout_stream(dispatch):
  router = tokens_choose.TokensChoose(2, jitter=0.5)
  layer, params, tokens, ids = make_case(
    7, router, dispatch, expert_dropout_rate=0.5
  )

  @functools.partial(jax.jit, static_argnums=1)
  def apply(key, layer):
    return layer.apply(
      {'params': params},
      tokens,
      ids,
      deterministic=False,
      rngs={'dropout': jax.random.key(key)},
    )

  np.testing.assert_array_equal(apply(0, layer), apply(0, layer))
  assert np.any(apply(0, layer) != apply(1, layer))
  quiet = jax.jit(layer.apply)({'params': params}, tokens, ids)
  # Without jitter and dropout, training computes the same as evaluation.
  still = layer.clone(
    routing=dataclasses.replace(router, jitter=0.0), expert_dropout_rate=0.0
  )
  close(apply(0, still), quiet)


@pytest.mark.slow
def test_parameters_have_flaxformers_names_and_axes():
  layer = moe.MoeLayer(NUM_EXPERTS, EXPERT_DIM)
  variables = jax.eval_shape(
    layer.init, jax.random.key(0), jnp.ones((1, 2, EMBED))
  )
  flat = flax.traverse_util.flatten_dict(variables['params'], sep='/')
  shapes = {name: value.shape for name, value in flat.items()}
  assert shapes == {
    'router/router_weights/w/kernel': (EMBED, NUM_EXPERTS),
    'expert/wi_0/kernel': (NUM_EXPERTS, EMBED, EXPERT_DIM),
    'expert/wi_1/kernel': (NUM_EXPERTS, EMBED, EXPERT_DIM),
    'expert/wo/kernel': (NUM_EXPERTS, EXPERT_DIM, EMBED),
  }
  axes = flax.traverse_util.flatten_dict(variables['params_axes'], sep='/')
  names = {name: value.names for name, value in axes.items()}
  assert names == {
    'router/router_weights/w/kernel_axes': ('embed', 'unmodeled'),
    'expert/wi_0/kernel_axes': ('expert', 'embed', 'expert_mlp'),
    'expert/wi_1/kernel_axes': ('expert', 'embed', 'expert_mlp'),
    'expert/wo/kernel_axes': ('expert', 'expert_mlp', 'embed'),
  }


@pytest.mark.slow
@pytest.mark.parametrize('k', [1, 2])
def test_dropless_memory_is_that_of_its_tokens(k):
  """No array may have the tokens x experts x capacity of one-hot dispatch."""
  num_experts, embed = 64, 16
  layer = moe.MoeLayer(
    num_experts, 8, routing=tokens_choose.TokensChoose(k, renormalize=k > 1)
  )

  def temporaries(num_tokens):
    tokens = jax.ShapeDtypeStruct((1, num_tokens, embed), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), tokens)['params']
    loss = lambda params, x: jnp.sum(layer.apply({'params': params}, x) ** 2)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = temporaries(1024), temporaries(4096)
  # For four times the tokens, one-hot dispatch would need 16 times the memory.
  assert many < 6 * few
  # That is an eighth of one float32 array of the size of one-hot dispatch.
  assert many < 4 * 4096 * num_experts * (4096 * k // num_experts) / 8


@pytest.mark.slow
def test_stats_of_parts_add_up():
  layer, params, tokens, ids = make_case(
    8, 'top2', 'tight', groups=token_groups.TokenGroups(LENGTH)
  )
  _, whole = run(layer, params, tokens, ids)
  first = run(layer, params, tokens[:1], ids[:1])[1]
  rest = run(layer, params, tokens[1:], ids[1:])[1]
  jax.tree.map(close, router_losses.add(first, rest), whole)


@pytest.mark.slow
def test_bad_settings_are_named():
  make = lambda **fields: moe.MoeLayer(NUM_EXPERTS, EXPERT_DIM, **fields)
  with pytest.raises(ValueError, match='Lower k of TokensChoose'):
    make(routing=tokens_choose.TokensChoose(5))
  with pytest.raises(ValueError, match='Use SequenceGroups, or Capacity'):
    make(dispatch=capacity_dispatch.SequenceCapacity())
  with pytest.raises(ValueError, match='factor of ExpertsChoose'):
    make(routing=ROUTERS['experts'], dispatch=DISPATCHES['tight'])
  with pytest.raises(ValueError, match='or raise k'):
    tokens_choose.TokensChoose(1, renormalize=True)
  with pytest.raises(ValueError, match='balanced_table for this number'):
    make(routing=hash_routing.HashRouter(2, table=(0, 4)))
  with pytest.raises(ValueError, match='DroplessDispatch has no capacity'):
    capacity_dispatch.CapacityDispatch(0.0)
  tokens = jnp.ones((2, 4, EMBED))
  key = jax.random.key(0)
  with pytest.raises(ValueError, match='Raise min_capacity'):
    make(dispatch=capacity_dispatch.CapacityDispatch(0.1, 0)).init(
      key, tokens, deterministic=False
    )
  with pytest.raises(ValueError, match='-1 for padding'):
    make(routing=ROUTERS['hash']).init(key, tokens)
  with pytest.raises(ValueError, match='ids of the same tokens'):
    make().init(key, tokens, jnp.zeros((4, 2), jnp.int32))


def test_logits_that_are_not_finite_are_counted():
  layer, params, tokens, ids = make_case(9, 'top1', 'tight')
  tokens[0, 0] = np.nan
  tokens[1, 0] = np.nan  # This token is padding.
  outputs, stats = run(layer, params, tokens, ids)
  assert stats.num_not_finite == 1
  assert np.isnan(outputs[0, 0]).all()


@pytest.mark.parametrize('number', [np.nan, np.inf])
def test_padding_that_is_not_finite_changes_no_statistic(number):
  layer, params, tokens, ids = make_case(3, 'top2', 'dropless')
  _, expected = run(layer, params, tokens, ids)
  padding = ids[:, :, None] == -1
  assert padding.any()
  _, found = run(layer, params, np.where(padding, number, tokens), ids)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_the_bias_after_an_expert_may_be_its_own():
  layer = moe.MoeLayer(
    3,
    4,
    ('relu',),
    routing=tokens_choose.TokensChoose(2),
    use_bias=True,
    expert_output_bias=True,
  )
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), tokens)['params']
  params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
  assert set(params) == {'router', 'expert'}
  wi, wo = params['expert']['wi'], params['expert']['wo']
  assert (wi['bias'].shape, wo['bias'].shape) == ((3, 4), (3, 6))
  expected = np.zeros(tokens.shape)
  router = params['router']['router_weights']['w']['kernel']
  for b, i in np.ndindex(2, 5):
    token = np.asarray(tokens[b, i], np.float64)
    logits = np.exp(token @ router)
    for e in np.argsort(-logits)[:2]:
      hidden = np.maximum(token @ wi['kernel'][e] + wi['bias'][e], 0)
      output = hidden @ wo['kernel'][e] + wo['bias'][e]
      expected[b, i] += logits[e] / logits.sum() * output
  got = jax.jit(layer.apply)({'params': params}, tokens)
  largest = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * largest)
