"""What surgery does to the arrays of a model, and to statistics of them."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from mowe.models.surgery import module_surgery


class Edit(Protocol):
  """A change of one parameter along the axis that counts modules.

  Attributes:
    axis: of the parameter.
  """

  axis: int

  def apply(self, array: np.ndarray) -> np.ndarray:
    """The new parameter."""

  def of_statistic(self, array: np.ndarray, axis: int) -> np.ndarray:
    """A statistic of an optimizer, whose modules lie along `axis`."""


@dataclasses.dataclass(frozen=True)
class Take:
  """Some modules are left, in this order.

  Attributes:
    axis: of the parameter.
    kept: numbers of the modules.
  """

  axis: int
  kept: tuple[int, ...]

  def apply(self, array: np.ndarray) -> np.ndarray:
    """See `Edit`."""
    return self.of_statistic(array, self.axis)

  def of_statistic(self, array: np.ndarray, axis: int) -> np.ndarray:
    """See `Edit`."""
    return np.take(array, np.asarray(self.kept), axis=axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Append:
  """New modules come after the old ones, with statistics of zero.

  Attributes:
    axis: of the parameter.
    new: <float32>[...], as the parameter, but of the new modules alone.
  """

  axis: int
  new: np.ndarray

  def apply(self, array: np.ndarray) -> np.ndarray:
    """See `Edit`."""
    new = self.new.astype(array.dtype, copy=False)
    return np.concatenate([array, new], axis=self.axis)

  def of_statistic(self, array: np.ndarray, axis: int) -> np.ndarray:
    """See `Edit`."""
    shape = list(array.shape)
    shape[axis] = self.new.shape[self.axis]
    return np.concatenate([array, np.zeros(shape, array.dtype)], axis=axis)


Edits = Mapping[module_surgery.Path, Edit]


def apply(
  edits: Edits, params: module_surgery.Params
) -> dict[module_surgery.Path, np.ndarray]:
  """All parameters of a model, those changed that have an edit."""
  return {
    path: edits[path].apply(array) if path in edits else array
    for path, array in params.items()
  }
