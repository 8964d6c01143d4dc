"""Groups by hand: whole sequences, and consecutive tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.dispatch import capacity_dispatch, token_groups
from mowe.layers.mixtures import moe


def test_whole_sequences_in_order_of_positions():
  array = jnp.arange(6).reshape(3, 2)
  # Two sequences of two tokens are at most 5: two groups, with a row to fill.
  groups = token_groups.TokenGroups(5)
  split = groups.split(array, -1)
  np.testing.assert_array_equal(split, [[0, 2, 1, 3], [4, -1, 5, -1]])
  np.testing.assert_array_equal(groups.merge(split, 3, 2), array)
  # A sequence that is longer than a group is one of its own, as are all here.
  for alone in (token_groups.TokenGroups(1), groups.single()):
    np.testing.assert_array_equal(alone.split(array, -1), array)
  # More groups than sequences: the last ones are all filling.
  more = token_groups.TokenGroups(5, multiple=4)
  split = more.split(array, -1)
  np.testing.assert_array_equal(split, [[0, 1], [2, 3], [4, 5], [-1, -1]])
  np.testing.assert_array_equal(more.merge(split, 3, 2), array)


def test_sequences_stay_as_they_are():
  array = jnp.arange(10).reshape(2, 5)
  groups = token_groups.SequenceGroups()
  np.testing.assert_array_equal(groups.split(array, -1), array)
  np.testing.assert_array_equal(groups.merge(array, 2, 5), array)


@pytest.mark.parametrize('length', [7, 4])
def test_a_sequence_takes_no_slot_of_another(length):
  layer = moe.MoeLayer(
    3,
    5,
    # Two slots for an expert, however long the sequences are.
    dispatch=capacity_dispatch.CapacityDispatch(1e-9, min_capacity=2),
    groups=token_groups.SequenceGroups(),
  )
  tokens = jax.random.normal(jax.random.key(0), (4, length, 6))
  params = jax.jit(layer.init)(jax.random.key(1), tokens)['params']
  run = jax.jit(
    lambda tokens: layer.apply(
      {'params': params},
      tokens,
      deterministic=False,
      mutable=['router_stats'],
    )
  )
  together, state = run(tokens)
  alone = [run(tokens[i : i + 1])[0][0] for i in range(4)]
  np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
  stats = state['router_stats']['stats']
  assert np.all(stats.load <= 4 * 2)
  assert np.sum(stats.load) + np.sum(stats.dropped) == 4 * length
