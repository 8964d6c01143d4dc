"""Tests our Threefry: it must draw what JAX draws, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.models import threefry

# These tests compare bits across programs.
pytestmark = pytest.mark.optimized


_SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 3)]


def _keys(seed=5):
  return threefry.key(seed), jax.random.key(seed)


@pytest.mark.slow
@pytest.mark.parametrize('shape', _SHAPES, ids=str)
def test_bits_are_jaxs(shape):
  own, jaxs = _keys()
  for dtype in (jnp.uint32, jnp.uint16, jnp.uint8):
    np.testing.assert_array_equal(
      jax.random.bits(own, shape, dtype), jax.random.bits(jaxs, shape, dtype)
    )


def test_bits_of_two_words_are_jaxs():
  with jax.enable_x64():
    own, jaxs = _keys()
    np.testing.assert_array_equal(
      jax.random.bits(own, (3, 5), jnp.uint64),
      jax.random.bits(jaxs, (3, 5), jnp.uint64),
    )


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2**31 - 1, -3])
def test_keys_of_any_seed_are_jaxs(seed):
  own, jaxs = _keys(seed)
  for bits in (
    jax.random.bits,
    lambda key: jax.random.bits(jax.random.fold_in(key, 2**32 - 1), (4, 3)),
    lambda key: jax.random.bits(jax.random.split(key, 3)[2], (4, 3)),
    lambda key: jax.random.key_data(jax.random.split(key, (2, 3))),
  ):
    np.testing.assert_array_equal(bits(own), bits(jaxs))


def test_normal_draws_are_jaxs():
  own, jaxs = (
    jax.random.truncated_normal(key, -2.0, 2.0, (40, 3)) for key in _keys()
  )
  # The last bit may differ, because erf_inv rounds otherwise when it is
  # compiled into one loop with the bits.
  np.testing.assert_allclose(own, jaxs, rtol=2e-6)


def test_elements_beyond_one_word_have_numbers_of_their_own(monkeypatch):
  # Here a word can number only four elements, because a test with more than
  # 2^32 elements would not fit into memory.
  monkeypatch.setattr(threefry, '_MOST', 4)
  high, low = threefry._counters((3, 2, 2))
  np.testing.assert_array_equal(high[:, 0, 0], [0, 1, 2])
  np.testing.assert_array_equal(low[1], [[0, 1], [2, 3]])
  pairs = set(zip(high.ravel().tolist(), low.ravel().tolist(), strict=True))
  assert len(pairs) == 12
  # If all axes together need more than one word, they are split between two.
  high, low = threefry._counters((2, 4, 3))
  pairs = set(zip(high.ravel().tolist(), low.ravel().tolist(), strict=True))
  assert len(pairs) == 24 and low.max() == 2


def test_no_temporary_memory():
  compiled = (
    jax.jit(lambda key: jax.random.normal(key, (64, 1024)))
    .lower(threefry.key(0))
    .compile()
    .memory_analysis()
  )
  assert compiled.output_size_in_bytes == 4 * 64 * 1024
  assert compiled.temp_size_in_bytes < 1024
