"""Tests bfloat16 tables stored as bits, and unbiased stochastic rounding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mowe.layers.memory import bfloat16_bits

# These tests compare bits across programs.
pytestmark = pytest.mark.optimized


def _values(number=5000):
  rng = np.random.default_rng(0)
  return (rng.normal(size=number) * 10.0 ** rng.uniform(-6, 6, number)).astype(
    np.float32
  )


def test_nearest_and_back():
  values = _values()
  expected = values.astype(ml_dtypes.bfloat16)
  bits = bfloat16_bits.nearest(values)
  np.testing.assert_array_equal(bits, expected.view(np.uint16))
  np.testing.assert_array_equal(bfloat16_bits.to_float(bits), expected)
  # Arrays that are not bits are returned as they are.
  assert bfloat16_bits.to_float(jnp.asarray(values)).dtype == jnp.float32


def test_stochastic_rounding_gives_a_neighbour():
  values = _values()
  low = (values.view(np.uint32) >> 16).astype(np.uint16)
  bits = np.asarray(bfloat16_bits.stochastic(values, jax.random.key(0)))
  is_exact = low.astype(np.uint32) << 16 == values.view(np.uint32)
  np.testing.assert_array_equal(bits[is_exact], low[is_exact])
  assert set((bits - low).tolist()) == {0, 1}


def test_numbers_of_bfloat16_stay():
  values = _values().astype(ml_dtypes.bfloat16).astype(np.float32)
  for seed in range(3):
    bits = bfloat16_bits.stochastic(values, jax.random.key(seed))
    np.testing.assert_array_equal(bfloat16_bits.to_float(bits), values)


def test_rounding_is_unbiased_and_follows_its_key():
  number = 200_000
  for share in (0.03, 0.5, 0.8):
    # The value lies this far between two neighbors; below zero it is the same.
    value = np.float32(1 + share * 2**-7)
    for sign in (1, -1):
      values = np.full((50, number // 50), sign * value)
      bits = bfloat16_bits.stochastic(values, jax.random.key(7))
      rounded = np.asarray(bfloat16_bits.to_float(bits), np.float64)
      is_up = np.abs(rounded) > 1
      # The bound is five standard deviations of the mean of all draws.
      bound = 5 * np.sqrt(share * (1 - share) / number)
      assert abs(is_up.mean() - share) < bound
      # Neighboring draws must be independent, along both axes.
      for axis in (0, 1):
        first = np.take(is_up, range(is_up.shape[axis] - 1), axis) - share
        second = np.take(is_up, range(1, is_up.shape[axis]), axis) - share
        covariance = (first * second).mean() / (share * (1 - share))
        assert abs(covariance) < 6 / np.sqrt(number)
  values = np.full(1000, np.float32(1 + 2**-8))
  draws = [
    np.asarray(bfloat16_bits.stochastic(values, jax.random.key(seed)))
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(draws[0], draws[1])
  agreeing = (draws[0] == draws[2]).mean()
  assert 0.4 < agreeing < 0.6
