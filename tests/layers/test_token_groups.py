"""Groups by hand: whole sequences, and consecutive tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers import capacity_dispatch, moe, token_groups


def test_consecutive_tokens_in_as_few_groups_as_can_be():
  array = jnp.arange(10).reshape(2, 5)
  # 10 tokens in groups of at most 4: three, with two places to fill.
  groups = token_groups.TokenGroups(4)
  split = groups.split(array, -1)
  np.testing.assert_array_equal(
    split, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
  )
  np.testing.assert_array_equal(groups.merge(split, 2, 5), array)


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
    dispatch=capacity_dispatch.CapacityDispatch(1e-9, 1e-9, min_capacity=2),
    groups=token_groups.SequenceGroups(),
  )
  tokens = jax.random.normal(jax.random.key(0), (4, length, 6))
  params = jax.jit(layer.init)(jax.random.key(1), tokens)['params']
  run = jax.jit(
    lambda tokens: layer.apply(
      {'params': params}, tokens, mutable=['router_stats']
    )
  )
  together, state = run(tokens)
  alone = [run(tokens[i : i + 1])[0][0] for i in range(4)]
  np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
  stats = state['router_stats']['stats']
  assert np.all(stats.load <= 4 * 2)
  assert np.sum(stats.load) + np.sum(stats.dropped) == 4 * length
