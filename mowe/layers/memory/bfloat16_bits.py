"""Tables in bfloat16 that are stored as the bits of their numbers.

To write rows into a bfloat16 array, XLA on CPU converts the whole array to
float32 and back. Rows of integers are written in place. So a table in bfloat16
is an array <uint16> of bits, and rows become numbers only after they were read.
"""

import jax
import jax.numpy as jnp

# The dtype of the array that holds a table in bfloat16.
DTYPE = jnp.uint16


def to_float(rows: jax.Array) -> jax.Array:
  """Returns the numbers of some rows of a table.

  Args:
    rows: <uint16>[...], bits of bfloat16 numbers, or <float>[...].

  Returns:
    <bfloat16>[...] for bits; floats are returned unchanged.
  """
  if rows.dtype != DTYPE:
    return rows
  return jax.lax.bitcast_convert_type(rows, jnp.bfloat16)


def nearest(values: jax.Array) -> jax.Array:
  """Returns the bits <uint16>[...] of the nearest bfloat16 numbers.

  Args:
    values: <float>[...].
  """
  return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), DTYPE)


def stochastic(values: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds stochastically to bfloat16, without bias.

  A value lies between two neighboring bfloat16 numbers. It goes to the one that
  is farther from zero with a probability equal to its distance from the other,
  in units of the distance between the two. The expected result is then the
  value itself. Training makes updates that are smaller than half of the
  distance between two numbers. Rounding to the nearest number would lose all of
  them.

  Args:
    values: <float32>[...].
    key: random key; every call needs another one.

  Returns:
    The bits <uint16>[...] of the rounded numbers.
  """
  # bfloat16 is the upper half of float32. A random number below 2^16, added to
  # the bits, carries into the upper half with the wanted probability.
  bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
  return ((bits + (_hash(key, values.shape) >> 16)) >> 16).astype(DTYPE)


def _hash(key, shape):
  """Random words <uint32>[*shape]: hashes of each element's number and the key.

  JAX's own generator, Threefry, would take longer than the rest of an update.
  The constants are those of the integer hash `lowbias32` (Chris Wellons,
  Prospecting for hash functions, 2018), which is in the public domain.
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
