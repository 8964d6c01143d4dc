"""Kernels of experts that are fetched from the host while the model runs.

Generation needs this for tables that do not fit into the memory of the device
or of the host, because it is not known in advance which experts the decoder
will need.
"""

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from mowe.layers.memory import bfloat16_bits, grouped


class RowsFrom(Protocol):
  """Function on the host that reads the kernels of experts."""

  def __call__(self, table: str, experts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the kernels of some experts.

    Args:
      table: path of the table in the model, such as `experts`.
      experts: <int32>[n]; an expert out of range has zeros.

    Returns:
      The kernels [n, in, out] by name, in the dtype that the table is kept in.
    """


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HostRows:
  """Reads the kernels of experts as `expert_tiles.TableRows` does.

  Attributes:
    rows_from: reads the kernels on the host.
    table: path of the table in the model.
    shapes: name and shape (in, out) of each kernel of an expert.
    dtype: dtype that the table is kept in; <uint16> for bits of bfloat16.
  """

  rows_from: RowsFrom
  table: str
  shapes: tuple[tuple[str, tuple[int, int]], ...]
  dtype: Any

  @property
  def at_once(self) -> int:
    """Largest number of experts to read in one call."""
    return grouped.experts_at_once(
      sum(num_in * num_out for _, (num_in, num_out) in self.shapes)
    )

  def __call__(self, experts: jax.Array) -> dict[str, jax.Array]:
    """Returns the kernels of some experts.

    Args:
      experts: <int32>[n]; an expert out of range has zeros.

    Returns:
      The kernels <float>[n, in, out], by name.
    """
    results = {
      name: jax.ShapeDtypeStruct((*experts.shape, *shape), self.dtype)
      for name, shape in self.shapes
    }
    fetched = jax.pure_callback(self._fetch, results, experts)
    return jax.tree.map(bfloat16_bits.to_float, fetched)

  def _fetch(self, experts):
    return self.rows_from(self.table, np.asarray(experts))
