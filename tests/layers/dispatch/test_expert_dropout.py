"""Tests the masks of experts' hidden units."""

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers.dispatch import expert_dropout


def test_pairs_of_a_block_share_a_mask_of_the_rate():
  draw = lambda key: expert_dropout.ExpertDropout.draw(
    jax.random.key(key), 0.2, num_pairs=10, block=4, num_units=5000
  )
  keep = np.asarray(draw(0)(jnp.arange(10)))
  assert keep.shape == (10, 5000)
  np.testing.assert_allclose(np.unique(keep), [0, 1.25])
  for start in (0, 4, 8):
    assert np.all(keep[start : start + 4] == keep[start])
  assert np.any(keep[0] != keep[4]) and np.any(keep[4] != keep[8])
  # The three masks have 15,000 units, so five standard deviations are 0.017.
  assert abs(np.mean(keep[[0, 4, 8]] == 0) - 0.2) < 0.017
  # Pairs may come in any order, as they do in slots.
  np.testing.assert_array_equal(draw(0)(jnp.asarray([9, 3])), keep[[9, 3]])
  assert np.any(np.asarray(draw(1)(jnp.arange(10))) != keep)
