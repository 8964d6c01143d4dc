"""Tests updates of present experts: each once, and equal to dense gradients.

Also tests `row_gradients`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.memory import grouped
from mowe.training.optimization import row_gradients, table_updates
from mowe.words.plans import batch_plans

_EXPERTS, _IN, _OUT = 13, 4, 3
_SHAPES = {'encoder': (2, 9), 'decoder': (2, 5)}


@dataclasses.dataclass(frozen=True)
class _Descent:
  """Plain gradient descent that counts the visits of each expert."""

  def init(self, table):
    return jnp.zeros((table['wi'].shape[0],), jnp.int32)

  def update(self, gradients, state_rows, rows, step):
    del step
    gradients = row_gradients.matrices(gradients)
    new = jax.tree.map(lambda p, g: p - g, rows, gradients)
    return new, state_rows + 1


def _make_case(num_layers, streams=('encoder', 'decoder')):
  """Table, plan, routing ids and factors; `num_layers` is for each stream."""
  rng = np.random.default_rng(0)
  ids = {
    # The ids are skewed, with padding (-1) and words without an expert
    # (_EXPERTS).
    name: rng.choice([-1, _EXPERTS, 0, 0, 0, 0, 2, 3, 5, 7, 11], _SHAPES[name])
    for name in streams
  }
  ids = {name: x.astype(np.int32) for name, x in ids.items()}
  plan = batch_plans.Planner(
    batch_plans.profile_ladder([ids], _EXPERTS), _EXPERTS
  )(ids)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  factors = {
    name: [
      {
        kernel: grouped.Factors(
          normal(ids[name].size, a), normal(ids[name].size, b)
        )
        for kernel, a, b in (('wi', _IN, _OUT), ('wo', _OUT, _IN))
      }
      for _ in range(number)
    ]
    for name, number in num_layers.items()
    if number
  }
  table = {'wi': normal(_EXPERTS, _IN, _OUT), 'wo': normal(_EXPERTS, _OUT, _IN)}
  return table, plan, ids, factors


def _dense_gradient(table, ids, factors, name):
  gradient = np.zeros(table[name].shape)
  for stream, layers in factors.items():
    for layer in layers:
      for token, expert in enumerate(ids[stream].reshape(-1)):
        if 0 <= expert < _EXPERTS:
          x, g = layer[name]
          gradient[expert] += np.outer(x[token], g[token])
  return gradient


def _update(table, plan, factors, usable=True):
  state = _Descent().init(table)
  update = jax.jit(
    lambda table, state, factors, plan: table_updates.update_table(
      _Descent(),
      table_updates.TableAndState(table, state),
      factors=factors,
      plan=plan,
      step=table_updates.StepValues(jnp.asarray(usable), 0, jax.random.key(0)),
    )
  )
  return update(table, state, factors, plan)


@pytest.mark.slow
@pytest.mark.parametrize(
  'num_layers',
  [
    {'encoder': 1, 'decoder': 1},
    {'encoder': 3, 'decoder': 1},
    {'encoder': 1, 'decoder': 2},
    {'encoder': 0, 'decoder': 2},
    {'encoder': 1, 'decoder': 0},
  ],
)
@pytest.mark.parametrize('at_once', [1, 2, 1000])
def test_every_expert_of_the_table_moves_once_by_its_gradient(
  num_layers, at_once, monkeypatch
):
  monkeypatch.setattr(grouped, 'experts_at_once', lambda _: at_once)
  table, plan, ids, factors = _make_case(num_layers)
  new, visits = _update(table, plan, factors)
  for name in table:
    gradient = _dense_gradient(table, ids, factors, name)
    np.testing.assert_allclose(
      new[name],
      table[name] - gradient,
      rtol=0,
      atol=1e-5 * np.abs(gradient).max(),
    )
  used = np.concatenate([ids[stream].reshape(-1) for stream in factors])
  expected = np.isin(np.arange(_EXPERTS), used)
  np.testing.assert_array_equal(visits, expected)
  for name in table:
    np.testing.assert_array_equal(
      np.asarray(new[name])[~expected], table[name][~expected]
    )


def test_a_model_with_one_stream():
  num_layers = {'decoder': 2}
  table, plan, ids, factors = _make_case(num_layers, streams=('decoder',))
  new, visits = _update(table, plan, factors)
  gradient = _dense_gradient(table, ids, factors, 'wo')
  np.testing.assert_allclose(new['wo'], table['wo'] - gradient, atol=1e-5)
  assert set(np.flatnonzero(visits)) == set(
    ids['decoder'][(ids['decoder'] >= 0) & (ids['decoder'] < _EXPERTS)]
  )


def test_an_unusable_gradient_changes_nothing():
  table, plan, _, factors = _make_case({'encoder': 1, 'decoder': 1})
  factors['encoder'][0]['wi'].cotangents[:] = np.nan
  new, visits = _update(table, plan, factors, usable=False)
  assert not visits.any()
  for name in table:
    np.testing.assert_array_equal(new[name], table[name])
