"""Tests TopKFeedForward by hand and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers import top_k_feed_forward

BATCH, LENGTH, EMBED, MLP, K = 2, 5, 4, 9, 3


@pytest.mark.parametrize('by_effect', [False, True])
@pytest.mark.parametrize('use_bias', [False, True])
def test_values_equal_the_sorted_units(by_effect, use_bias):
  layer = top_k_feed_forward.TopKFeedForward(
    MLP, k=K, ranks_by_effect=by_effect, use_bias=use_bias
  )
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
  params = jax.tree.map(
    lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32),
    jax.eval_shape(layer.init, jax.random.key(0), tokens)['params'],
  )
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  bias = lambda name: p[name].get('bias', 0)
  hidden = np.maximum(tokens @ p['wi']['kernel'] + bias('wi'), 0)
  ranks = hidden
  if by_effect:
    ranks = hidden * np.sqrt((p['wo']['kernel'] ** 2).sum(1))
  kept = np.zeros_like(hidden)
  for at in np.ndindex(BATCH, LENGTH):
    best = np.argsort(-ranks[at])[:K]
    kept[at][best] = hidden[at][best]
  expected = kept @ p['wo']['kernel'] + bias('wo')
  np.testing.assert_allclose(
    layer.apply({'params': params}, tokens),
    expected,
    rtol=0,
    atol=1e-5 * np.abs(expected).max(),
  )


def test_ties_stay_and_a_few_positive_units_all_stay():
  hidden = jnp.asarray([[5.0, 3, 3, 3, 1], [0, 2, 0, 0, 1]])
  found = top_k_feed_forward.strongest(hidden, hidden, 3)
  np.testing.assert_array_equal(found, [[5, 3, 3, 3, 0], [0, 2, 0, 0, 1]])


def test_any_numbers_are_ranked_as_by_sorting():
  units, k = 37, 11
  rng = np.random.default_rng(0)
  ranks = rng.normal(size=(6, units)) * 10.0 ** rng.integers(-30, 30, (6, 1))
  # These rows have many ties, infinities, and very small numbers.
  ranks[0] = rng.integers(-2, 3, units)
  ranks[1, :3] = np.inf, -np.inf, 1e-38
  ranks = ranks.astype(np.float32)
  kth = -np.sort(-ranks, axis=1)[:, k - 1 : k]
  found = top_k_feed_forward.strongest(jnp.ones_like(ranks), ranks, k)
  np.testing.assert_array_equal(found, ranks >= kth)
  ranks[:, 5] = [np.nan, -np.nan, *[np.nan] * (len(ranks) - 2)]
  found = top_k_feed_forward.strongest(jnp.asarray(ranks), ranks, k)
  assert np.isnan(found[:, 5]).all()


# Each case has the width, the hidden units, and the parameters of one dense
# block with biases in the paper.
@pytest.mark.parametrize(
  ('embed', 'mlp', 'expected'),
  [(412, 2053, 1_694_137), (1024, 4110, 8_422_414), (512, 2053, 2_104_837)],
)
def test_the_papers_sizes(embed, mlp, expected):
  layer = top_k_feed_forward.TopKFeedForward(mlp, k=128, use_bias=True)
  variables = jax.eval_shape(
    layer.init, jax.random.key(0), jnp.zeros((1, 2, embed))
  )
  assert sum(x.size for x in jax.tree.leaves(variables['params'])) == expected


def test_k_must_lie_among_the_units():
  for k in (0, 10):
    with pytest.raises(ValueError, match=f'k must lie in 1..9, .* but is {k}.'):
      top_k_feed_forward.TopKFeedForward(MLP, k=k)
