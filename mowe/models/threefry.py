"""JAX's threefry with its rounds unrolled: the same bits, without a loop.

On CPU, JAX runs the rounds of threefry as a loop over whole arrays. That takes
four times as long to compile and three times as long to run, and needs three
times the memory of its result. Here the rounds follow one another in one pass
over the elements, which needs no memory but the result.
"""

import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_WORD = 32
# The number of elements that a counter of one word can tell apart.
_MOST = 2**_WORD


def key(seed: int) -> jax.Array:
  """Returns a key with which the same numbers are drawn as with JAX's own.

  Args:
    seed: the seed, as for `jax.random.key`.
  """
  return jax.random.key(seed, impl=_WRITTEN_OUT)


def key_of_words(words: np.ndarray) -> jax.Array:
  """Returns the key whose `jax.random.key_data` are these words <uint32>[2]."""
  return jax.random.wrap_key_data(jnp.asarray(words), impl=_WRITTEN_OUT)


def key_of_rows(
  key: jax.Array, first: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Returns a key that draws some rows of an array as if all were drawn.

  `jax.random.normal(key_of_rows(key, 5, (9, 2)), (3, 2))` is, bit by bit,
  `jax.random.normal(key, (9, 2))[5:8]`. The same holds for every distribution
  that makes each number from its own random bits alone.

  Args:
    key: a key that `key` returned.
    first: <int>[], the number of the first row that is drawn.
    shape: the shape of the whole array, which has two or more axes.
  """
  row = math.prod(shape[1:])
  first = jnp.asarray(first, jnp.uint32)
  # As in `_counters`, the low word numbers all elements if it can; otherwise it
  # numbers those within a row, and the high word numbers the rows.
  if shape[0] * row <= _MOST:
    offsets = jnp.stack([jnp.uint32(0), first * np.uint32(row)])
  elif row <= _MOST:
    offsets = jnp.stack([first, jnp.uint32(0)])
  else:
    raise ValueError(
      f'A row must have at most 2^32 elements, but has {row}. Make the rows '
      'smaller.'
    )
  is_split = jnp.uint32(shape[0] * row > _MOST)
  words = jnp.concatenate([jax.random.key_data(key), offsets, is_split[None]])
  return jax.random.wrap_key_data(words, impl=_OF_ROWS)


def _threefry(key_data, high, low):
  """Hashes counters of two words by Threefry-2x32 with 20 rounds.

  Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
  """
  # The third key and its constant are those of the key schedule of the paper.
  first, second = key_data[0], key_data[1]
  keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
  high, low = high + keys[0], low + keys[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      high = high + low
      # Rotation to the left by `rotation` bits.
      left = low << np.uint32(rotation)
      low = high ^ (left | (low >> np.uint32(_WORD - rotation)))
    high = high + keys[(group + 1) % 3]
    low = low + keys[(group + 2) % 3] + np.uint32(group + 1)
  return high, low


def _counters(shape):
  """Returns the high and low words <uint32>[shape] that number the elements.

  Up to `_MOST` elements, the low word alone numbers them.
  """
  split = next(
    axis for axis in range(len(shape) + 1) if math.prod(shape[axis:]) <= _MOST
  )
  axes = range(len(shape))
  return _number(shape, axes[:split]), _number(shape, axes[split:])


def _number(shape, axes):
  """Returns the row-major index <uint32>[shape] along these axes."""
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


def _random_bits_of_rows(words, bit_width, shape):
  """Returns random bits [rows, ...] for a key of `key_of_rows`.

  Args:
    words: <uint32>[5], two words of the key, the high and the low word of the
      first element's counter, and 1 if the high word numbers the rows.
    bit_width: number of bits of each result, 8, 16 or 32.
    shape: the shape of the rows that are drawn.
  """
  key_data, high, low, is_split = words[:2], words[2], words[3], words[4]
  row = _number(shape, (0,))
  within = _number(shape, range(1, len(shape)))
  size = np.uint32(math.prod(shape[1:]))
  high = high + row * is_split
  low = low + within + row * size * (1 - is_split)
  bits_high, bits_low = _threefry(key_data, high, low)
  return (bits_high ^ bits_low).astype(f'uint{bit_width}')


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

_OF_ROWS = jax.extend.random.define_prng_impl(
  key_shape=(5,),
  seed=lambda seed: jnp.zeros(5, jnp.uint32),
  split=lambda words, shape: jnp.broadcast_to(words, (*shape, 5)),
  random_bits=_random_bits_of_rows,
  fold_in=lambda words, data: words,
  name='threefry_of_rows',
  tag='of_rows',
)
