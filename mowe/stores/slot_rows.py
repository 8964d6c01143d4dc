"""Moving rows of arrays on the device, a bounded number at a time.

Reading and writing are programs of their own. In one program with both XLA
would copy the arrays, as it does not order a read before a write in place.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mowe.layers.memory import rows_in_place
from mowe.training import table_layouts

# Bytes of rows in the largest call, and by how much smaller calls are divided.
_CALL_BYTES = 2**24
_SMALLER = (1, 8, 64)


def calls(num_rows: int, row_bytes: int) -> Iterator[tuple[slice, int]]:
  """Cuts rows into calls of three sizes, so that few programs are compiled.

  Args:
    num_rows: how many rows there are.
    row_bytes: the bytes of one row in all arrays together.

  Yields:
    A slice of the rows, and the size of the call, which is larger than the
    slice if fewer rows are left than the smallest call takes.
  """
  largest = max(2, _CALL_BYTES // row_bytes)
  sizes = sorted({max(2, largest // by) for by in _SMALLER})
  start = 0
  while start < num_rows:
    left = num_rows - start
    fits = [size for size in sizes if size <= left]
    size = fits[-1] if fits else sizes[0]
    yield slice(start, min(start + size, num_rows)), size
    start += size


def padded(rows: np.ndarray, size: int) -> np.ndarray:
  """Row numbers as `put` and `get` take them, <int32>[size].

  Unused places at the end get numbers beyond all rows, each another one, as
  `unique_indices` promises.
  """
  beyond = np.iinfo(np.int32).max - np.arange(size)
  beyond[: len(rows)] = rows
  return beyond.astype(np.int32)


@functools.partial(jax.jit, static_argnames='sharding')
def get(
  arrays: Any, rows: jax.Array, sharding: jax.sharding.Sharding | None = None
) -> Any:
  """Reads rows: a tree of arrays [n, ...].

  Args:
    arrays: a tree of arrays [rows, ...].
    rows: <int32>[n], the rows to read; for a number beyond all rows the result
      is any row.
    sharding: the sharding of the results; None leaves it to XLA.
  """
  taken = jax.tree.map(lambda array: rows_in_place.read(array, rows), arrays)
  if sharding is None:
    return taken
  return jax.lax.with_sharding_constraint(taken, sharding)


def put(arrays: Any, rows: jax.Array, values: Any) -> Any:
  """Writes rows in place, and returns the arrays.

  Args:
    arrays: a tree of arrays [rows, ...]; donated.
    rows: <int32>[n], distinct rows; numbers beyond all rows write nothing.
    values: a tree of arrays [n, ...].
  """
  formats, structure = jax.tree.flatten(table_layouts.formats(arrays))
  return _put_program(structure, tuple(formats))(arrays, rows, values)


@functools.cache
def _put_program(structure, formats):
  """Writes rows of arrays that keep their sharding and order in memory."""

  def write_all(arrays, rows, values):
    return jax.tree.map(
      lambda array, value: rows_in_place.write(array, rows, value),
      arrays,
      values,
    )

  return jax.jit(
    write_all, donate_argnums=0, out_shardings=structure.unflatten(formats)
  )
