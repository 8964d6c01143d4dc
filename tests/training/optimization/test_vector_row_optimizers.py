"""Tests row optimizers of vectors against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.training.optimization import row_gradients, vector_row_optimizers

_ROWS, _PARTS, _WIDTH = 5, 2, 7
# The rows that each global step visits. Row 4 is never visited.
_VISITS = ([0, 2], [0, 1], [2], [0, 2, 1], [3, 0], [1, 2, 3])
_SCALAR = vector_row_optimizers.RowScalarAdam(0.1, b2=0.9, eps=1e-3)
_MOMENTUM = vector_row_optimizers.RowNormalizedMomentum(0.1, beta=0.8, eps=1e-3)


def _draw(seed):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(_ROWS, _PARTS, _WIDTH)).astype(np.float32)


def _train(optimizer):
  table = {'rows': jnp.asarray(_draw(0))}
  state = optimizer.init(table)
  update = jax.jit(optimizer.update)
  for step, visited in enumerate(_VISITS):
    ids = jnp.array(visited)
    some = lambda tree, ids=ids: jax.tree.map(lambda x: x[ids], tree)
    gradients = {'rows': row_gradients.Matrix(jnp.asarray(_draw(step + 1)))}
    rows, state_rows = update(
      some(gradients), some(state), some(table), jnp.int32(step)
    )
    put = lambda x, new, ids=ids: x.at[ids].set(new)
    table = jax.tree.map(put, table, rows)
    state = jax.tree.map(put, state, state_rows)
  return np.asarray(table['rows']), state


def _scalar_adam(row):
  """The trajectory of one row, over its visits alone."""
  value, nu, count = _draw(0)[row].astype(np.float64), 0.0, 0
  for step, visited in enumerate(_VISITS):
    if row in visited:
      gradient = _draw(step + 1)[row].astype(np.float64)
      count += 1
      nu = 0.9 * nu + 0.1 * (gradient**2).mean()
      value -= 0.1 * gradient / (np.sqrt(nu / (1 - 0.9**count)) + 1e-3)
  return value


def _normalized_momentum(row):
  """The dense algorithm on one row, which moves in its visits alone."""
  value = _draw(0)[row].astype(np.float64)
  momentum = np.zeros_like(value)
  for step, visited in enumerate(_VISITS):
    is_here = row in visited
    gradient = is_here * _draw(step + 1)[row].astype(np.float64)
    momentum = 0.8 * momentum + 0.2 * gradient
    if is_here:
      ahead = 0.8 * momentum + 0.2 * gradient
      norm = np.sqrt((ahead**2).sum(axis=-1, keepdims=True))
      value -= 0.18 * 0.1 * np.sqrt(_WIDTH) * ahead / (norm + 1e-3)
  return value


@pytest.mark.parametrize(
  ('optimizer', 'oracle'),
  [(_SCALAR, _scalar_adam), (_MOMENTUM, _normalized_momentum)],
)
def test_each_row_follows_its_own_visits(optimizer, oracle):
  found, _ = _train(optimizer)
  for row in range(_ROWS):
    np.testing.assert_allclose(found[row], oracle(row), rtol=0, atol=2e-6)
  # A row that is never visited keeps its bits.
  np.testing.assert_array_equal(found[4], _draw(0)[4])


def test_a_normalized_step_has_the_same_size_for_each_row():
  before = _draw(0)
  gradients = {
    'rows': row_gradients.Matrix(
      jnp.asarray(_draw(1)) * 10.0 ** jnp.arange(_ROWS)[:, None, None]
    )
  }
  optimizer = vector_row_optimizers.RowNormalizedMomentum(0.5)
  table = {'rows': jnp.asarray(before)}
  rows, _ = jax.jit(optimizer.update)(
    gradients, optimizer.init(table), table, jnp.int32(0)
  )
  step = np.asarray(rows['rows']) - before
  size = np.sqrt((step**2).mean(axis=-1))
  np.testing.assert_allclose(size, 0.18 * 0.5, rtol=1e-4)


def test_a_part_without_a_gradient_stays():
  optimizer = vector_row_optimizers.RowNormalizedMomentum(0.5)
  table = {'rows': jnp.asarray(_draw(0))}
  state = optimizer.init(table)
  update = jax.jit(optimizer.update)
  # The second part has a gradient in the first step alone.
  first = jnp.asarray(_draw(1))
  later = first.at[:, 1].set(0.0)
  table, state = update(
    {'rows': row_gradients.Matrix(first)}, state, table, jnp.int32(0)
  )
  after, _ = update(
    {'rows': row_gradients.Matrix(later)}, state, table, jnp.int32(1)
  )
  np.testing.assert_array_equal(after['rows'][:, 1], table['rows'][:, 1])
  assert (after['rows'][:, 0] != table['rows'][:, 0]).all()


def test_the_state_of_a_scalar_optimizer_is_two_numbers_per_row():
  state = _SCALAR.init({'rows': jnp.zeros((_ROWS, _PARTS, _WIDTH))})
  assert sum(x.size for x in jax.tree.leaves(state)) == 2 * _ROWS


@pytest.mark.parametrize('optimizer', [_SCALAR, _MOMENTUM])
def test_other_shapes_are_refused(optimizer):
  with pytest.raises(ValueError, match=r'must be \[num_experts, a, b\]'):
    optimizer.init({'rows': jnp.zeros((_ROWS, _WIDTH))})
