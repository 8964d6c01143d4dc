"""Tests what a fresh state holds, with frozen experts or without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training

from mowe.models import parameters
from mowe.models.t5 import t5
from mowe.training import train_state
from mowe.training.optimization import row_optimizers


@functools.cache
def _model():
  return t5.T5(tiny_training.make_config())


def _create(rows, key=0):
  return train_state.create(
    _model(),
    jax.random.key(key),
    optimizer=optax.adam(0.1),
    row_optimizer=rows,
  )


def _shapes(rows):
  return jax.eval_shape(lambda: _create(rows))


def test_tables_are_apart_from_params():
  state = _shapes(row_optimizers.RowAdafactor(0.1))
  assert set(state.params) == {'token_embedder', 'encoder', 'decoder'}
  assert {name: x.shape for name, x in state.tables['experts'].items()} == {
    'wi_0': (tiny_training.EXPERTS, 24, 4),
    'wi_1': (tiny_training.EXPERTS, 24, 4),
    'wo': (tiny_training.EXPERTS, 4, 24),
  }
  for leaf in jax.tree.leaves(state.table_state):
    assert leaf.shape[0] == tiny_training.EXPERTS
  assert state.step.shape == () and state.step.dtype == jnp.int32
  # The optimizer of ordinary parameters does not know of tables.
  names = str(jax.tree_util.tree_structure(state.opt_state))
  assert 'experts' not in names


def test_frozen_tables_have_no_state():
  state = _shapes(None)
  assert state.table_state == {}
  trained = _shapes(row_optimizers.RowAdafactor(0.1))
  assert state.params == trained.params and state.tables == trained.tables


@pytest.mark.slow
def test_equal_keys_give_equal_states():
  create = jax.jit(
    lambda key: train_state.create(
      _model(),
      key,
      optimizer=optax.sgd(0.1),
      row_optimizer=row_optimizers.RowAdafactor(0.1),
    )
  )
  one, again = create(jax.random.key(1)), create(jax.random.key(1))
  tiny_training.assert_same_bits(one, again)
  other = create(jax.random.key(2))
  assert not np.array_equal(
    one.tables['experts']['wo'], other.tables['experts']['wo']
  )


def test_split_and_merge_are_inverse():
  params = {
    'encoder': {'mlp': {'experts': {'wo': 1, 'wi': 2}, 'wo': {'kernel': 3}}},
    'experts': {'wo': 4},
    'token_embedder': {'embedding': 5},
  }
  ordinary, tables = parameters.split_tables(params)
  assert tables == {
    'encoder/mlp/experts': {'wo': 1, 'wi': 2},
    'experts': {'wo': 4},
  }
  assert ordinary == {
    'encoder': {'mlp': {'wo': {'kernel': 3}}},
    'token_embedder': {'embedding': 5},
  }
  assert parameters.merge_tables(ordinary, tables) == params


def test_a_table_of_another_rank_is_refused():
  with pytest.raises(ValueError, match='num_experts, a, b'):
    row_optimizers.RowAdafactor(0.1).init({'wo': jnp.zeros((3, 2))})
