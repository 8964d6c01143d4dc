"""The order in which the numbers of tables lie in the memory of a device.

XLA chooses the order of an array's axes, unless a program is told. On a TPU its
choice would make a step copy whole tables (see `layers.memory.rows_in_place`),
so the order is part of the abstract arrays, like their sharding. All programs
that return tables have to ask for it: by `jax.jit(..., out_shardings=formats)`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import layout

from mowe.layers import platforms
from mowe.layers.memory import rows_in_place


def laid_out(
  leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.ShapeDtypeStruct:
  """Returns an abstract table with its sharding and its order in memory.

  Args:
    leaf: a table or a state of its row optimizer, [num_rows, ...].
    sharding: the sharding of the table.
  """
  axes = None
  if platforms.target() == 'tpu':
    axes = rows_in_place.axes_in_memory(leaf.shape)
  placed = sharding
  if axes is not None:
    placed = layout.Format(layout.Layout(major_to_minor=axes), sharding)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)


def formats(arrays: Any) -> Any:
  """Returns the sharding and the order in memory of each array of a tree.

  The arrays may be abstract. The result is for `out_shardings` of `jax.jit`.
  """
  return jax.tree.map(lambda array: array.format, arrays)


def with_rows(
  leaf: jax.ShapeDtypeStruct, num_rows: int
) -> jax.ShapeDtypeStruct:
  """Returns an abstract table that has another number of rows."""
  shape = num_rows, *leaf.shape[1:]
  return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.format)


def zeros(abstract: Any) -> Any:
  """Returns arrays of zeros in the sharding and the order of abstract ones."""
  make = lambda: jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract
  )
  return jax.jit(make, out_shardings=formats(abstract))()


def put_in_order(part: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns what one device has of a table in the order of the table.

  Args:
    part: the part of the table; it is donated.
    leaf: the whole table.
  """
  order = leaf.format.layout
  if order is None:
    return part
  return jax.device_put(part, layout.Format(order, part.sharding), donate=True)
