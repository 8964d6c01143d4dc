"""Tables in bfloat16, kept as the bits of their numbers.

XLA on CPU writes rows into a bfloat16 array by way of a float32 copy of all of
it. Rows of integers are written in place, so a table in bfloat16 is an array
<uint16> of bits, and only rows that were read become numbers.
"""

import jax
import jax.numpy as jnp

# What a table in bfloat16 is kept in.
DTYPE = jnp.uint16


def to_float(rows: jax.Array) -> jax.Array:
  """Numbers of rows of a table: <bfloat16> of bits, others as they are."""
  if rows.dtype != DTYPE:
    return rows
  return jax.lax.bitcast_convert_type(rows, jnp.bfloat16)


def nearest(values: jax.Array) -> jax.Array:
  """Bits of the nearest bfloat16 numbers."""
  return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), DTYPE)


def stochastic(values: jax.Array, key: jax.Array) -> jax.Array:
  """Bits of one of the two next bfloat16 numbers, drawn without bias.

  A number is rounded up with a probability that is its distance from the lower
  neighbour. Training makes updates smaller than half of the distance between
  two numbers; rounded to the nearest, they would all be lost.

  Args:
    values: <float32>[...].
    key: another one for each call.
  """
  bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
  return ((bits + (_hash(key, values.shape) >> 16)) >> 16).astype(DTYPE)


def _hash(key, shape):
  """Random words <uint32>: a hash of each element's number and the key.

  Threefry would take longer than the rest of an update. The constants are those
  of the integer hash `lowbias32` (Chris Wellons, Prospecting for hash
  functions, 2018), in the public domain.
  """
  number = jnp.zeros(shape, jnp.uint32)
  for axis, size in enumerate(shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    number = number * jnp.uint32(size) + index
  first, second = jax.random.bits(key, (2,))
  x = (number ^ first) * jnp.uint32(0x9E3779B1) + second
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
