"""Tests products of 64 bits in halves of 32 against integers of Python."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from mowe.words.addresses import wide_integers

IDS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3)
FACTORS = st.integers(0, 2**63 - 1)
DIVISORS = st.integers(1, 2**31 - 1)


def signed(number):
  """The number modulo 2^64, from -2^63 to 2^63 - 1."""
  return (number + 2**63) % 2**64 - 2**63


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(IDS, FACTORS, FACTORS, DIVISORS)
@hypothesis.example([-(2**31), -1, 2**31 - 1], 2**63 - 1, 1, 2**31 - 1)
@hypothesis.example([0, 1, 2], 2**32, 2**32 - 1, 1)
def test_equals_integers_of_python(ids, first, second, divisor):
  expected = [signed(i * first) ^ signed(i * second) for i in ids]
  for array in (np.array(ids, np.int32), jnp.asarray(ids, jnp.int32)):
    mixed = wide_integers.xor(
      wide_integers.times(array, first), wide_integers.times(array, second)
    )
    found = wide_integers.remainder(mixed, divisor)
    assert found.dtype == np.int32
    assert found.tolist() == [number % divisor for number in expected]


def test_compiles_to_32_bits():
  ids = jnp.arange(5, dtype=jnp.int32)
  text = (
    jax.jit(lambda x: wide_integers.remainder(wide_integers.times(x, 2**62), 7))
    .lower(ids)
    .as_text()
  )
  assert 'i64' not in text
