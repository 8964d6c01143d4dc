"""Products of 64 bits and their remainders, in NumPy and in JAX.

Hashes of n-grams multiply token ids by constants of 63 bits. NumPy has integers
of 64 bits. JAX has none unless a program turns them on for everything, and a
TPU computes with 32 bits. So a `Wide` is an <int64> array in NumPy, and in JAX a
pair of <uint32> arrays. The functions below take and return either.
"""

from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray or jax.Array.

_WORD = 2**32
_HALF = np.uint32(0xFFFF)


class Pair(NamedTuple):
  """An integer of 64 bits as two halves, in two's complement.

  Attributes:
    high: <uint32>[...], the upper half.
    low: <uint32>[...], the lower half.
  """

  high: Array
  low: Array


Wide = np.ndarray | Pair


def times(ids: Array, factor: int) -> Wide:
  """Returns ids times a constant, modulo 2^64.

  Args:
    ids: <int32>[...], of NumPy or JAX; they may be negative.
    factor: the constant, from 0 to 2^63 - 1.
  """
  if isinstance(ids, np.ndarray):
    with np.errstate(over='ignore'):
      return ids.astype(np.int64) * np.int64(factor)
  high, low = (np.uint32(part) for part in divmod(factor, _WORD))
  xp = ids.__array_namespace__()
  values = ids.astype(np.uint32)
  top, bottom = _product(values, low)
  # The upper half of a negative number is 2^32 - 1, which is -1 here.
  borrow = xp.where(ids < 0, low, np.uint32(0))
  return Pair(top + values * high - borrow, bottom)


def xor(a: Wide, b: Wide) -> Wide:
  """Returns the exclusive or of two integers of 64 bits."""
  if isinstance(a, Pair):
    return Pair(a.high ^ b.high, a.low ^ b.low)
  return a ^ b


def remainder(value: Wide, divisor: int) -> Array:
  """Returns value modulo divisor, <int32>[...], from 0 to divisor - 1.

  Args:
    value: integers of 64 bits with a sign.
    divisor: a constant, from 1 to 2^31 - 1.
  """
  if not isinstance(value, Pair):
    return (value % np.int64(divisor)).astype(np.int32)
  xp = value.low.__array_namespace__()
  modulus = np.uint32(divisor)
  # So many bits can be appended to a remainder without leaving 32 bits.
  step = 32 - divisor.bit_length()
  rest = xp.zeros_like(value.low)
  for word in value:
    for first in range(0, 32, step):
      bits = min(step, 32 - first)
      digit = (word >> np.uint32(32 - first - bits)) & np.uint32(2**bits - 1)
      rest = ((rest << np.uint32(bits)) | digit) % modulus
  # Read as unsigned, a negative number is larger by 2^64.
  excess = np.uint32(-(2**64) % divisor)
  is_negative = value.high >> np.uint32(31) == 1
  rest = xp.where(is_negative, (rest + excess) % modulus, rest)
  return rest.astype(np.int32)


def _product(a: Array, b: np.uint32) -> tuple[Array, Array]:
  """The two halves <uint32>[...] of the product of <uint32> numbers."""
  a_low, a_high = a & _HALF, a >> np.uint32(16)
  b_low, b_high = b & _HALF, b >> np.uint32(16)
  low, high = a_low * b_low, a_high * b_high
  first, second = a_high * b_low, a_low * b_high
  # At most three times 2^16 - 1, so that nothing overflows.
  middle = (low >> np.uint32(16)) + (first & _HALF) + (second & _HALF)
  high = high + (first >> np.uint32(16)) + (second >> np.uint32(16))
  return high + (middle >> np.uint32(16)), a * b
