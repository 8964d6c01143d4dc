"""Optimizers of ordinary parameters, as small classes for gin files.

Each class holds settings, and its `build(logical_axes)` returns an optax
transformation. `ClipByGlobalNorm` and `Freeze` wrap another optimizer:

  Freeze(ClipByGlobalNorm(Adafactor(schedule), max_norm=1.0), 'encoder/.*')

The rows of expert tables have optimizers of their own (`row_optimizers`).
"""

import dataclasses
import math
import re
from typing import Any

import jax
import optax

from mowe.training.optimization import adafactor_transform

PyTree = Any
LearningRate = adafactor_transform.LearningRate

_NORMS_AND_BIASES = r'(.*/)?(scale|bias)'


class Optimizer:
  """Base of the settings of an optimizer, before the parameters are known."""

  def build(self, logical_axes: PyTree | None) -> optax.GradientTransformation:
    """Returns the transformation of the parameters.

    Args:
      logical_axes: tree of the parameters with the names of the axes of each;
        None if they are not known. See `adafactor_transform.adafactor`.
    """
    raise NotImplementedError

  def num_frozen(self, path: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """How many numbers of a parameter are never changed."""
    del path, shape
    return 0

  @property
  def rate(self) -> LearningRate | None:
    """The learning rate to show with the metrics; None shows none."""
    return None


@dataclasses.dataclass(frozen=True)
class Adafactor(adafactor_transform.AdafactorSettings, Optimizer):
  """T5X's Adafactor; `adafactor_transform.AdafactorSettings` explains it."""

  def build(self, logical_axes: PyTree | None) -> optax.GradientTransformation:
    """See `Optimizer.build`; parameters of rank 3 or more must have axes."""
    return adafactor_transform.adafactor(self, logical_axes)

  @property
  def rate(self) -> LearningRate:
    """See `Optimizer.rate`."""
    return self.learning_rate


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
  """Adam with decoupled weight decay, which skips norms and biases.

  Attributes:
    learning_rate: a number, or a schedule of the number of updates made.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: multiplied by the learning rate, as in optax.
    no_decay: regular expression of the whole names of parameters that do not
      decay.
  """

  learning_rate: LearningRate
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  no_decay: str = _NORMS_AND_BIASES

  def build(
    self, logical_axes: PyTree | None = None
  ) -> optax.GradientTransformation:
    """See `Optimizer.build`; the axes are not needed."""
    del logical_axes
    return adamw(
      self.learning_rate,
      b1=self.b1,
      b2=self.b2,
      eps=self.eps,
      weight_decay=self.weight_decay,
      no_decay=self.no_decay,
    )

  @property
  def rate(self) -> LearningRate:
    """See `Optimizer.rate`."""
    return self.learning_rate


@dataclasses.dataclass(frozen=True)
class ClipByGlobalNorm(Optimizer):
  """Clips the norm of all gradients together before another optimizer.

  Attributes:
    optimizer: gets the clipped gradients.
    max_norm: the largest norm; gradients with a larger one are shrunk to it.
  """

  optimizer: Optimizer
  max_norm: float = 1.0

  def build(self, logical_axes: PyTree | None) -> optax.GradientTransformation:
    """See `Optimizer.build`."""
    return optax.chain(
      optax.clip_by_global_norm(self.max_norm),
      self.optimizer.build(logical_axes),
    )

  def num_frozen(self, path: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """See `Optimizer.num_frozen`."""
    return self.optimizer.num_frozen(path, shape)

  @property
  def rate(self) -> LearningRate | None:
    """See `Optimizer.rate`."""
    return self.optimizer.rate


@dataclasses.dataclass(frozen=True)
class Freeze(Optimizer):
  """Another optimizer, for all parameters but those that match a pattern.

  Attributes:
    optimizer: updates the parameters that do not match.
    pattern: regular expression of the whole names of the frozen parameters,
      such as 'encoder/.*'.
  """

  optimizer: Optimizer
  pattern: str

  def build(self, logical_axes: PyTree | None) -> optax.GradientTransformation:
    """See `Optimizer.build`."""
    return freeze(self.pattern, self.optimizer.build(logical_axes))

  def num_frozen(self, path: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """See `Optimizer.num_frozen`."""
    if re.fullmatch(self.pattern, '/'.join(path)):
      return math.prod(shape)
    return self.optimizer.num_frozen(path, shape)

  @property
  def rate(self) -> LearningRate | None:
    """See `Optimizer.rate`."""
    return self.optimizer.rate


def adamw(
  learning_rate: LearningRate,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  no_decay: str = _NORMS_AND_BIASES,
) -> optax.GradientTransformation:
  """Returns optax.adamw; the arguments are explained at `AdamW`."""

  def mask(params):
    return jax.tree.map(lambda matched: not matched, _matches(no_decay, params))

  return optax.adamw(
    learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask
  )


def freeze(
  pattern: str, transformation: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns the transformation without the parameters that match.

  Frozen parameters get updates of zero, have no optimizer state, and their
  gradients do not count in a global norm inside `transformation`.

  Args:
    pattern: regular expression of whole names, such as 'encoder/.*'.
    transformation: updates the parameters that do not match.

  Raises (at init):
    ValueError: no parameter matches.
  """

  def labels(params):
    matches = _matches(pattern, params)
    if not any(jax.tree.leaves(matches)):
      raise ValueError(
        'The pattern of frozen parameters must match at least one whole '
        f'name, but {pattern!r} matches none of '
        f'{_first_names(params)}. Correct the pattern or leave Freeze out.'
      )
    return jax.tree.map(lambda frozen: 'frozen' if frozen else 'train', matches)

  return optax.multi_transform(
    {'train': transformation, 'frozen': optax.set_to_zero()}, labels
  )


def _matches(pattern: str, params: PyTree) -> PyTree:
  """Returns a tree of bool: whether the whole name of a parameter matches."""
  compiled = re.compile(pattern)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: bool(compiled.fullmatch(_name(path))), params
  )


def _first_names(params: PyTree, limit: int = 5) -> str:
  names = [_name(path) for path, _ in jax.tree.leaves_with_path(params)]
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return ', '.join(names[:limit]) + more


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
