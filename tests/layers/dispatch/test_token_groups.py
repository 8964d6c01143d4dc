"""Tests groups by hand: whole sequences, and consecutive tokens."""

import drawn_parameters
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.dispatch import capacity_dispatch, token_groups
from mowe.layers.mixtures import moe


def test_whole_sequences_in_order_of_positions():
  array = jnp.arange(6).reshape(3, 2)
  # A group of at most 5 tokens has two sequences of two, so there are two
  # groups with one sequence added.
  groups = token_groups.TokenGroups(5)
  split = groups.split(array, -1)
  np.testing.assert_array_equal(split, [[0, 2, 1, 3], [4, -1, 5, -1]])
  np.testing.assert_array_equal(groups.merge(split, 3, 2), array)
  # A group has at least one sequence, even if that is longer than the group.
  for alone in (token_groups.TokenGroups(1), groups.single()):
    np.testing.assert_array_equal(alone.split(array, -1), array)
  # There are more groups than sequences, so the last group is all filling.
  more = token_groups.TokenGroups(5, multiple=4)
  split = more.split(array, -1)
  np.testing.assert_array_equal(split, [[0, 1], [2, 3], [4, 5], [-1, -1]])
  np.testing.assert_array_equal(more.merge(split, 3, 2), array)


def test_sequences_stay_as_they_are():
  array = jnp.arange(10).reshape(2, 5)
  groups = token_groups.SequenceGroups()
  np.testing.assert_array_equal(groups.split(array, -1), array)
  np.testing.assert_array_equal(groups.merge(array, 2, 5), array)


@pytest.mark.slow
@pytest.mark.parametrize('length', [7, 4])
def test_a_sequence_takes_no_slot_of_another(length):
  layer = moe.MoeLayer(
    3,
    5,
    # Each expert has two slots, no matter how long the sequences are.
    dispatch=capacity_dispatch.CapacityDispatch(1e-9, min_capacity=2),
    groups=token_groups.SequenceGroups(),
  )
  tokens = jax.random.normal(jax.random.key(0), (4, length, 6))
  params = drawn_parameters.variables(layer, tokens)['params']
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
