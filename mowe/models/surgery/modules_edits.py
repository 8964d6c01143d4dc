"""Edits that surgery makes to parameters and to their optimizer statistics."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from mowe.models.surgery import module_surgery


class Edit(Protocol):
  """A change of one parameter along the axis that counts modules.

  Attributes:
    axis: the axis of the parameter that counts modules.
  """

  axis: int

  def apply(self, array: np.ndarray) -> np.ndarray:
    """Returns the parameter after the edit."""

  def of_statistic(self, array: np.ndarray, axis: int) -> np.ndarray:
    """Returns an optimizer's statistic after the edit.

    Args:
      array: the statistic of the parameter, which may have another rank.
      axis: the axis of the statistic that counts modules.
    """


@dataclasses.dataclass(frozen=True)
class Take:
  """Keeps some modules, in the given order.

  Attributes:
    axis: the axis of the parameter that counts modules.
    kept: numbers of the modules that are left.
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
  """Appends new modules after the old ones, with statistics of zero.

  Attributes:
    axis: the axis of the parameter that counts modules.
    new: <float32>[...], the parameter of the new modules alone: its shape is
      that of the parameter except along `axis`.
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
  """Returns all parameters of a model after the edits.

  Args:
    edits: an edit for the path of each parameter that changes.
    params: all parameters of the model, by path.
  """
  return {
    path: edits[path].apply(array) if path in edits else array
    for path, array in params.items()
  }
