"""Optimizer states of a model to which modules were added, or that lost some.

An edit of modules changes some parameters along one axis. The statistics that
an optimizer has for these parameters must be edited with them, along the axis
that is left of it in each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mowe.models.surgery import module_surgery, modules_edits
from mowe.training.optimization import factoring_rules

# Statistics of Adafactor that are means over some axes of a parameter. `v` and
# `m` have the shape of the parameter, or (1,) where they are not used.
_MEANS = ('v_row', 'v_col')
_DEFAULT_MIN_SIZE = 128


def edit(
  opt_state: Any,
  edits: modules_edits.Edits,
  old_shapes: Mapping[module_surgery.Path, Sequence[int]],
  axes: Mapping[module_surgery.Path, Sequence[str]],
  min_dim_size_to_factor: int = _DEFAULT_MIN_SIZE,
) -> Any:
  """The state after an edit; what is appended has statistics of zero.

  Moments in the shape of their parameter (Adam's, or momentum) are edited as
  the parameter is. Adafactor's means of the parameters of experts keep the axis
  of modules, and are edited along it. With another number of modules a router's
  kernel may be factored in another way; its statistics begin anew then.

  Args:
    opt_state: the state as it was saved: a tree of arrays, with None where
      there is nothing.
    edits: path of a parameter -> how it is edited.
    old_shapes: path of every parameter -> its shape before the edit.
    axes: path of every parameter -> the names of its logical axes.
    min_dim_size_to_factor: the setting of the Adafactor that made the state.

  Raises:
    ValueError: statistics of another shape than these optimizers have, such as
      those of an optimizer that trained added modules alone.
  """

  def changed(keys, leaf):
    path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
    # The path of a statistic ends with the path of its parameter.
    name = next((p for p in edits if path[-len(p) :] == p), None)
    if name is None or leaf is None:
      return leaf
    leaf = np.asarray(leaf)
    one, shape = edits[name], tuple(old_shapes[name])
    if leaf.shape == shape:
      return one.of_statistic(leaf, one.axis)
    # A statistic that Adafactor does not use is one zero.
    is_unused = leaf.shape == (1,)
    statistic = path[-len(name) - 1] if len(path) > len(name) else ''
    if statistic in (*_MEANS, 'v', 'm') and (is_unused or statistic in _MEANS):
      return _edited_mean(
        leaf, statistic, one, shape, axes[name], min_dim_size_to_factor
      )
    raise ValueError(_unknown(path, leaf.shape, shape))

  return jax.tree_util.tree_map_with_path(
    changed, opt_state, is_leaf=lambda leaf: leaf is None
  )


def _edited_mean(leaf, statistic, one, shape, axes, min_size):
  """Edits a statistic of Adafactor that has not the shape of its parameter."""
  new_shape = one.of_statistic(np.empty(shape, bool), one.axis).shape
  old = _shape_of(statistic, shape, axes, min_size)
  new = _shape_of(statistic, new_shape, axes, min_size)
  if statistic == 'm':
    return leaf
  if leaf.shape != old[0]:
    raise ValueError(_unknown((statistic,), leaf.shape, shape))
  if old[1] != new[1]:
    # The parameter is factored in another way, and the means of one way do not
    # say those of the other.
    return np.zeros(new[0], leaf.dtype)
  if leaf.shape == (1,):
    return leaf
  averaged = old[1].columns if statistic == 'v_row' else old[1].rows
  left = [axis for axis in range(len(shape)) if axis not in averaged]
  if one.axis not in left:
    # The statistic is a mean over the modules.
    return leaf
  return one.of_statistic(leaf, left.index(one.axis))


def _shape_of(statistic, shape, axes, min_size):
  """The shape of a statistic, and the Factoring of its parameter."""
  name = 'parameter'
  (how,) = factoring_rules.factorings(
    {name: np.empty(shape, bool)},
    {name: tuple(axes)},
    factoring_rules.FACTOR_RULES,
    min_size,
  )
  if statistic == 'v':
    return ((1,) if how.rows else tuple(shape)), how
  if not how.rows:
    return (1,), how
  gone = how.columns if statistic == 'v_row' else how.rows
  kept = (size for axis, size in enumerate(shape) if axis not in gone)
  return tuple(kept), how


def _unknown(path, found, shape):
  return (
    'Statistics of a parameter of modules must be those of Adam or Adafactor '
    f'for its shape {shape}, but {"/".join(path)} has {found}. Leave the state '
    'of the optimizer out.'
  )
