"""Tests SigmaMoe against a float64 loop over tokens, and what it refuses.

Also tests `initial_experts`.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import paper_sinkhorn
import pytest

from mowe.layers.dispatch import (
  capacity_dispatch,
  dropless_dispatch,
  token_groups,
)
from mowe.layers.mixtures import initial_experts, sigma_moe
from mowe.layers.routers import (
  router_base,
  router_losses,
  sinkhorn_choose,
  tokens_choose,
)

BATCH, LENGTH, EMBED, EXPERT_DIM, NUM_EXPERTS, K = 3, 10, 6, 4, 5, 2

ROUTERS = {
  'sigmoid': tokens_choose.TokensChoose(K, sigmoid=True, use_bias=True),
  'sigmoid_shares': tokens_choose.TokensChoose(
    K, sigmoid=True, renormalize=True
  ),
  'softmax': tokens_choose.TokensChoose(K),
  'softmax_after': tokens_choose.TokensChoose(K, renormalize=True),
  'excluded': tokens_choose.TokensChoose(K, sigmoid=True, exclusion_rate=0.6),
  'excluded_shares': tokens_choose.TokensChoose(
    K, renormalize=True, exclusion_rate=0.6
  ),
}


def make_case(router, **fields):
  layer = sigma_moe.SigmaMoe(
    NUM_EXPERTS,
    EXPERT_DIM,
    routing=ROUTERS.get(router, router),
    use_bias=True,
    **fields,
  )
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
  ids = np.zeros((BATCH, LENGTH), np.int32)
  ids[:, 8:] = -1
  ids[1, :3] = -1
  variables = jax.eval_shape(layer.init, jax.random.key(0), tokens, ids)
  params = flax.core.unfreeze(variables['params'])
  # All parameters are drawn again, so that biases are not zero and logits are
  # spread.
  params = jax.tree.map(
    lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), params
  )
  return layer, params, tokens, ids


def excluded_of(layer, params, key):
  """The mask of excluded experts that the layer draws, shaped like logits."""
  found = []

  def remember(call, args, kwargs, context):
    result = call(*args, **kwargs)
    if type(context.module).__name__ == 'ExcludedExperts':
      found.append(result)
    return result

  @jax.jit
  def draw(params, key):
    tokens = jnp.zeros((BATCH, LENGTH, EMBED))
    with flax.linen.intercept_methods(remember):
      layer.apply(
        {'params': params}, tokens, deterministic=False, rngs={'dropout': key}
      )
    return [layer.groups.merge(mask, BATCH, LENGTH) for mask in found]

  masks = draw(params, key)
  return np.asarray(masks[0]) if masks else None


def oracle(layer, params, tokens, ids, excluded):
  """Outputs, and the regularizers of the batch and of sequences, in float64."""
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  w = p['router']['router_weights']['w']
  z = tokens.astype(np.float64) @ w['kernel'] + w.get('bias', 0)
  q = np.exp(z - z.max(-1, keepdims=True))
  q /= q.sum(-1, keepdims=True)
  s = 1 / (1 + np.exp(-z)) if layer.routing.sigmoid else q
  wi, wo = p['expert']['wi'], p['expert']['wo']['kernel']
  outputs = np.zeros(tokens.shape)
  for b, t in np.ndindex(BATCH, LENGTH):
    outputs[b, t] = p['bias']
    if ids[b, t] < 0:
      continue
    live = [
      e for e in range(NUM_EXPERTS) if excluded is None or not excluded[b, t, e]
    ]
    chosen = sorted(live, key=lambda e: -z[b, t, e])[:K]
    total = s[b, t, chosen].sum() if layer.routing.renormalize else 1.0
    for e in chosen:
      hidden = np.maximum(tokens[b, t] @ wi['kernel'][e] + wi['bias'][e], 0)
      outputs[b, t] += s[b, t, e] / total * (hidden @ wo[e])
  information = lambda q: np.sum(q.mean(0) * np.log(q.mean(0)))
  real = ids >= 0
  rows = [b for b in range(BATCH) if real[b].any()]
  of_sequences = [information(q[b, real[b]]) for b in rows]
  return (
    outputs,
    information(q[real]),
    np.average(of_sequences, None, real.sum(1)[rows]),
  )


def close(actual, expected):
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )


@pytest.mark.slow
@pytest.mark.parametrize('router', ROUTERS)
@pytest.mark.parametrize('dispatch', ['dropless', 'capacity'])
def test_values_and_gradients_equal_the_loop(router, dispatch):
  dispatch = {
    'dropless': dropless_dispatch.DroplessDispatch(),
    'capacity': capacity_dispatch.CapacityDispatch(9.0),
  }[dispatch]
  layer, params, tokens, ids = make_case(router, dispatch=dispatch)
  key = jax.random.key(5)
  excluded = excluded_of(layer, params, key)
  assert (excluded is not None) == (layer.routing.exclusion_rate > 0)
  if excluded is not None:
    # Some tokens are left with one expert or none.
    assert np.any(excluded.sum(-1) > NUM_EXPERTS - K)
  rng = np.random.default_rng(1)
  cotangent = rng.normal(size=tokens.shape)

  def objective(params, tokens):
    outputs, sown = layer.apply(
      {'params': params},
      tokens,
      ids,
      deterministic=False,
      rngs={'dropout': key},
      mutable=['router_stats'],
    )
    total, count = router_losses.losses(sown['router_stats']['stats'])[
      'entropy_regularizer'
    ]
    value = jnp.sum(outputs * cotangent.astype(np.float32)) + total / count
    return value, (outputs, total / count)

  gradient = jax.jit(jax.grad(objective, (0, 1), has_aux=True))
  found, (outputs, regularizer) = gradient(params, tokens)
  expected, information, _ = oracle(layer, params, tokens, ids, excluded)
  close(outputs, expected)
  close(regularizer, information)

  def value(params, tokens):
    outputs, information, _ = oracle(layer, params, tokens, ids, excluded)
    return np.sum(outputs * cotangent) + information

  # Gradients are compared with central differences along random directions.
  leaves, tree = jax.tree.flatten((params, np.asarray(tokens, np.float64)))
  for i, leaf in enumerate(leaves):
    direction = rng.normal(size=leaf.shape)
    values = [
      value(*tree.unflatten([*leaves[:i], moved, *leaves[i + 1 :]]))
      for moved in (
        np.asarray(leaf, np.float64) + sign * 1e-6 * direction
        for sign in (1, -1)
      )
    ]
    slope = np.sum(np.asarray(jax.tree.leaves(found)[i]) * direction)
    largest = np.linalg.norm(jax.tree.leaves(found)[i])
    assert abs(slope - (values[0] - values[1]) / 2e-6) < 2e-5 * largest * (
      np.linalg.norm(direction)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('losses', 'number'),
  [(router_losses.RouterLosses(), 1), (router_losses.GroupEntropyLosses(), 2)],
)
def test_regularisers_of_the_batch_and_of_sequences(losses, number):
  layer, params, tokens, ids = make_case(
    'softmax', losses=losses, groups=token_groups.SequenceGroups()
  )
  ids[2] = -1  # A sequence without real tokens does not count.
  _, sown = jax.jit(
    lambda *inputs: layer.apply(*inputs, mutable=['router_stats'])
  )({'params': params}, tokens, ids)
  total, count = router_losses.losses(sown['router_stats']['stats'])[
    'entropy_regularizer'
  ]
  assert count == 8 + 5
  expected = oracle(layer, params, tokens, ids, None)
  close(total / count, expected[number])
  assert not np.isclose(expected[1], expected[2], rtol=1e-3)


def test_large_logits_are_ranked_as_logits():
  # In float32 all these sigmoids are 1, so only the logits themselves have an
  # order.
  logits = jnp.asarray([[[30.0, 50.0, 40.0, 60.0]]])
  router = tokens_choose.TokensChoose(2, sigmoid=True)
  choices = router(
    router_base.RouterInputs(is_valid=jnp.ones((1, 1), bool), logits=logits),
    num_experts=4,
  )
  np.testing.assert_array_equal(choices.experts, [[3, 1]])
  np.testing.assert_array_equal(choices.weights, [[1.0, 1.0]])


def test_a_token_without_experts_is_skipped_and_counted():
  router = tokens_choose.TokensChoose(2, sigmoid=True, exclusion_rate=0.5)
  excluded = jnp.asarray([[[True] * 3, [True, False, True], [False] * 3]])
  choices = router(
    router_base.RouterInputs(
      is_valid=jnp.ones((1, 3), bool),
      logits=jnp.asarray([[[1.0, 2.0, 3.0]] * 3]),
      excluded=excluded,
    ),
    num_experts=3,
    training=True,
  )
  # Each of the three tokens has two choices; expert 3 means none.
  np.testing.assert_array_equal(choices.experts, [[3, 3, 1, 3, 2, 1]])
  second, third = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-3))
  np.testing.assert_allclose(
    choices.weights, [[0, 0, second, 0, third, second]], rtol=1e-6
  )


@pytest.mark.slow
def test_sinkhorn_balances_and_the_papers_iteration_does_not():
  logits = 3 * jax.random.normal(jax.random.key(0), (2, 60, 4))
  is_valid = jnp.arange(60)[None] < jnp.asarray([[60], [40]])
  router = sinkhorn_choose.SinkhornChoose(1, sigmoid=True, iterations=50)
  r = np.exp(router.log_assignment(logits, is_valid)) * is_valid[:, :, None]
  # The rows of real tokens sum to 1, and all columns to an even share.
  np.testing.assert_allclose(r.sum(2), is_valid, atol=1e-4)
  np.testing.assert_allclose(r.sum(1), [[15] * 4, [10] * 4], rtol=1e-5)
  paper = paper_sinkhorn.PaperSinkhornChoose(1, sigmoid=True, iterations=50)
  r = np.exp(paper.log_assignment(logits, is_valid)) * is_valid[:, :, None]
  assert np.all(r < 1e-6)


@pytest.mark.slow
def test_sinkhorn_assigns_in_training_only():
  logits = jax.random.normal(jax.random.key(0), (1, 40, 4)).at[..., 0].add(9.0)
  is_valid = jnp.ones((1, 40), bool)
  router = sinkhorn_choose.SinkhornChoose(1, sigmoid=True, iterations=9)
  loads = [
    np.bincount(
      np.ravel(
        router(
          router_base.RouterInputs(is_valid=is_valid, logits=logits),
          num_experts=4,
          training=training,
        ).experts
      ),
      minlength=4,
    )
    for training in (False, True)
  ]
  np.testing.assert_array_equal(loads[0], [40, 0, 0, 0])
  assert loads[1].min() >= 5
  assert router.looks_ahead


@pytest.mark.slow
def test_the_deviations_of_fresh_parameters():
  layer = sigma_moe.SigmaMoe(
    16, 24, initialization=initial_experts.SigmaInit(3)
  )
  tokens = jnp.zeros((1, 2, 80))
  params = jax.jit(layer.init)(jax.random.key(0), tokens)['params']
  std = lambda fan_in: np.sqrt(2 / (3 * fan_in))
  expert = params['expert']
  assert np.std(expert['wi']['kernel']) == pytest.approx(std(80), rel=0.02)
  assert np.std(expert['wo']['kernel']) == pytest.approx(std(16 * 24), rel=0.02)
  # The normal distribution is not truncated.
  assert np.abs(expert['wi']['kernel']).max() > 3 * std(80)
  kernel = np.asarray(params['router']['router_weights']['w']['kernel'])
  assert np.std(kernel) == pytest.approx(std(80), rel=0.05)
  norms = np.linalg.norm(kernel, axis=0)
  np.testing.assert_allclose(norms, norms[0], rtol=1e-5)
  # This is the "standard init" of the paper.
  single = initial_experts.SingleExpertInit(3, scale=0.1)
  layer = layer.clone(initialization=single)
  params = jax.jit(layer.init)(jax.random.key(0), tokens)
  kernel = params['params']['expert']['wo']['kernel']
  assert np.std(kernel) == pytest.approx(np.sqrt(0.1) * std(24), rel=0.02)


# Each case has the width, the experts and their width, and the parameters of
# one block in the paper's models.
@pytest.mark.parametrize(
  ('embed', 'num_experts', 'expert_dim', 'expected'),
  [
    (412, 16, 128, 1_694_144),
    (1024, 32, 128, 8_421_376),
    (512, 16, 128, 2_105_344),
  ],
)
def test_the_papers_sizes(embed, num_experts, expert_dim, expected):
  layer = sigma_moe.SigmaMoe(num_experts, expert_dim)
  variables = jax.eval_shape(
    layer.init, jax.random.key(0), jnp.zeros((1, 2, embed))
  )
  assert sum(x.size for x in jax.tree.leaves(variables['params'])) == expected


def test_what_cannot_work_is_refused():
  with pytest.raises(ValueError, match='experts, 3, but is 4. Lower k'):
    sigma_moe.SigmaMoe(3, 8)
  with pytest.raises(ValueError, match='is 1.0. sigma-MoE has 0.05 or 0.1'):
    tokens_choose.TokensChoose(2, exclusion_rate=1.0)
  with pytest.raises(ValueError, match='are 0 and 1.0. Set num_layers'):
    initial_experts.SigmaInit(0)
  with pytest.raises(ValueError, match='are 0 and 0.0. Leave out bias_rate'):
    sinkhorn_choose.SinkhornChoose(2, iterations=0)


def test_logits_that_are_not_finite_are_counted():
  layer, params, tokens, ids = make_case('sigmoid')
  tokens[0, 0, 0] = np.nan
  _, sown = jax.jit(
    lambda *inputs: layer.apply(*inputs, mutable=['router_stats'])
  )({'params': params}, tokens, ids)
  assert sown['router_stats']['stats'].num_not_finite == 1


def test_what_is_kept_for_the_gradient_grows_by_hidden_units_alone():
  # There are enough tokens that the padded rows of all experts are no more than
  # the pairs.
  batch, length, embed, expert_dim, experts = 2, 1024, 48, 8, 16
  tokens = jax.ShapeDtypeStruct((batch, length, embed), jnp.float32)

  def num_kept(k):
    layer = sigma_moe.SigmaMoe(
      experts, expert_dim, routing=tokens_choose.TokensChoose(k, sigmoid=True)
    )
    params = jax.eval_shape(layer.init, jax.random.key(0), tokens)['params']
    apply = lambda params, tokens: layer.apply({'params': params}, tokens)
    kept = jax.eval_shape(
      lambda *args: jax.vjp(apply, *args)[1], params, tokens
    )
    return sum(x.size for x in jax.tree.leaves(kept))

  # Each choice keeps its hidden units and some ten numbers of the plan, but no
  # copy of the token.
  of_choice = batch * length * (expert_dim + 12)
  assert num_kept(4) - num_kept(2) <= 2 * of_choice
  assert num_kept(8) - num_kept(4) <= 4 * of_choice
