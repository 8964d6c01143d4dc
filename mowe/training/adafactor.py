"""Adafactor with factor rules by logical axis, as T5X has it.

`optax.adafactor` factors over the two largest axes and pools its statistics
over all others. For stacked parameters such as [expert, embed, expert_mlp]
that is wrong: each expert is a matrix of its own. Here every logical axis name
says how its axis takes part, and axes marked BATCH are never averaged over:
second moments, update clipping and parameter scale are then per expert.

Source: Adafactor, arXiv 1804.04235; rules and corner cases: t5x/adafactor.py.
"""

import dataclasses
import enum
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any
LearningRate = float | Callable[[jax.Array], jax.Array]


class FactorDim(enum.StrEnum):
  """How an axis takes part in the factored second moment."""

  ROW = 'row'
  COLUMN = 'column'
  BATCH = 'batch'  # One set of statistics for each index of this axis.
  NONE = 'none'


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
    # As in t5x/contrib/moe.
    'expert': FactorDim.BATCH,
    'expert_mlp': FactorDim.COLUMN,
    'mlp_embed': FactorDim.ROW,
    'unmodeled': FactorDim.NONE,
  }
)

# Matrices of this size are summed over their rows in blocks of rows.
_WIDE = 2**22
_BLOCK = 8


@dataclasses.dataclass(frozen=True)
class Factoring:
  """What is averaged over which axes of one parameter.

  Attributes:
    averaged: axes over which update clipping and parameter scale average.
    rows: axes of `v_row`; empty if the second moment is not factored.
    columns: axes of `v_col`; empty if the second moment is not factored.
  """

  averaged: tuple[int, ...]
  rows: tuple[int, ...] = ()
  columns: tuple[int, ...] = ()


class AdafactorState(NamedTuple):
  """State of `adafactor`; the trees are shaped as the parameters.

  As in T5X, a statistic that a parameter does not use is zeros of shape (1,).

  Attributes:
    count: <int32>[], updates made so far.
    v_row: second moment, averaged over the columns.
    v_col: second moment, averaged over the rows.
    v: second moment of parameters that are not factored.
    m: momentum, of the scaled updates.
  """

  count: jax.Array
  v_row: PyTree
  v_col: PyTree
  v: PyTree
  m: PyTree


def adafactor(
  learning_rate: LearningRate,
  logical_axes: PyTree | None,
  factor_rules: Mapping[str, str] = FACTOR_RULES,
  decay_rate: float = 0.8,
  clipping_threshold: float | None = 1.0,
  multiply_by_parameter_scale: bool = True,
  weight_decay_rate: float | None = None,
  beta1: float | None = None,
  min_dim_size_to_factor: int = 128,
  epsilon1: float = 1e-30,
  epsilon2: float = 1e-3,
  step_offset: int = 0,
) -> optax.GradientTransformation:
  """Returns T5X's Adafactor as an optax transformation.

  Args:
    learning_rate: a number, or a schedule of the number of updates made.
    logical_axes: tree of the parameters with a sequence of axis names for each
      (`flax.linen.partitioning.get_axis_names`); None if all have rank <= 2.
    factor_rules: logical axis name to ROW, COLUMN, BATCH or NONE.
    decay_rate: update n has second moment decay `1 - n^-decay_rate`.
    clipping_threshold: largest root mean square of an update before it is
      scaled; None for no clipping.
    multiply_by_parameter_scale: learning rate relative to the root mean square
      of the parameter (and never below `epsilon2`).
    weight_decay_rate: part of the parameter taken away at each update. As in
      T5X it is not multiplied by the learning rate.
    beta1: momentum; None for none and no memory.
    min_dim_size_to_factor: parameters of rank <= 2 are factored only if both
      sizes reach this. Rules of rank >= 3 hold for any size.
    epsilon1: added to squared gradients.
    epsilon2: smallest parameter scale.
    step_offset: update at which the second moments start afresh, for
      finetuning with the count of pretraining.

  Raises (at init):
    ValueError: an axis name without rule, a parameter of rank >= 3 without
      axes, or axes that do not fit the parameter.
  """
  rules = {name: FactorDim(rule.lower()) for name, rule in factor_rules.items()}

  def factorings(params):
    return _factorings(params, logical_axes, rules, min_dim_size_to_factor)

  def init(params):
    leaves, treedef = jax.tree.flatten(params)
    statistics = [
      _init_statistics(leaf, factoring, beta1 is not None)
      for leaf, factoring in zip(leaves, factorings(params), strict=True)
    ]
    trees = _unzip(treedef, statistics, 4)
    return AdafactorState(jnp.zeros((), jnp.int32), *trees)

  def update(gradients, state, params=None):
    if params is None:
      raise ValueError(
        'adafactor must be given the parameters, but got None. Call '
        'update(gradients, state, params).'
      )
    since = jnp.maximum(state.count - step_offset, 0)
    decay = second_moment_decay(since + 1, decay_rate)
    rate = learning_rate
    if callable(learning_rate):
      rate = learning_rate(state.count)

    def update_leaf(gradient, param, factoring, v_row, v_col, v, m):
      gradient = gradient.astype(jnp.float32)
      param = param.astype(jnp.float32)
      if factoring.rows:
        v_row, v_col = factored_moments(
          gradient, v_row, v_col, factoring, decay, epsilon1
        )
        step = factored_scaling(gradient, v_row, v_col, factoring)
      else:
        v = decay * v + (1.0 - decay) * (gradient**2 + epsilon1)
        step = gradient * jax.lax.rsqrt(v)
      if clipping_threshold is not None:
        step = clip_by_rms(step, clipping_threshold, factoring.averaged)
      step = rate * step
      if multiply_by_parameter_scale:
        step = step * parameter_scale(param, epsilon2, factoring.averaged)
      if beta1 is not None:
        step = m = beta1 * m + (1.0 - beta1) * step
      if weight_decay_rate is not None:
        step = step + weight_decay_rate * param
      return -step, v_row, v_col, v, m

    leaves, treedef = jax.tree.flatten(gradients)
    trees = (params, state.v_row, state.v_col, state.v, state.m)
    param_leaves, *statistics = [treedef.flatten_up_to(tree) for tree in trees]
    results = [
      update_leaf(*arguments)
      for arguments in zip(
        leaves,
        param_leaves,
        factorings(params),
        *statistics,
        strict=True,
      )
    ]
    updates, *new_statistics = _unzip(treedef, results, 5)
    updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
    count = optax.safe_increment(state.count)
    return updates, AdafactorState(count, *new_statistics)

  return optax.GradientTransformation(init, update)


def second_moment_decay(num_updates: jax.Array, decay_rate: float) -> jax.Array:
  """Returns `1 - n^-decay_rate`; the first update has n = 1 and decay 0."""
  return 1.0 - jnp.asarray(num_updates, jnp.float32) ** -decay_rate


def factored_moments(
  gradient: jax.Array,
  v_row: jax.Array,
  v_col: jax.Array,
  factoring: Factoring,
  decay: jax.Array,
  epsilon1: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the next `v_row` (mean over columns) and `v_col` (over rows)."""

  def mean_square(axes):
    if axes == (0,) and gradient.ndim == 2 and gradient.size >= _WIDE:
      return _mean_square_of_columns(gradient) + epsilon1
    return (gradient**2 + epsilon1).mean(axis=axes)

  v_row = decay * v_row + (1.0 - decay) * mean_square(factoring.columns)
  v_col = decay * v_col + (1.0 - decay) * mean_square(factoring.rows)
  return v_row, v_col


def _mean_square_of_columns(matrix: jax.Array) -> jax.Array:
  """Mean of squares over the first axis."""

  def block_by_block(matrix):
    # Row by row, as they lie in memory. XLA on CPU goes down each column: for
    # the logits' kernel, [512, 32128], that took 40 times longer.
    add = lambda total, rows: (sum(list(rows**2), total), None)
    blocks = matrix.reshape(-1, _BLOCK, matrix.shape[1])
    total = jnp.zeros(matrix.shape[1:], matrix.dtype)
    return jax.lax.scan(add, total, blocks)[0] / matrix.shape[0]

  whole = lambda matrix: (matrix**2).mean(axis=0)
  if matrix.shape[0] % _BLOCK:
    return whole(matrix)
  return jax.lax.platform_dependent(matrix, cpu=block_by_block, default=whole)


def factored_scaling(
  gradient: jax.Array,
  v_row: jax.Array,
  v_col: jax.Array,
  factoring: Factoring,
) -> jax.Array:
  """Returns gradient / sqrt(v) for `v = v_row v_col / mean(v_row)`."""
  row = jnp.expand_dims(v_row, factoring.columns)
  column = jnp.expand_dims(v_col, factoring.rows)
  row = row / row.mean(axis=factoring.rows, keepdims=True)
  return gradient * row**-0.5 * column**-0.5


def clip_by_rms(
  update: jax.Array, threshold: float, averaged: Sequence[int]
) -> jax.Array:
  """Shrinks the update so that its root mean square is at most `threshold`."""
  rms = jnp.sqrt(jnp.mean(update**2, axis=tuple(averaged), keepdims=True))
  return update / jnp.maximum(1.0, rms / threshold)


def parameter_scale(
  param: jax.Array, epsilon2: float, averaged: Sequence[int]
) -> jax.Array:
  """Returns the root mean square of the parameter, at least `epsilon2`."""
  rms = jnp.sqrt(jnp.mean(param**2, axis=tuple(averaged), keepdims=True))
  return jnp.maximum(rms, epsilon2)


def _init_statistics(param, factoring: Factoring, momentum: bool):
  """Returns v_row, v_col, v, m of one parameter."""
  unused = jnp.zeros((1,), jnp.float32)
  shape = np.array(param.shape, int)
  full = jnp.zeros(param.shape, jnp.float32)
  m = full if momentum else unused
  if not factoring.rows:
    return unused, unused, full, m
  v_row = jnp.zeros(np.delete(shape, factoring.columns), jnp.float32)
  v_col = jnp.zeros(np.delete(shape, factoring.rows), jnp.float32)
  return v_row, v_col, unused, m


def _unzip(treedef, rows, width: int) -> list[PyTree]:
  columns = list(zip(*rows, strict=True)) or [()] * width
  return [treedef.unflatten(column) for column in columns]


def _factorings(
  params: PyTree,
  logical_axes: PyTree | None,
  rules: Mapping[str, FactorDim],
  min_size: int,
) -> list[Factoring]:
  """Returns the factoring of each leaf, in the order of `jax.tree.leaves`."""
  # By path, not by tree_map: optax.masked replaces masked parameters by nodes
  # without leaves, and logical axes may be tuples, which are trees themselves.
  axes_of = {}
  if logical_axes is not None:
    named = jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=_is_axes)
    axes_of = {_name(path): axes for path, axes in named}
  factorings = []
  for path, param in jax.tree_util.tree_leaves_with_path(params):
    name = _name(path)
    axes = axes_of.get(name)
    if axes is None and logical_axes is not None:
      raise ValueError(
        f'logical_axes must name the axes of every parameter, but {name} '
        f'is missing. Create it with param_with_axes.'
      )
    factorings.append(_factoring(name, param.shape, axes, rules, min_size))
  return factorings


def _factoring(name, shape, axes, rules, min_size) -> Factoring:
  """Returns the factoring of one parameter; names are checked for any rank."""
  if axes is None:
    if len(shape) > 2:
      raise ValueError(
        'A parameter of rank 3 or more must have logical axes, but '
        f'{name} {tuple(shape)} has none. Give adafactor the logical_axes.'
      )
    return _by_size(shape, min_size)
  dims = _rules_of_axes(name, shape, axes, rules)
  if len(shape) <= 2 and FactorDim.BATCH not in dims:
    # As in T5X: the size decides, rules of plain matrices are ignored.
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
  if len(axes) != len(shape):
    raise ValueError(
      f'logical_axes must name each axis of a parameter, but {name} '
      f'{tuple(shape)} has axes {tuple(axes)}. Correct its param_with_axes.'
    )
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
