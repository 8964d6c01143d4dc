"""Reads and writes some rows of an expert table without copying the table.

A gather and a scatter do this on CPU and GPU. XLA for TPU copies the whole
table in four cases, each of which is avoided here (libtpu 0.0.42 and 0.0.50):

- It splits the operand of a gather whose rows have more than 2^18 numbers. So a
  row is read and written in several parts.
- The parts must be a view of the table, and not another array. The last two
  axes of an array lie in tiles of 8 x 128 numbers, and the axis that needs less
  padding comes last. A kernel of 768 x 408 lies in memory as 408 x 768. So the
  table is first seen with its axes in that order, and then cut along the axis
  that is not last, into parts of whole tiles. Both are bitcasts.
- Rows of fewer than 128 numbers would need least padding with the rows
  themselves along the last axis, and XLA keeps them so, where nobody asks for
  another order. One row then lies in many tiles. So the order is fixed, see
  `axes_in_memory`.
- It moves a conversion of what was gathered before the gather, and converts the
  whole table to bfloat16. So float32 rows go through a `reduce_precision` that
  changes no number, but is not moved.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# The largest number of numbers in a row that XLA for TPU gathers in place.
_MOST_NUMBERS = 2**18
# Rows of so few numbers are left to XLA.
_FEW_NUMBERS = 32
# Rows and columns of a tile in a TPU's memory.
_TILE = (8, 128)


def read(table: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns some rows of a table.

  Args:
    table: [num_rows, ...].
    rows: <int32>[n], numbers of rows, at least 0. For a number beyond all rows
      the result is any row.

  Returns:
    [n, ...], in the dtype of the table.
  """
  if table.ndim != 3:
    return _take(table, rows)
  return jax.lax.platform_dependent(table, rows, tpu=_read_parts, default=_take)


def write(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
  """Returns a table with other values in some rows.

  It is written in place where the table is not read afterwards.

  Args:
    table: [num_rows, ...].
    rows: <int32>[n], distinct numbers, at least 0. Numbers beyond all rows
      write nothing.
    values: [n, ...], in the dtype of the table.
  """
  if table.ndim != 3:
    return _set(table, rows, values)
  return jax.lax.platform_dependent(
    table, rows, values, tpu=_write_parts, default=_set
  )


def axes_in_memory(shape: Sequence[int]) -> tuple[int, ...] | None:
  """Returns the order in which a TPU has to keep the axes of a table.

  Rows are never along the last axis, which costs padding: rows of 64 numbers
  lie in lines of 128.

  Args:
    shape: the shape of a table, or of the state of its optimizer, [num_rows,
      ...].

  Returns:
    The axes, the slowest first; None if XLA may choose. It may where rows have
    few numbers, as lines of 128 would be mostly padding.
  """
  row = shape[1:]
  if math.prod(row) <= _FEW_NUMBERS or len(row) not in (1, 2):
    return None
  if len(row) == 1:
    return 0, 1
  if _is_turned(row):
    return 0, 2, 1
  # A few parts of a row would be padded to the eight rows of a tile.
  return (1, 0, 2) if row[0] < _TILE[0] else (0, 1, 2)


def _take(table, rows):
  return jnp.take(table, rows, axis=0, mode='clip')


def _set(table, rows, values):
  return table.at[rows].set(values, mode='drop', unique_indices=True)


def _read_parts(table, rows):
  num_rows, *shape = table.shape
  last_rows = jnp.minimum(rows, num_rows - 1)
  some = _take(_parts(table), _numbers_of_parts(last_rows, _num_parts(shape)))
  if some.dtype == jnp.float32:
    # These are all bits of a float32.
    some = jax.lax.reduce_precision(some, exponent_bits=8, mantissa_bits=23)
  return _from_parts(some, (rows.shape[0], *shape))


def _write_parts(table, rows, values):
  num_rows, *shape = table.shape
  parts = _parts(table)
  num_parts = _num_parts(shape)
  numbers = _numbers_of_parts(jnp.minimum(rows, num_rows), num_parts)
  # Parts of rows beyond the table get distinct numbers beyond all parts.
  numbers = jnp.where(
    numbers < parts.shape[0],
    numbers,
    jnp.iinfo(jnp.int32).max - jnp.arange(numbers.size),
  )
  parts = _set(parts, numbers, _parts(values))
  return _from_parts(parts, table.shape)


def _parts(table):
  """Views [rows, a, b] as parts of rows, in the order of a TPU's memory."""
  shape = table.shape[1:]
  if _is_turned(shape):
    table = table.swapaxes(1, 2)
  num_rows, outer, inner = table.shape
  num_parts = _num_parts(shape)
  return table.reshape(num_rows * num_parts, outer // num_parts, inner)


def _from_parts(parts, shape):
  """Turns parts back into rows of this shape [rows, a, b]."""
  num_rows, *row = shape
  if _is_turned(row):
    return parts.reshape(num_rows, *row[::-1]).swapaxes(1, 2)
  return parts.reshape(shape)


def _numbers_of_parts(rows, num_parts):
  """The numbers <int32>[n * num_parts] of the parts of rows <int32>[n]."""
  return (rows[:, None] * num_parts + jnp.arange(num_parts)[None]).reshape(-1)


def _is_turned(shape: Sequence[int]) -> bool:
  """Whether a TPU keeps [rows, a, b] in memory as [rows, b, a]."""
  return _padded(*shape) > _padded(*shape[::-1])


def _padded(outer: int, inner: int) -> int:
  rows, columns = _TILE
  return -(-outer // rows) * rows * -(-inner // columns) * columns


def _num_parts(shape: Sequence[int]) -> int:
  """The smallest number of parts of whole tiles that are gathered in place.

  It is 1 if a row cannot be cut into such parts.
  """
  outer, inner = shape[::-1] if _is_turned(shape) else shape
  for number in range(1, outer // _TILE[0] + 1):
    size, rest = divmod(outer, number)
    whole_tiles = number == 1 or size % _TILE[0] == 0
    if not rest and whole_tiles and size * inner <= _MOST_NUMBERS:
      return number
  return 1
