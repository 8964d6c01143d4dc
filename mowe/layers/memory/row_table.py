"""The table of a memory: rows of numbers that tokens name."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.layers import parameter
from mowe.layers.memory import bfloat16_bits, host_rows
from mowe.layers.memory.payloads import payload_base

# The name of the parameter. By it a table is told from ordinary parameters.
ROWS = 'memory_rows'

# The collection in which a train step passes the rows of a batch.
GATHERED = 'gathered_rows'


class RowTable(nn.Module):
  """Rows of a memory, which may have a part for each block that reads it.

  Attributes:
    num_rows: number of rows.
    num_parts: number of parts of a row; block i of those that read the memory
      reads part i, or all read the only one.
    row_dim: how many numbers a part has.
    row_init: draws fresh rows.
    dtype: 'float32', or 'bfloat16', which is stored as bits <uint16> (see
      `bfloat16_bits`).
    rows_from: reads rows on the host. The table is then no parameter of the
      model. None for a table on the device.

  Call: returns the table, <dtype>[num_rows, num_parts, row_dim].
  """

  num_rows: int
  num_parts: int
  row_dim: int
  row_init: parameter.Initializer
  dtype: Any = 'float32'
  rows_from: host_rows.RowsFrom | None = None

  def setup(self):
    if not self._is_gathered() and self.rows_from is None:
      self.table = self._declare()

  def __call__(self) -> jax.Array:
    return self.table

  def read(
    self, ids: jax.Array, part: int, segment_ids: jax.Array | None = None
  ) -> payload_base.MemoryRows:
    """Reads one part of some rows.

    Args:
      ids: <int32>[batch, length, slots], the rows that tokens name, -1 for
        none. In a train step they count the rows of the collection GATHERED.
      part: which part of the rows.
      segment_ids: <int32>[batch, length], passed on.
    """
    if self.rows_from is not None and not self._is_gathered():
      exist = (ids >= 0) & (ids < self.num_rows)
      return payload_base.MemoryRows(
        self._from_host(ids, part), exist, segment_ids
      )
    rows = (
      self.get_variable(GATHERED, ROWS) if self._is_gathered() else self.table
    )
    exist = (ids >= 0) & (ids < rows.shape[0])
    # One gather of row and part: no array of all rows' parts is made.
    place = jnp.where(exist, ids, 0)
    values = bfloat16_bits.to_float(rows[place, part])
    return payload_base.MemoryRows(
      jnp.where(exist[..., None], values, 0), exist, segment_ids
    )

  def _is_gathered(self) -> bool:
    return self.has_variable(GATHERED, ROWS)

  def _from_host(self, ids, part):
    """One part of some rows, [*ids, row_dim]; zeros out of range."""
    table = '/'.join(self.path)

    def fetch(ids):
      # A batch names many rows more than once.
      rows, places = np.unique(np.asarray(ids), return_inverse=True)
      read = self.rows_from(table, rows)[ROWS][:, int(part)]
      return read[places.reshape(ids.shape)]

    shape = jax.ShapeDtypeStruct((*ids.shape, self.row_dim), self._stored_dtype)
    return bfloat16_bits.to_float(jax.pure_callback(fetch, shape, ids))

  @property
  def _stored_dtype(self) -> Any:
    is_bits = self.dtype == 'bfloat16'
    return bfloat16_bits.DTYPE if is_bits else jnp.float32

  def _declare(self):
    shape = (self.num_rows, self.num_parts, self.row_dim)
    is_bits = self.dtype == 'bfloat16'
    return parameter.declare(
      self,
      ROWS,
      _in_bits(self.row_init) if is_bits else self.row_init,
      shape,
      axes=('expert', 'memory_part', 'memory_row'),
      dtype=self._stored_dtype,
    )


@functools.cache
def _in_bits(draw):
  def draw_bits(key, shape, dtype):
    del dtype
    return bfloat16_bits.nearest(draw(key, shape, jnp.float32))

  return draw_bits
