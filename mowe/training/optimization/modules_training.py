"""Training of what was added to a model, with all that was there before frozen."""

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
class TrainAdded:
  """Another optimizer, for the modules that were added last.

  Those are slices of parameters: new slabs, and new columns of routers. Old
  modules, and everything else, get updates of zero and have no optimizer state.

  Attributes:
    optimizer: of what is trained.
    model: its config, which says what was added.
    also: regular expression of whole names of parameters that train as well,
      all of them: '.*/router/.*' for routers, '.*scale' for norms, '.*' for
      everything.
  """

  optimizer: optimizers.Optimizer
  model: model_config.ModelConfig
  also: str = ''

  def build(self, logical_axes: Any) -> optax.GradientTransformation:
    """Returns the transformation for parameters with these axes.

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
    """How many numbers of a parameter are never changed."""
    name, size = '/'.join(path), math.prod(shape)
    if self.also and re.fullmatch(self.also, name):
      return 0
    axis, number = self._parts.get(name, (0, 0))
    return size - size // shape[axis] * number

  @functools.cached_property
  def _parts(self):
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
    parts: name of a parameter -> axis, and how many of its last entries are
      trained.
    transformation: sees these slices as the parameters.
    also: regular expression of the whole names of parameters that are trained
      as wholes.
  """
  as_wholes = re.compile(also)

  def select(tree):
    """The trained slices; nodes without leaves for all else."""

    def part(keys, leaf):
      name = jax.tree_util.keystr(keys, simple=True, separator='/')
      if also and as_wholes.fullmatch(name):
        return leaf
      if name not in parts:
        return optax.MaskedNode()
      axis, number = parts[name]
      size = leaf.shape[axis]
      return jax.lax.slice_in_dim(leaf, size - number, size, axis=axis)

    return jax.tree_util.tree_map_with_path(part, tree)

  def whole(update, leaf):
    """The update of a whole parameter: zero before what is trained."""
    if isinstance(update, optax.MaskedNode):
      return jnp.zeros_like(leaf)
    before = [(n - m, 0) for n, m in zip(leaf.shape, update.shape, strict=True)]
    return jnp.pad(update, before)

  def init(params):
    return transformation.init(select(params))

  def update(updates, state, params=None):
    given = None if params is None else select(params)
    trained, state = transformation.update(select(updates), state, given)
    is_node = lambda node: isinstance(node, optax.MaskedNode)
    return jax.tree.map(whole, trained, updates, is_leaf=is_node), state

  return optax.GradientTransformation(init, update)
