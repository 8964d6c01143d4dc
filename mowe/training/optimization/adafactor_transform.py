"""Adafactor with factor rules by logical axis, as T5X has it.

`optax.adafactor` factors over the two largest axes and pools its statistics
over all others. For stacked parameters such as [expert, embed, expert_mlp]
that is wrong: each expert is a matrix of its own. Here every logical axis name
says how its axis takes part, and axes marked BATCH are never averaged over:
second moments, update clipping and parameter scale are then per expert.

Source: Adafactor, arXiv 1804.04235; rules and corner cases: t5x/adafactor.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mowe.training.optimization import factoring_rules
from mowe.training.optimization.factoring_rules import (
  FACTOR_RULES,
  FactorDim,
  Factoring,
)

PyTree = Any
LearningRate = float | Callable[[jax.Array], jax.Array]


# On CPU, matrices with at least this many entries are summed over their rows in
# blocks of rows.
_WIDE = 2**22
_BLOCK = 8

# Stacks of this many entries do not stay in the cache of a CPU, so their
# matrices are read in parts of about so many, as often as needed.
_BEYOND_CACHE = 2**22
_IN_CACHE = 2**18


@dataclasses.dataclass(frozen=True)
class AdafactorSettings:
  """Settings of `adafactor`.

  Attributes:
    learning_rate: a number, or a schedule of the number of updates made.
    factor_rules: logical axis name to ROW, COLUMN, BATCH or NONE, which say how
      the axis takes part in the factored second moment.
    decay_rate: update n has second moment decay `1 - n^-decay_rate`.
    clipping_threshold: largest root mean square of an update before it is
      scaled; None for no clipping.
    multiply_by_parameter_scale: learning rate relative to the root mean square
      of the parameter (and never below `epsilon2`).
    weight_decay_rate: part of the parameter taken away at each update. As in
      T5X it is not multiplied by the learning rate.
    beta1: decay of the momentum; None for no momentum, and no memory for it.
    min_dim_size_to_factor: parameters of rank <= 2 are factored only if both
      sizes reach this. Rules of rank >= 3 hold for any size.
    epsilon1: added to squared gradients.
    epsilon2: smallest parameter scale.
    step_offset: update at which the second moments start afresh, for
      finetuning with the count of pretraining.
  """

  learning_rate: LearningRate
  factor_rules: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: FACTOR_RULES
  )
  decay_rate: float = 0.8
  clipping_threshold: float | None = 1.0
  multiply_by_parameter_scale: bool = True
  weight_decay_rate: float | None = None
  beta1: float | None = None
  min_dim_size_to_factor: int = 128
  epsilon1: float = 1e-30
  epsilon2: float = 1e-3
  step_offset: int = 0


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


class _Statistics(NamedTuple):
  """The statistics of one parameter, as in `AdafactorState`."""

  v_row: jax.Array
  v_col: jax.Array
  v: jax.Array
  m: jax.Array


class _Update(NamedTuple):
  """What all parameters have in common in one update.

  Attributes:
    settings: those of the transformation.
    rate: the learning rate of this update.
    decay: <float32>[], the second moment decay of this update.
  """

  settings: AdafactorSettings
  rate: float | jax.Array
  decay: jax.Array


class _FactoredStep(NamedTuple):
  """A factored step, which is gradient * row * column, and its statistics.

  Attributes:
    row: <float32>, with all axes of the parameter, but columns of size 1.
    column: <float32>, with all axes of the parameter, but rows of size 1.
    v_row: the next second moment, averaged over the columns.
    v_col: the next second moment, averaged over the rows.
  """

  row: jax.Array
  column: jax.Array
  v_row: jax.Array
  v_col: jax.Array


def adafactor(
  settings: AdafactorSettings, logical_axes: PyTree | None
) -> optax.GradientTransformation:
  """Returns T5X's Adafactor as an optax transformation.

  Args:
    settings: the settings.
    logical_axes: tree of the parameters with a sequence of axis names for each
      (`flax.linen.partitioning.get_axis_names`); None if all have rank <= 2.

  Raises (at init):
    ValueError: an axis name without rule, a parameter of rank >= 3 without
      axes, or axes that do not fit the parameter.
  """
  factorings = functools.partial(
    factoring_rules.factorings,
    logical_axes=logical_axes,
    rules={
      name: FactorDim(rule.lower())
      for name, rule in settings.factor_rules.items()
    },
    min_size=settings.min_dim_size_to_factor,
  )

  def init(params):
    leaves, treedef = jax.tree.flatten(params)
    statistics = [
      _init_statistics(leaf, factoring, settings.beta1 is not None)
      for leaf, factoring in zip(leaves, factorings(params), strict=True)
    ]
    trees = _unzip(treedef, statistics, len(_Statistics._fields))
    return AdafactorState(jnp.zeros((), jnp.int32), *trees)

  def update(gradients, state, params=None):
    if params is None:
      raise ValueError(
        'adafactor must be given the parameters, but got None. Call '
        'update(gradients, state, params).'
      )
    now = _this_update(settings, state.count)
    leaves, treedef = jax.tree.flatten(gradients)
    param_leaves, *statistics = [
      treedef.flatten_up_to(tree)
      for tree in (params, state.v_row, state.v_col, state.v, state.m)
    ]
    results = [
      _update_leaf(now, gradient, param, factoring, _Statistics(*of_leaf))
      for gradient, param, factoring, *of_leaf in zip(
        leaves, param_leaves, factorings(params), *statistics, strict=True
      )
    ]
    updates, *new_statistics = _unzip(
      treedef, results, 1 + len(_Statistics._fields)
    )
    updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
    count = optax.safe_increment(state.count)
    return updates, AdafactorState(count, *new_statistics)

  return optax.GradientTransformation(init, update)


def _this_update(settings: AdafactorSettings, count: jax.Array) -> _Update:
  """The rate and the decay of the update after `count` updates."""
  since = jnp.maximum(count - settings.step_offset, 0)
  decay = second_moment_decay(since + 1, settings.decay_rate)
  rate = settings.learning_rate
  return _Update(settings, rate(count) if callable(rate) else rate, decay)


def _update_leaf(
  now: _Update,
  gradient: jax.Array,
  param: jax.Array,
  factoring: Factoring,
  old: _Statistics,
) -> tuple[jax.Array, ...]:
  """Returns the update of one parameter, and its next statistics."""
  settings = now.settings
  v_row, v_col, v, m = old
  if factoring.rows:
    row, column, v_row, v_col = _matrix_by_matrix(
      functools.partial(_factored_step, now),
      factoring,
      gradient,
      param,
      v_row,
      v_col,
    )
    step = gradient.astype(jnp.float32) * row * column
  else:
    gradient = gradient.astype(jnp.float32)
    v = now.decay * v + (1.0 - now.decay) * (gradient**2 + settings.epsilon1)
    step = gradient * jax.lax.rsqrt(v)
    step = step * _step_size(
      now, step, param.astype(jnp.float32), factoring.averaged
    )
  if settings.beta1 is not None:
    step = m = settings.beta1 * m + (1.0 - settings.beta1) * step
  if settings.weight_decay_rate is not None:
    step = step + settings.weight_decay_rate * param.astype(jnp.float32)
  return -step, v_row, v_col, v, m


def _factored_step(
  now: _Update,
  gradient: jax.Array,
  param: jax.Array,
  v_row: jax.Array,
  v_col: jax.Array,
  factoring: Factoring,
) -> _FactoredStep:
  """Returns the factors of a step, and the next statistics."""
  gradient = gradient.astype(jnp.float32)
  param = param.astype(jnp.float32)
  v_row, v_col = _factored_moments(now, gradient, v_row, v_col, factoring)
  row, column = inverse_roots(v_row, v_col, factoring)
  size = _step_size(now, gradient * row * column, param, factoring.averaged)
  return _FactoredStep(size * row, column, v_row, v_col)


def _step_size(
  now: _Update, step: jax.Array, param: jax.Array, averaged: Sequence[int]
) -> float | jax.Array:
  """What a step of root mean square 1 is multiplied with.

  Of each matrix along the BATCH axes, which keep their size; all other axes
  have size 1.
  """
  settings, size = now.settings, now.rate
  if settings.clipping_threshold is not None:
    size = size / excess(step, settings.clipping_threshold, averaged)
  if settings.multiply_by_parameter_scale:
    size = size * parameter_scale(param, settings.epsilon2, averaged)
  return size


def second_moment_decay(num_updates: jax.Array, decay_rate: float) -> jax.Array:
  """Returns `1 - n^-decay_rate`; the first update has n = 1 and decay 0."""
  return 1.0 - jnp.asarray(num_updates, jnp.float32) ** -decay_rate


def _factored_moments(
  now: _Update,
  gradient: jax.Array,
  v_row: jax.Array,
  v_col: jax.Array,
  factoring: Factoring,
) -> tuple[jax.Array, jax.Array]:
  """Returns the next `v_row` (mean over columns) and `v_col` (over rows)."""
  decay, epsilon1 = now.decay, now.settings.epsilon1

  def mean_square(axes):
    if axes == (0,) and gradient.ndim == 2 and gradient.size >= _WIDE:
      return _mean_square_of_columns(gradient) + epsilon1
    return (gradient**2 + epsilon1).mean(axis=axes)

  v_row = decay * v_row + (1.0 - decay) * mean_square(factoring.columns)
  v_col = decay * v_col + (1.0 - decay) * mean_square(factoring.rows)
  return v_row, v_col


def _mean_square_of_columns(matrix: jax.Array) -> jax.Array:
  """Returns the mean of squares over the first axis, [columns]."""

  def block_by_block(matrix):
    # Row by row, in the order in which they lie in memory. XLA on CPU goes down
    # each column: for the logits' kernel, [512, 32128], that took 40 times as
    # long.
    add = lambda total, rows: (sum(list(rows**2), total), None)
    blocks = matrix.reshape(-1, _BLOCK, matrix.shape[1])
    total = jnp.zeros(matrix.shape[1:], matrix.dtype)
    return jax.lax.scan(add, total, blocks)[0] / matrix.shape[0]

  whole = lambda matrix: (matrix**2).mean(axis=0)
  if matrix.shape[0] % _BLOCK:
    return whole(matrix)
  return jax.lax.platform_dependent(matrix, cpu=block_by_block, default=whole)


def inverse_roots(
  v_row: jax.Array, v_col: jax.Array, factoring: Factoring
) -> tuple[jax.Array, jax.Array]:
  """Returns row and column: `row column = 1 / sqrt(v_row v_col / mean(v_row))`.

  Both have all axes of the parameter, so that a step is gradient * row *
  column: `row` has size 1 along the columns, and `column` along the rows.
  """
  row = jnp.expand_dims(v_row, factoring.columns)
  column = jnp.expand_dims(v_col, factoring.rows)
  row = row / row.mean(axis=factoring.rows, keepdims=True)
  return jax.lax.rsqrt(row), jax.lax.rsqrt(column)


def excess(
  update: jax.Array, threshold: float, averaged: Sequence[int]
) -> jax.Array:
  """Returns by how much the root mean square exceeds a threshold, at least 1.

  Args:
    update: <float32>, the update of a parameter.
    threshold: the largest root mean square that is left alone.
    averaged: the axes of the mean; they are kept with size 1.
  """
  rms = jnp.sqrt(jnp.mean(update**2, axis=tuple(averaged), keepdims=True))
  return jnp.maximum(1.0, rms / threshold)


def parameter_scale(
  param: jax.Array, epsilon2: float, averaged: Sequence[int]
) -> jax.Array:
  """Returns the root mean square of a parameter, at least `epsilon2`.

  Args:
    param: <float32>, the parameter.
    epsilon2: the smallest result.
    averaged: the axes of the mean; they are kept with size 1.
  """
  rms = jnp.sqrt(jnp.mean(param**2, axis=tuple(averaged), keepdims=True))
  return jnp.maximum(rms, epsilon2)


def _matrix_by_matrix(
  function: Callable[..., PyTree], factoring: Factoring, *arrays: jax.Array
) -> PyTree:
  """Calls `function(*arrays, factoring=...)`, in parts where that is faster.

  The first array has the shape of the parameter; the leading axes of all
  arrays and results are its BATCH axes, if it has any.
  """
  shape, averaged = arrays[0].shape, factoring.averaged
  num_batch = len(shape) - len(averaged)
  whole = functools.partial(function, factoring=factoring)
  if (
    math.prod(shape) < _BEYOND_CACHE
    or averaged != tuple(range(num_batch, len(shape)))
    or not num_batch
    # Parts of a sharded axis would be brought to every device.
    or jax.sharding.get_abstract_mesh().size > 1
  ):
    return whole(*arrays)
  # Each pass over a stack that is not in the cache costs as much as all that
  # is computed in it.
  in_parts = functools.partial(_call_in_parts, function, factoring)
  return jax.lax.platform_dependent(*arrays, cpu=in_parts, default=whole)


def _call_in_parts(
  function: Callable[..., PyTree], factoring: Factoring, *arrays: jax.Array
) -> PyTree:
  """Calls `function` with as many matrices at a time as the cache holds."""
  shape, averaged = arrays[0].shape, factoring.averaged
  num_batch = len(shape) - len(averaged)
  num_matrices = math.prod(shape[:num_batch])
  fitting = max(1, _IN_CACHE // math.prod(shape[num_batch:]))
  size = next(n for n in range(fitting, 0, -1) if num_matrices % n == 0)
  # The BATCH axes of a part are one axis.
  own = Factoring(
    *(
      tuple(axis - num_batch + 1 for axis in axes)
      for axes in (averaged, factoring.rows, factoring.columns)
    )
  )
  # [*batch, ...] -> [matrices, ...]
  flat = [x.reshape(-1, *x.shape[num_batch:]) for x in arrays]

  # The map is over numbers of parts, as with a map over the arrays themselves
  # XLA would cut the parts from copies.
  def part(number):
    cut = [jax.lax.dynamic_slice_in_dim(x, number * size, size) for x in flat]
    return function(*cut, factoring=own)

  results = jax.lax.map(part, jnp.arange(num_matrices // size))
  # [parts, matrices, ...] -> [*batch, ...]
  stack = lambda x: x.reshape(*shape[:num_batch], *x.shape[2:])
  return jax.tree.map(stack, results)


def _init_statistics(
  param: jax.Array, factoring: Factoring, momentum: bool
) -> _Statistics:
  """Returns the statistics of one parameter before the first update."""
  unused = jnp.zeros((1,), jnp.float32)
  shape = np.array(param.shape, int)
  full = jnp.zeros(param.shape, jnp.float32)
  m = full if momentum else unused
  if not factoring.rows:
    return _Statistics(unused, unused, full, m)
  v_row = jnp.zeros(np.delete(shape, factoring.columns), jnp.float32)
  v_col = jnp.zeros(np.delete(shape, factoring.rows), jnp.float32)
  return _Statistics(v_row, v_col, unused, m)


def _unzip(treedef, rows, width: int) -> list[PyTree]:
  """Trees of the columns, of which each row, that of a leaf, has `width`."""
  columns = list(zip(*rows, strict=True)) or [()] * width
  return [treedef.unflatten(column) for column in columns]
