"""Tests row optimizers against float64 numpy, optax, and dense Adafactor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mowe.training.optimization import optimizers, row_gradients, row_optimizers

_NUM_EXPERTS, _EMBED, _MLP = 5, 3, 4
# The experts that each global step visits. Expert 3 comes late, and 4 never.
_VISITS = ([0, 2], [0, 1], [2], [0, 2, 1], [3, 0], [1, 2, 3])
_SHAPES = {'wi': (_EMBED, _MLP), 'wo': (_MLP, _EMBED)}
_OPTIMIZERS = {
  'adafactor': row_optimizers.RowAdafactor(0.1),
  'adam': row_optimizers.RowAdam(0.1, weight_decay=0.5),
}


def _rate(step):
  """A schedule that has another value at each step."""
  return 0.1 / (1.0 + jnp.asarray(step, jnp.float32))


def _table(seed=0):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.normal(size=(_NUM_EXPERTS, *shape)), jnp.float32)
    for name, shape in _SHAPES.items()
  }


def _gradients(step):
  return jax.tree.map(lambda x: 3.0 * x, _table(seed=100 + step))


def _matrices(gradients):
  return {name: row_gradients.Matrix(g) for name, g in gradients.items()}


def _train(optimizer, table, visits=_VISITS, steps=None):
  """Gathers, updates and scatters the visited rows, padded to four."""
  state = optimizer.init(table)
  update = jax.jit(optimizer.update)
  for step, experts in zip(steps or range(len(visits)), visits, strict=True):
    padded = jnp.array(experts + [0] * (4 - len(experts)))
    gather = lambda tree, ids=padded: jax.tree.map(lambda x: x[ids], tree)
    rows, state_rows = update(
      gather(_matrices(_gradients(step))),
      gather(state),
      gather(table),
      jnp.int32(step),
    )
    # The rows of padding are scattered outside the table, which drops them.
    target = jnp.where(jnp.arange(4) < len(experts), padded, _NUM_EXPERTS)
    table = _scatter(table, target, rows)
    state = _scatter(state, target, state_rows)
  return table, state


def _gather(tree, ids):
  return jax.tree.map(lambda x: x[ids], tree)


def _scatter(tree, ids, rows):
  return jax.tree.map(lambda x, r: x.at[ids].set(r, mode='drop'), tree, rows)


def _visits_of(expert):
  return [step for step, experts in enumerate(_VISITS) if expert in experts]


def _train_alone(transformation, expert, visits=None):
  """Runs an optax transformation on one expert, for its own visits only."""
  params = jax.tree.map(lambda x: x[expert], _table())
  state = transformation.init(params)
  update = jax.jit(transformation.update)
  for step in _visits_of(expert) if visits is None else visits:
    gradients = jax.tree.map(lambda x: x[expert], _gradients(step))
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  return params


def _assert_expert(table, expert, expected):
  for name in _SHAPES:
    np.testing.assert_allclose(
      table[name][expert], expected[name], rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize('expert', range(4))
@pytest.mark.parametrize('scale', [False, True])
def test_adafactor_equals_optax_on_each_expert_alone(expert, scale):
  optimizer = row_optimizers.RowAdafactor(
    0.1, multiply_by_parameter_scale=scale
  )
  table, _ = _train(optimizer, _table())
  alone = optax.adafactor(
    0.1, min_dim_size_to_factor=1, multiply_by_parameter_scale=scale
  )
  _assert_expert(table, expert, _train_alone(alone, expert))
  dense = optimizers.Adafactor(
    0.1, min_dim_size_to_factor=1, multiply_by_parameter_scale=scale
  ).build(None)
  _assert_expert(table, expert, _train_alone(dense, expert))


@pytest.mark.parametrize('expert', range(4))
def test_adam_equals_optax_on_each_expert_alone(expert):
  table, state = _train(row_optimizers.RowAdam(0.1), _table())
  _assert_expert(table, expert, _train_alone(optax.adam(0.1), expert))
  assert state.counts[expert] == len(_visits_of(expert))
  assert state.last_visits[expert] == _visits_of(expert)[-1]


@pytest.mark.parametrize('max_norm', [5.0, 100.0])
def test_adam_clips_each_expert_alone(max_norm):
  norms = [
    float(optax.global_norm(jax.tree.map(lambda x: x[1], _gradients(step))))
    for step in _visits_of(1)
  ]
  assert 5.0 < min(norms) and max(norms) < 100.0
  table, _ = _train(row_optimizers.RowAdam(0.1, max_norm=max_norm), _table())
  alone = optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(0.1))
  _assert_expert(table, 1, _train_alone(alone, 1))


def test_adam_with_decay_equals_adamw_without_gaps():
  table, _ = _train(
    row_optimizers.RowAdam(0.1, weight_decay=0.5),
    _table(),
    visits=[[1]] * 4,
  )
  alone = optax.adamw(0.1, weight_decay=0.5)
  _assert_expert(table, 1, _train_alone(alone, 1, visits=range(4)))


def test_weight_decay_makes_up_for_the_gap():
  # Gradients are zero. The visits are at step 10, the first with a gap of 1,
  # and at step 13 with a gap of 3.
  optimizer = row_optimizers.RowAdam(0.1, weight_decay=0.5)
  rows = {'wi': jnp.ones((1, 2, 3))}
  zeros = _matrices({'wi': jnp.zeros((1, 2, 3))})
  state = optimizer.init(rows)
  rows, state = optimizer.update(zeros, state, rows, 10)
  np.testing.assert_allclose(rows['wi'], 0.95, rtol=1e-6)
  rows, state = optimizer.update(zeros, state, rows, 13)
  np.testing.assert_allclose(rows['wi'], 0.95 * 0.95**3, rtol=1e-6)


def test_adam_against_float64_numpy():
  optimizer = row_optimizers.RowAdam(_rate, weight_decay=0.3)
  table, state = _train(optimizer, _table())
  for expert in range(4):
    param = np.asarray(_table()['wi'][expert], np.float64)
    mu, nu, last = np.zeros_like(param), np.zeros_like(param), None
    for n, step in enumerate(_visits_of(expert), start=1):
      gradient = np.asarray(_gradients(step)['wi'][expert], np.float64)
      mu = 0.9 * mu + 0.1 * gradient
      nu = 0.999 * nu + 0.001 * gradient**2
      rate = 0.1 / (1 + step)  # This is the global step, not the visit.
      gap = 1 if last is None else step - last
      param = (1 - rate * 0.3) ** gap * param
      update = mu / (1 - 0.9**n) / (np.sqrt(nu / (1 - 0.999**n)) + 1e-8)
      param, last = param - rate * update, step
    np.testing.assert_allclose(table['wi'][expert], param, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(state.nu['wi'][expert], nu, rtol=1e-5)


def test_adafactor_against_float64_numpy():
  optimizer = row_optimizers.RowAdafactor(_rate, decay_rate=0.7)
  table, state = _train(optimizer, _table())
  for expert in range(4):
    param = np.asarray(_table()['wo'][expert], np.float64)
    row, column = np.zeros(_MLP), np.zeros(_EMBED)
    for n, step in enumerate(_visits_of(expert), start=1):
      gradient = np.asarray(_gradients(step)['wo'][expert], np.float64)
      decay = 1 - n**-0.7
      square = gradient**2
      row = decay * row + (1 - decay) * square.mean(axis=1)
      column = decay * column + (1 - decay) * square.mean(axis=0)
      update = gradient / np.sqrt(np.outer(row, column) / row.mean())
      update /= max(1, np.sqrt((update**2).mean()))
      scale = max(np.sqrt((param**2).mean()), 1e-3)
      param = param - 0.1 / (1 + step) * scale * update
    np.testing.assert_allclose(table['wo'][expert], param, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(state.v_row['wo'][expert], row, rtol=1e-5)
    np.testing.assert_allclose(state.v_col['wo'][expert], column, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', _OPTIMIZERS)
def test_rows_do_not_see_each_other(name):
  optimizer = _OPTIMIZERS[name]
  table, gradients = _table(), _matrices(_gradients(0))
  state = optimizer.init(table)
  update = jax.jit(optimizer.update)
  together, _ = update(gradients, state, table, 0)
  order = jnp.array([3, 1, 4, 0, 2])
  shuffle = lambda tree: jax.tree.map(lambda x: x[order], tree)
  shuffled, _ = update(shuffle(gradients), shuffle(state), shuffle(table), 0)
  jax.tree.map(
    np.testing.assert_array_equal, shuffle(dict(together)), dict(shuffled)
  )


@pytest.mark.parametrize('name', _OPTIMIZERS)
def test_outer_products_are_their_matrices(name):
  optimizer, table = _OPTIMIZERS[name], _table()
  rng = np.random.default_rng(0)
  # One expert has only zeros, as if it had not been used, and another has zeros
  # in one column.
  vector = lambda size: rng.normal(size=(_NUM_EXPERTS, size)).astype(np.float32)
  outer = {
    kernel: row_gradients.Outer(vector(a), vector(b))
    for kernel, (a, b) in _SHAPES.items()
  }
  outer['wi'].left[1] = 0
  outer['wi'].right[2, 1:] = 0
  matrices = _matrices(
    {
      kernel: np.einsum('na,nb->nab', gradient.left, gradient.right)
      for kernel, gradient in outer.items()
    }
  )
  state = optimizer.init(table)
  update = jax.jit(optimizer.update)
  for step in range(2):
    rows, rows_state = update(outer, state, table, step)
    table, state = update(matrices, state, table, step)
    assert jax.tree.structure(rows_state) == jax.tree.structure(state)
    for kernel in table:
      largest = np.abs(table[kernel]).max()
      np.testing.assert_allclose(
        rows[kernel], table[kernel], rtol=0, atol=1e-6 * largest
      )
    for ours, theirs in zip(
      jax.tree.leaves(rows_state), jax.tree.leaves(state), strict=True
    ):
      # Each array is compared by itself, because the means of rows of zeros are
      # 1e-30.
      np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-36)


@pytest.mark.parametrize('name', _OPTIMIZERS)
def test_state_has_the_experts_first_and_dtypes_stay(name):
  optimizer = _OPTIMIZERS[name]
  rows = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _table())
  state = jax.eval_shape(optimizer.init, rows)
  assert {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {_NUM_EXPERTS}
  gradients = _matrices(_gradients(0))
  new, new_state = jax.eval_shape(optimizer.update, gradients, state, rows, 3)
  assert {leaf.dtype for leaf in new.values()} == {jnp.bfloat16.dtype}
  assert new_state == state


@pytest.mark.parametrize('name', _OPTIMIZERS)
def test_other_shapes_are_refused(name):
  with pytest.raises(ValueError, match='out of the module called experts'):
    _OPTIMIZERS[name].init({'wi': jnp.ones((2, 3, 4)), 'scale': jnp.ones(2)})
  with pytest.raises(ValueError, match='same num_experts'):
    _OPTIMIZERS[name].init({'a': jnp.ones((2, 3, 4)), 'b': jnp.ones((3, 3, 4))})
