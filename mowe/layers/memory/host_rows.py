"""Kernels of experts that are fetched from the host while the model runs.

For generating with tables that do not fit the device, or the memory: nobody
knows in advance which experts the decoder will ask for.
"""

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from mowe.layers.memory import bfloat16_bits, grouped


class RowsFrom(Protocol):
  """Gives the kernels of experts, on the host."""

  def __call__(self, table: str, experts: np.ndarray) -> dict[str, np.ndarray]:
    """Kernel name -> [n, in, out] of experts <int32>[n], in their dtype.

    Args:
      table: its path in the model, such as `experts`.
      experts: which; out of range: zeros.
    """


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HostRows:
  """Reads the kernels of experts as `expert_tiles.TableRows` does.

  Attributes:
    rows_from: gives them.
    table: path of the table in the model.
    shapes: kernel name -> (in, out).
    dtype: in which the table is kept.
  """

  rows_from: RowsFrom
  table: str
  shapes: tuple[tuple[str, tuple[int, int]], ...]
  dtype: Any

  @property
  def at_once(self) -> int:
    """How many experts to read in one call, at most."""
    return grouped.experts_at_once(
      sum(num_in * num_out for _, (num_in, num_out) in self.shapes)
    )

  def __call__(self, experts: jax.Array) -> dict[str, jax.Array]:
    """Kernel name -> <float>[n, in, out] of experts <int32>[n]."""
    results = {
      name: jax.ShapeDtypeStruct((*experts.shape, *shape), self.dtype)
      for name, shape in self.shapes
    }
    fetched = jax.pure_callback(self._fetch, results, experts)
    return jax.tree.map(bfloat16_bits.to_float, fetched)

  def _fetch(self, experts):
    return self.rows_from(self.table, np.asarray(experts))
