"""Moving rows of arrays on the device, a bounded number at a time.

Reading and writing are programs of their own: in one program XLA would copy the
arrays, as it does not order the two.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Bytes of rows in one call, and how much smaller the smaller calls are.
_CALL_BYTES = 2**24
_SMALLER = (1, 8, 64)


def calls(num_rows: int, row_bytes: int) -> Iterator[tuple[slice, int]]:
  """Cuts rows into calls of few sizes, so that few programs are compiled.

  Yields:
    A slice of the rows, and the size of the call, which may be larger.
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
  """Row numbers <int32>[size]: beyond all rows, each of its own, at the end."""
  beyond = np.iinfo(np.int32).max - np.arange(size)
  beyond[: len(rows)] = rows
  return beyond.astype(np.int32)


@functools.partial(jax.jit, static_argnames='sharding')
def get(
  arrays: Any, rows: jax.Array, sharding: jax.sharding.Sharding | None = None
) -> Any:
  """Rows [n, ...] of arrays [rows, ...]; anything where there is no such row.

  Args:
    arrays: a tree of them.
    rows: <int32>[n].
    sharding: of the results; None: as XLA likes.
  """
  taken = jax.tree.map(
    lambda array: jnp.take(array, rows, axis=0, mode='clip'), arrays
  )
  if sharding is None:
    return taken
  return jax.lax.with_sharding_constraint(taken, sharding)


@functools.partial(jax.jit, donate_argnums=0)
def put(arrays: Any, rows: jax.Array, values: Any) -> Any:
  """The arrays, changed in place; numbers beyond them are left out."""
  return jax.tree.map(
    lambda array, value: array.at[rows].set(
      value, mode='drop', unique_indices=True
    ),
    arrays,
    values,
  )
