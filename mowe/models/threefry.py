"""JAX's threefry, written out: the same random bits, without its loop.

On CPU, JAX runs the rounds of threefry as a loop over whole arrays. XLA takes
four times as long to compile that, and it runs three times as long, in memory
for three times its result. Here the rounds follow one another in one pass over
the elements, which needs no memory but the result.
"""

import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_WORD = 32
# Elements that one word can number.
_MOST = 2**_WORD


def key(seed: int) -> jax.Array:
  """As `jax.random.key`; what is drawn with it is the same as with JAX's."""
  return jax.random.key(seed, impl=_WRITTEN_OUT)


def _threefry(key_data, high, low):
  """Threefry-2x32 with 20 rounds: two hashed words of two words.

  Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
  """
  first, second = key_data[0], key_data[1]
  keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
  high, low = high + keys[0], low + keys[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      high = high + low
      left = low << np.uint32(rotation)
      low = high ^ (left | (low >> np.uint32(_WORD - rotation)))
    high = high + keys[(group + 1) % 3]
    low = low + keys[(group + 2) % 3] + np.uint32(group + 1)
  return high, low


def _counters(shape):
  """Two words that number the elements: up to `_MOST` the second alone."""
  split = next(
    axis for axis in range(len(shape) + 1) if math.prod(shape[axis:]) <= _MOST
  )
  axes = range(len(shape))
  return _number(shape, axes[:split]), _number(shape, axes[split:])


def _number(shape, axes):
  """Row-major index along these axes."""
  number, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(axes):
    index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    number = number + index * np.uint32(stride)
    stride *= shape[axis]
  return number


def _random_bits(key_data, bit_width, shape):
  high, low = _threefry(key_data, *_counters(shape))
  if bit_width == 2 * _WORD:
    return (high.astype(jnp.uint64) << np.uint64(_WORD)) | low
  return (high ^ low).astype(f'uint{bit_width}')


@jax.jit
def _fold_in(key_data, data):
  return jnp.stack(_threefry(key_data, jnp.uint32(0), data.astype(jnp.uint32)))


_WRITTEN_OUT = jax.extend.random.define_prng_impl(
  key_shape=(2,),
  seed=lambda seed: jax.random.key_data(
    jax.random.key(seed, impl='threefry2x32')
  ),
  split=lambda key_data, shape: jnp.stack(
    _threefry(key_data, *_counters(shape)), axis=-1
  ),
  random_bits=_random_bits,
  fold_in=_fold_in,
  name='threefry_written_out',
  tag='written_out',
)
