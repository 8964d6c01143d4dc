"""Training of modules that were added to a model, while the rest is frozen."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mowe.models import model_config
from mowe.models.surgery import modules_added
from mowe.training.optimization import optimizers


@dataclasses.dataclass(frozen=True)
class TrainAdded(optimizers.Optimizer):
  """Another optimizer, for the modules that were added last.

  New modules are slices of parameters: the last entries along the axis of
  modules, and the last columns of routers. Old modules, and all other
  parameters, get updates of zero and have no optimizer state.

  Attributes:
    optimizer: updates what is trained.
    model: the config of the model, which says what was added.
    also: regular expression of the whole names of parameters that are trained
      as well, with all of their entries: '.*/router/.*' for routers, '.*scale'
      for norms, '.*' for everything. '' adds none.
  """

  optimizer: optimizers.Optimizer
  model: model_config.ModelConfig
  also: str = ''

  def build(self, logical_axes: Any) -> optax.GradientTransformation:
    """See `Optimizer.build`.

    Raises:
      ValueError: no modules were added to the model.
    """
    parts = self._parts
    if not parts:
      raise ValueError(
        'TrainAdded is for a model to which modules were added, but there are '
        'none in this one. Add some with `mowe modules add`, or take another '
        'OPTIMIZER.'
      )
    return train_parts(parts, self.optimizer.build(logical_axes), self.also)

  def num_frozen(self, path: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """See `Optimizer.num_frozen`."""
    name, size = '/'.join(path), math.prod(shape)
    if self.also and re.fullmatch(self.also, name):
      return 0
    axis, number = self._parts.get(name, (0, 0))
    return size - size // shape[axis] * number

  @property
  def rate(self) -> optimizers.LearningRate | None:
    """See `Optimizer.rate`."""
    return self.optimizer.rate

  @functools.cached_property
  def _parts(self):
    """Name of a parameter -> its axis of modules, and how many are new."""
    return {
      '/'.join(path): part
      for path, part in modules_added.new_parts(self.model).items()
    }


def train_parts(
  parts: Mapping[str, tuple[int, int]],
  transformation: optax.GradientTransformation,
  also: str = '',
) -> optax.GradientTransformation:
  """Returns the transformation of the last entries of some parameters.

  Args:
    parts: name of a parameter -> an axis, and how many of the last entries
      along it are trained.
    transformation: gets these slices as if they were the parameters.
    also: regular expression of the whole names of parameters that are trained
      with all of their entries; '' for none.
  """
  select = functools.partial(
    _trained_slices, parts=parts, as_wholes=re.compile(also) if also else None
  )

  def init(params):
    return transformation.init(select(params))

  def update(updates, state, params=None):
    given = None if params is None else select(params)
    trained, state = transformation.update(select(updates), state, given)
    is_node = lambda node: isinstance(node, optax.MaskedNode)
    return jax.tree.map(_whole_update, trained, updates, is_leaf=is_node), state

  return optax.GradientTransformation(init, update)


def _trained_slices(
  tree: Any,
  *,
  parts: Mapping[str, tuple[int, int]],
  as_wholes: re.Pattern[str] | None,
) -> Any:
  """The trained slices of a tree, and nodes without leaves for all else."""

  def trained_slice(keys, leaf):
    name = jax.tree_util.keystr(keys, simple=True, separator='/')
    if as_wholes is not None and as_wholes.fullmatch(name):
      return leaf
    if name not in parts:
      return optax.MaskedNode()
    axis, number = parts[name]
    size = leaf.shape[axis]
    return jax.lax.slice_in_dim(leaf, size - number, size, axis=axis)

  return jax.tree_util.tree_map_with_path(trained_slice, tree)


def _whole_update(update: Any, leaf: jax.Array) -> jax.Array:
  """The update of a whole parameter: zeros before the part that is trained."""
  if isinstance(update, optax.MaskedNode):
    return jnp.zeros_like(leaf)
  before = [(n - m, 0) for n, m in zip(leaf.shape, update.shape, strict=True)]
  return jnp.pad(update, before)
