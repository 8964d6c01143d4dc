"""How second moments are factored: rules by logical axis, as T5X has them.

A matrix of second moments is kept as its means over rows and over columns. The
rules say which logical axes are rows, which are columns, and which only number
matrices that have nothing to do with each other (BATCH).

Source: t5x/adafactor.py, with its corner cases.
"""

import dataclasses
import enum
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

PyTree = Any


class FactorDim(enum.StrEnum):
  """How an axis takes part in the factored second moment."""

  ROW = 'row'
  COLUMN = 'column'
  BATCH = 'batch'  # Each index of this axis has statistics of its own.
  NONE = 'none'  # The second moment of a parameter with it is not factored.


FACTOR_RULES: Mapping[str, str] = types.MappingProxyType(
  {
    'vocab': FactorDim.COLUMN,
    'embed': FactorDim.ROW,
    'mlp': FactorDim.COLUMN,
    'heads': FactorDim.COLUMN,
    'kv': FactorDim.COLUMN,
    'joined_kv': FactorDim.COLUMN,
    'relpos_buckets': FactorDim.NONE,
    'layers': FactorDim.BATCH,
    'stack': FactorDim.BATCH,
    'q_wi_fused': FactorDim.COLUMN,
    'o_wo_fused': FactorDim.COLUMN,
    'multiquery_heads': FactorDim.COLUMN,
    'kv_fused': FactorDim.COLUMN,
    'layer_norm_scale': FactorDim.NONE,
    'mlp_activations': FactorDim.COLUMN,
    # These four are the rules of t5x/contrib/moe.
    'expert': FactorDim.BATCH,
    'expert_mlp': FactorDim.COLUMN,
    'mlp_embed': FactorDim.ROW,
    'unmodeled': FactorDim.NONE,
    # These are the axes of memories.
    'memory_part': FactorDim.BATCH,
    'memory_row': FactorDim.ROW,
    'branch': FactorDim.NONE,
    'tap': FactorDim.NONE,
  }
)


@dataclasses.dataclass(frozen=True)
class Factoring:
  """Over which axes of one parameter its statistics are averaged.

  Attributes:
    averaged: axes over which update clipping and parameter scale average: all
      but the BATCH axes.
    rows: axes that `v_row` keeps and `v_col` is averaged over; empty if the
      second moment is not factored.
    columns: axes that `v_col` keeps and `v_row` is averaged over; empty if the
      second moment is not factored.
  """

  averaged: tuple[int, ...]
  rows: tuple[int, ...] = ()
  columns: tuple[int, ...] = ()


def factorings(
  params: PyTree,
  logical_axes: PyTree | None,
  rules: Mapping[str, FactorDim],
  min_size: int,
) -> list[Factoring]:
  """Returns the factoring of each leaf, in the order of `jax.tree.leaves`.

  Args:
    params: tree of arrays, or of anything with a shape.
    logical_axes: tree with the sequence of axis names of each parameter; it may
      have more parameters. None if all parameters have rank <= 2.
    rules: logical axis name -> how the axis takes part.
    min_size: a matrix without BATCH axis is factored only if both of its sizes
      reach this.

  Raises:
    ValueError: a parameter of rank 3 or more without axes, or axes that have no
      rule or do not fit their parameter.
  """
  # By path, not by tree_map: optax.masked replaces masked parameters by nodes
  # without leaves, and logical axes may be tuples, which are trees themselves.
  axes_of = {}
  if logical_axes is not None:
    named = jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=_is_axes)
    axes_of = {_name(path): axes for path, axes in named}
  found = []
  for path, param in jax.tree_util.tree_leaves_with_path(params):
    name = _name(path)
    axes = axes_of.get(name)
    if axes is None and logical_axes is not None:
      raise ValueError(
        f'logical_axes must name the axes of every parameter, but {name} '
        f'is missing. Create it with param_with_axes.'
      )
    found.append(_factoring(name, param.shape, axes, rules, min_size))
  return found


def _factoring(name, shape, axes, rules, min_size) -> Factoring:
  """Returns the factoring of one parameter.

  Names of axes are checked for any rank, also where the size decides.
  """
  if axes is None:
    if len(shape) > 2:
      raise ValueError(
        'A parameter of rank 3 or more must have logical axes, but '
        f'{name} {tuple(shape)} has none. Give adafactor the logical_axes.'
      )
    return _by_size(shape, min_size)
  dims = _rules_of_axes(name, shape, axes, rules)
  if len(shape) <= 2 and FactorDim.BATCH not in dims:
    # T5X lets the size decide here, and ignores the rules of plain matrices.
    return _by_size(shape, min_size)
  where = {
    kind: tuple(i for i, dim in enumerate(dims) if dim is kind)
    for kind in FactorDim
  }
  batch = where[FactorDim.BATCH]
  averaged = tuple(i for i in range(len(shape)) if i not in batch)
  rows, columns = where[FactorDim.ROW], where[FactorDim.COLUMN]
  if not (rows and columns):
    return Factoring(averaged)
  if where[FactorDim.NONE]:
    raise ValueError(
      'A parameter with ROW and COLUMN axes must have no NONE axis, but '
      f'{name} with axes {tuple(axes)} has {[str(dim) for dim in dims]}. '
      'Give that axis another rule in factor_rules.'
    )
  return Factoring(averaged, rows, columns)


def _rules_of_axes(name, shape, axes, rules) -> list[FactorDim]:
  """Returns the rule of each axis of a parameter, after checks."""
  if len(axes) != len(shape):
    raise ValueError(
      f'logical_axes must name each axis of a parameter, but {name} '
      f'{tuple(shape)} has axes {tuple(axes)}. Correct its param_with_axes.'
    )
  # An axis without a name, as in a layer that names none, is not factored.
  rules = {**rules, None: FactorDim.NONE}
  for axis in axes:
    if axis not in rules:
      raise ValueError(
        f'Every logical axis must have a factor rule, but {axis!r} of '
        f'{name} {tuple(axes)} has none. Add it to factor_rules as ROW, '
        'COLUMN, BATCH or NONE.'
      )
  return [rules[axis] for axis in axes]


def _by_size(shape: Sequence[int], min_size: int) -> Factoring:
  """Factors a matrix whose two sizes are large enough."""
  averaged = tuple(range(len(shape)))
  if len(shape) < 2 or min(shape) < min_size:
    return Factoring(averaged)
  small, large = np.argsort(shape, kind='stable')
  return Factoring(averaged, (int(small),), (int(large),))


def _is_axes(node: Any) -> bool:
  return isinstance(node, (tuple, list, jax.sharding.PartitionSpec))


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
