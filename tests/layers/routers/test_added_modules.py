"""Tests layers with added or removed modules against float64 loops.

Also tests `module_router`, `pruned_modules`, and `wrapped_router`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.dispatch import capacity_dispatch
from mowe.layers.mixtures import moe
from mowe.layers.routers import (
  added_modules,
  hash_routing,
  module_router,
  pruned_modules,
  router_base,
  router_losses,
  tokens_choose,
)

BATCH, LENGTH, EMBED, EXPERT_DIM, HIDDEN = 2, 7, 5, 3, 4
NUM_OLD, NUM_NEW, KEPT = 6, 3, (0, 2, 3, 5)
LOGITS = {
  'linear': router_base.LinearLogits(),
  'mlp': module_router.MlpLogits(HIDDEN),
}
TOP2 = tokens_choose.TokensChoose(2)


def make_case(layer, seed=0):
  """A layer, its parameters with uneven routers, and tokens with padding."""
  rng = np.random.default_rng(seed)
  tokens = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
  ids = np.zeros((BATCH, LENGTH), np.int32)
  ids[1, 4:] = -1
  shapes = jax.eval_shape(layer.init, jax.random.key(0), tokens, ids)['params']
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes
  )
  return params, tokens, ids


@functools.partial(jax.jit, static_argnums=0)
def run(layer, params, tokens, ids):
  outputs, sown = layer.apply(
    {'params': params}, tokens, ids, mutable=['router_stats']
  )
  return outputs, sown['router_stats']['stats']


def logits_of(params, tokens):
  """The logits of a router, <float64>[batch, length, columns]."""
  weights = params['router']['router_weights']
  x = tokens.astype(np.float64)
  if 'hidden' in weights:
    x = x @ weights['hidden']['kernel'] + weights['hidden']['bias']
    erf = np.vectorize(math.erf)
    x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
  return x @ np.asarray(weights['w']['kernel'], np.float64)


def expert_output(params, number, x):
  kernels = {k: v['kernel'].astype(np.float64) for k, v in params.items()}
  gate = x @ kernels['wi_0'][number]
  inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
  hidden = 0.5 * gate * (1 + np.tanh(inner)) * (x @ kernels['wi_1'][number])
  return hidden @ kernels['wo'][number]


def softmax(x):
  exp = np.exp(x - x.max())
  return exp / exp.sum()


def oracle(params, tokens, ids, gates_of):
  """Outputs as sums over the modules and weights of `gates_of(logits)`."""
  outputs = np.zeros(tokens.shape)
  logits = logits_of(params, tokens)
  for where in np.argwhere(ids >= 0):
    b, t = where
    for number, gate in gates_of(logits[b, t]):
      outputs[b, t] += gate * expert_output(
        params['expert'], number, tokens[b, t].astype(np.float64)
      )
  return outputs


def best(scores, k):
  return np.argsort(-scores, kind='stable')[:k]


def of_added(logits):
  """Two old modules by the softmax of old ones, and one new by that of all."""
  old, every = softmax(logits[:NUM_OLD]), softmax(logits)
  yield from ((m, old[m]) for m in best(old, 2))
  yield from (
    (NUM_OLD + m, every[NUM_OLD + m]) for m in best(every[NUM_OLD:], 1)
  )


def of_kept(logits):
  """Kept modules by the softmax of all, numbered as in the smaller layer."""
  probs = softmax(logits)
  kept = np.asarray(KEPT)
  yield from ((m, probs[kept[m]]) for m in best(probs[kept], 2))


def added_layer(logits='linear', **fields):
  router = added_modules.AddedChoose(TOP2, NUM_OLD)
  return moe.MoeLayer(
    NUM_OLD + NUM_NEW,
    EXPERT_DIM,
    logits=LOGITS[logits],
    **({'routing': router} | fields),
  )


def kept_layer(logits='linear', router=TOP2, **fields):
  settings = {
    'num_experts': len(KEPT),
    'expert_dim': EXPERT_DIM,
    'logits': pruned_modules.KeptLogits(LOGITS[logits], 2),
    'losses': pruned_modules.KeptLosses(
      moe.MoeLayer(2, 1).losses, KEPT, NUM_OLD
    ),
    'routing': pruned_modules.KeptChoose(router, KEPT, NUM_OLD),
  }
  return moe.MoeLayer(**(settings | fields))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('make', 'gates_of', 'logits'),
  [(added_layer, of_added, 'mlp'), (kept_layer, of_kept, 'linear')],
)
def test_outputs_are_those_of_a_loop(make, gates_of, logits):
  layer = make(logits)
  params, tokens, ids = make_case(layer)
  outputs, stats = run(layer, params, tokens, ids)
  expected = oracle(params, tokens, ids, gates_of)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5 * scale)
  per_token = 3 if make is added_layer else 2
  num_real = int((ids >= 0).sum())
  assert int(stats.load.sum()) == per_token * num_real == int(stats.num_choices)
  assert stats.load.shape == stats.total_probs.shape == (layer.num_experts,)
  assert int(stats.num_padding) == ids.size - num_real


@pytest.mark.slow
def test_new_modules_change_no_bit_of_old_choices():
  """The old choices keep their bits, however large the new logits are."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 5, NUM_OLD + NUM_NEW)).astype(np.float32)
  logits[:, :, NUM_OLD:] *= 50
  is_valid = np.arange(5)[None] < np.array([[5], [3]])
  router = added_modules.AddedChoose(TOP2, NUM_OLD)

  @functools.partial(jax.jit, static_argnums=0)
  def choose(router, logits):
    return router(
      router_base.RouterInputs(is_valid=is_valid, logits=logits),
      num_experts=logits.shape[-1],
    )

  old = choose(TOP2, logits[:, :, :NUM_OLD])
  new = choose(router, logits)
  np.testing.assert_array_equal(new.weights[:, :10], old.weights)
  np.testing.assert_array_equal(new.pairs[:, :, :2], old.pairs)
  none = old.experts == NUM_OLD
  assert (new.experts[:, :10][none] == NUM_OLD + NUM_NEW).all()
  np.testing.assert_array_equal(new.experts[:, :10][~none], old.experts[~none])


@pytest.mark.slow
def test_modules_that_give_nothing_change_no_output():
  """Only the order of sums differs, as products have another shape."""
  larger = added_layer('mlp')
  params, tokens, ids = make_case(larger)
  params['expert']['wo']['kernel'][NUM_OLD:] = 0
  params['router']['router_weights']['w']['kernel'][:, NUM_OLD:] *= 50
  old = moe.MoeLayer(NUM_OLD, EXPERT_DIM, logits=LOGITS['mlp'], routing=TOP2)
  experts = jax.tree.map(lambda x: x[:NUM_OLD], params['expert'])
  router = jax.tree.map(np.copy, params['router'])
  kernel = router['router_weights']['w']['kernel']
  router['router_weights']['w']['kernel'] = kernel[:, :NUM_OLD]
  expected, _ = run(old, {'expert': experts, 'router': router}, tokens, ids)
  actual, stats = run(larger, params, tokens, ids)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * scale)
  assert int(stats.load[NUM_OLD:].sum()) == (ids >= 0).sum()
  gradient = jax.grad(lambda p: jnp.sum(run(larger, p, tokens, ids)[0] ** 2))(
    params
  )
  assert np.abs(gradient['expert']['wo']['kernel'][NUM_OLD:]).sum() > 0


@pytest.mark.slow
def test_modules_are_added_twice_and_to_kept_ones():
  inner = added_modules.AddedChoose(TOP2, 4)
  twice = added_layer(routing=added_modules.AddedChoose(inner, NUM_OLD, 2))
  params, tokens, ids = make_case(twice)

  def gates_of(logits):
    first, second, every = (softmax(logits[:n]) for n in (4, 6, 9))
    yield from ((m, first[m]) for m in best(first, 2))
    yield from ((4 + m, second[4 + m]) for m in best(second[4:], 1))
    yield from ((6 + m, every[6 + m]) for m in best(every[6:], 2))

  expected = oracle(params, tokens, ids, gates_of)
  actual, _ = run(twice, params, tokens, ids)
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )

  kept = pruned_modules.KeptChoose(TOP2, KEPT, NUM_OLD)
  layer = kept_layer(
    routing=added_modules.AddedChoose(kept, len(KEPT)),
    num_experts=len(KEPT) + NUM_NEW,
  )
  params, tokens, ids = make_case(layer)

  def of_both(logits):
    yield from of_kept(logits[:NUM_OLD])
    every = softmax(logits)
    yield from (
      (len(KEPT) + m, every[NUM_OLD + m]) for m in best(every[NUM_OLD:], 1)
    )

  expected = oracle(params, tokens, ids, of_both)
  actual, stats = run(layer, params, tokens, ids)
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )
  assert stats.total_probs.shape == (7,)


@pytest.mark.slow
def test_a_token_that_never_chose_a_removed_module_is_as_it_was():
  whole = moe.MoeLayer(NUM_OLD, EXPERT_DIM, routing=TOP2)
  params, tokens, ids = make_case(whole)
  smaller = params | {
    'expert': jax.tree.map(lambda x: x[np.asarray(KEPT)], params['expert'])
  }
  before, _ = run(whole, params, tokens, ids)
  after, _ = run(kept_layer(), smaller, tokens, ids)
  chosen = np.argsort(-logits_of(params, tokens), axis=-1)[..., :2]
  same = np.isin(chosen, KEPT).all(-1)
  assert 0 < same.sum() < same.size
  scale = np.abs(before).max()
  np.testing.assert_allclose(
    after[same], before[same], rtol=0, atol=1e-6 * scale
  )


@pytest.mark.slow
def test_selection_bias_and_dropped_modules_go_with_their_columns():
  biased = tokens_choose.TokensChoose(2, bias_rate=0.1, exclusion_rate=0.3)
  for layer in (
    added_layer(routing=added_modules.AddedChoose(biased, NUM_OLD)),
    kept_layer(router=biased),
  ):
    params, tokens, ids = make_case(layer)
    assert params['router']['selection_bias'].shape == (layer.num_experts,)
    _, stats = run(layer, params, tokens, ids)
    in_training = functools.partial(
      layer.apply, deterministic=False, mutable=['router_stats']
    )
    outputs, sown = jax.jit(in_training)(
      {'params': params}, tokens, ids, rngs={'dropout': jax.random.key(1)}
    )
    assert np.isfinite(outputs).all()
    dropped = sown['router_stats']['stats']
    assert int(dropped.load.sum()) <= int(stats.load.sum())


def test_a_capacity_leaves_old_modules_first():
  """Pairs of new modules come after all pairs of old ones, so drop first."""
  layer = added_layer(dispatch=capacity_dispatch.CapacityDispatch(9.0))
  params, tokens, ids = make_case(layer)
  expected, _ = run(added_layer(), params, tokens, ids)
  actual, _ = run(layer, params, tokens, ids)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_taking_over_is_what_old_modules_lose():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(1, 4, NUM_OLD + NUM_NEW)).astype(np.float32)
  is_valid = np.array([[True, True, False, True]])
  probs = np.stack([softmax(row) for row in logits[0].astype(np.float64)])
  losses = added_modules.AddedLosses(router_losses.RouterLosses(), NUM_NEW)
  sums = jax.jit(losses.sums)(
    logits,
    probs[None].astype(np.float32),
    np.ones((1, NUM_OLD + NUM_NEW), np.int32),
    is_valid,
  )
  left = probs[:, :NUM_OLD].sum(-1)
  expected = -np.log(left[is_valid[0]]).sum()
  np.testing.assert_allclose(sums['takeover'], expected, rtol=1e-5)
  # This is the divergence of the old softmax from the new one.
  old = np.stack([softmax(row) for row in logits[0, :, :NUM_OLD]])
  divergence = (old * np.log(old / probs[:, :NUM_OLD])).sum(-1)
  np.testing.assert_allclose(divergence, -np.log(left), rtol=1e-5)


def test_parts_that_cannot_work_are_refused():
  with pytest.raises(ValueError, match='Train the model with TokensChoose'):
    added_modules.AddedChoose(hash_routing.HashRouter(7), 4)
  with pytest.raises(ValueError, match='Set k to the number of new modules'):
    added_modules.AddedChoose(TOP2, 4, 0)
  with pytest.raises(ValueError, match='number of new modules, 3, but is 4'):
    added_layer(routing=added_modules.AddedChoose(TOP2, NUM_OLD, 4))
  with pytest.raises(ValueError, match='Lower k of TokensChoose'):
    added_layer(routing=added_modules.AddedChoose(TOP2, 1))
  for kept in ((), (2, 2), (3, 1), (0, 6), (-1, 2)):
    with pytest.raises(ValueError, match='kept must be columns from 0 to 5'):
      pruned_modules.KeptChoose(TOP2, kept, 6)
  with pytest.raises(ValueError, match='as many modules as were kept, 4'):
    kept_layer(num_experts=5)
