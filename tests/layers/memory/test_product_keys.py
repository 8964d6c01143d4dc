"""Tests product-key memories against a search of all pairs in float64.

Also tests `memory_plus` and `peer`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.memory import peer, product_keys

BATCH, LENGTH, EMBED, HEADS, FIRST, SECOND, KNN = 2, 3, 6, 4, 5, 7, 9


def make_layer(sparse=True, **fields):
  fields = {
    'num_values': FIRST * SECOND,
    'num_first_keys': FIRST,
    'num_heads': HEADS,
  } | fields
  if sparse:
    return product_keys.ProductKeyMemory(**{'knn': KNN} | fields)
  return product_keys.DenseProductKeyMemory(**fields)


def make_params(layer, tokens, seed=0):
  params = jax.eval_shape(layer.init, jax.random.key(seed), tokens)['params']
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), params
  )


def make_tokens(seed=1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(BATCH, LENGTH, EMBED)), jnp.float32)


def oracle(layer, params, tokens):
  """Scores every value with every head, then follows the layer's docstring."""
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  outputs = np.zeros(tokens.shape)
  for at in np.ndindex(BATCH, LENGTH):
    x = np.asarray(tokens[at], np.float64)
    queries = [x] * HEADS
    if layer.use_query_projection:
      flat = x @ p['query']['kernel'] + p['query']['bias']
      queries = np.split(flat, HEADS)
    scores = np.stack(
      [
        np.add.outer(
          p['keys_0'][h] @ queries[h][: EMBED // 2],
          p['keys_1'][h] @ queries[h][EMBED // 2 :],
        ).ravel()
        for h in range(HEADS)
      ]
    )
    if isinstance(layer, product_keys.ProductKeyMemory):
      chosen = np.argsort(-scores, axis=1)[:, : layer.knn]
      scores = np.take_along_axis(scores, chosen, axis=1).ravel()
      rows = p['values'][chosen.ravel()]
    else:
      scores, rows = scores.sum(0), p['values']
    weights = np.maximum(scores, 0)
    if layer.activation == 'softmax':
      weights = np.exp(scores - scores.max())
      weights /= weights.sum()
    outputs[at] = weights @ rows
  return outputs


def close(actual, expected):
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )


@pytest.mark.slow
@pytest.mark.parametrize('sparse', [True, False])
@pytest.mark.parametrize('activation', ['relu', 'softmax'])
@pytest.mark.parametrize('projected', [True, False])
def test_values_and_gradients_equal_the_search(sparse, activation, projected):
  layer = make_layer(
    sparse, activation=activation, use_query_projection=projected
  )
  tokens = make_tokens()
  params = make_params(layer, tokens)
  cotangent = np.random.default_rng(2).normal(size=tokens.shape)

  def objective(params, tokens):
    outputs = layer.apply({'params': params}, tokens)
    return jnp.sum(outputs * cotangent.astype(np.float32)), outputs

  found, outputs = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(
    params, tokens
  )
  close(outputs, oracle(layer, params, tokens))
  rng = np.random.default_rng(3)
  leaves, tree = jax.tree.flatten((params, tokens))
  for i, leaf in enumerate(leaves):
    direction = rng.normal(size=leaf.shape)
    values = [
      np.sum(
        oracle(layer, *tree.unflatten([*leaves[:i], moved, *leaves[i + 1 :]]))
        * cotangent
      )
      for moved in (
        np.asarray(leaf, np.float64) + sign * 1e-6 * direction
        for sign in (1, -1)
      )
    ]
    gradient = np.asarray(jax.tree.leaves(found)[i])
    slope = np.sum(gradient * direction)
    scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
    assert abs(slope - (values[0] - values[1]) / 2e-6) < 2e-5 * scale


@pytest.mark.slow
@pytest.mark.parametrize(
  ('n1', 'n2', 'knn'), [(5, 7, 1), (20, 3, 12), (9, 9, 81)]
)
def test_the_best_pairs_are_exact(n1, n2, knn):
  rng = np.random.default_rng(0)
  # With few whole numbers there are many ties.
  first, second = (
    rng.integers(0, 5, size=(2, 3, n)).astype(np.float32) for n in (n1, n2)
  )
  best_pairs = jax.jit(product_keys.best_pairs, static_argnums=2)
  index, best = best_pairs(first, second, knn)
  sums = np.asarray(first)[..., :, None] + np.asarray(second)[..., None, :]
  sums = sums.reshape(2, 3, -1)
  np.testing.assert_array_equal(best, -np.sort(-sums)[..., :knn])
  np.testing.assert_array_equal(np.take_along_axis(sums, index, -1), best)
  assert all(len(set(row)) == knn for row in np.asarray(index).reshape(-1, knn))


@pytest.mark.slow
def test_dense_heads_with_one_query_are_one_head():
  tokens = make_tokens()
  layer = make_layer(sparse=False)
  params = make_params(layer, tokens)
  one = params | {
    name: params[name].sum(0, keepdims=True) for name in ('keys_0', 'keys_1')
  }
  close(
    jax.jit(layer.apply)({'params': params}, tokens),
    jax.jit(layer.clone(num_heads=1).apply)({'params': one}, tokens),
  )


@pytest.mark.slow
def test_one_head_of_all_values_is_dense():
  tokens = make_tokens()
  sparse = make_layer(num_heads=1, knn=FIRST * SECOND)
  params = make_params(sparse, tokens)
  dense = make_layer(sparse=False, num_heads=1)
  close(
    jax.jit(sparse.apply)({'params': params}, tokens),
    jax.jit(dense.apply)({'params': params}, tokens),
  )


# Each case has the width, the number of half-keys, and the parameters of one
# block in the paper's models.
@pytest.mark.parametrize(
  ('embed', 'number', 'expected'),
  [(412, 62, 1_685_904), (1024, 89, 8_475_648), (512, 62, 2_095_104)],
)
def test_the_papers_sizes(embed, number, expected):
  layer = product_keys.DenseProductKeyMemory(number**2)
  variables = jax.eval_shape(
    layer.init, jax.random.key(0), jnp.zeros((1, 2, embed))
  )
  assert sum(x.size for x in jax.tree.leaves(variables['params'])) == expected


def test_the_deviations_of_fresh_parameters():
  layer = product_keys.DenseProductKeyMemory(400, num_layers=3)
  params = layer.init(jax.random.key(0), jnp.zeros((1, 2, 80)))['params']
  # The fan-in is the whole width, because the scores of both halves are added.
  std = lambda fan_in: np.sqrt(2 / (3 * fan_in))
  assert np.std(params['keys_0']) == pytest.approx(std(80), rel=0.03)
  assert np.std(params['keys_1']) == pytest.approx(std(80), rel=0.03)
  assert np.std(params['values']) == pytest.approx(std(400), rel=0.02)


def test_sizes_that_do_not_factor_name_the_nearest():
  memory = product_keys.DenseProductKeyMemory
  with pytest.raises(ValueError, match=r'2053. .* 2025 \(45 .* 2116 \(46\)'):
    memory(2053)
  with pytest.raises(ValueError, match='num_first_keys, 6, .* multiple, 36'):
    memory(35, num_first_keys=6)
  with pytest.raises(ValueError, match='knn must lie in 1..9, .* but is 10'):
    product_keys.ProductKeyMemory(9, knn=10)
  with pytest.raises(ValueError, match="but is 'gelu'. Choose relu"):
    memory(9, activation='gelu')
  with pytest.raises(ValueError, match='but is 5. Make emb_dim 6'):
    memory(9).init(jax.random.key(0), jnp.zeros((1, 2, 5)))


def test_a_row_that_thousands_read_gets_its_whole_gradient():
  """Sums of gradients are in float32, whatever the dtype of the model is."""
  values = jnp.ones((3, 2), jnp.float32)
  index = jnp.zeros((4096, 1), jnp.int32)
  weights = jnp.ones((4096, 1), jnp.bfloat16)

  def total(values):
    return product_keys.weighted_rows(values, index, weights).sum()

  gradient = jax.grad(total)(values)
  np.testing.assert_array_equal(gradient, [[4096, 4096], [0, 0], [0, 0]])

  def products(rows):
    tokens = jnp.ones((4096, 2), jnp.bfloat16)
    return peer.row_products(rows, index, tokens).sum()

  gradient = jax.grad(products)(values)
  np.testing.assert_array_equal(gradient, [[4096, 4096], [0, 0], [0, 0]])
