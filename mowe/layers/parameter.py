"""How a layer declares a parameter: its logical axes, and how it is drawn.

Linen's `init` is one program that draws every parameter, and takes seconds to
compile, as each draw is code of its own. A parameter declared here leaves its
`Recipe` beside its value: who has all recipes can draw the parameters one by
one, with a small program for each kind (`models/initialization.py`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

# Linen's, but with equal settings they are the same function.
normal = functools.cache(nn.initializers.normal)
variance_scaling = functools.cache(nn.initializers.variance_scaling)

# The collection of recipes: the one that `init` leaves out unless asked for it.
RECIPES = 'intermediates'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a parameter is drawn; equal ones share one compiled program.

  Attributes:
    initializer: called with key, shape and dtype; the same function, say one
      of `normal` and `variance_scaling` above, makes recipes equal.
    shape: of the parameter.
    dtype: of the parameter.

  Call: a key to the parameter.
  """

  initializer: Initializer
  shape: tuple[int, ...]
  dtype: Any

  def __call__(self, key: jax.Array) -> jax.Array:
    return self.initializer(key, self.shape, self.dtype)


def declare(
  module: nn.Module,
  name: str,
  initializer: Initializer,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  dtype: Any = jnp.float32,
) -> jax.Array:
  """The parameter `name` of `module`.

  Args:
    module: the layer, in its `setup` or its compact method.
    name: of the parameter in the layer.
    initializer: see `Recipe`.
    shape: of the parameter.
    axes: logical name of each axis, kept in `params_axes` as T5X expects.
    dtype: of the parameter, which the initializer is given.
  """
  recipe = Recipe(initializer, shape, dtype)
  value = partitioning.param_with_axes(
    name, initializer, shape, recipe.dtype, axes=axes, module=module
  )
  if module.is_initializing():
    # Without reduce_fn Linen would append to a tuple.
    module.sow(RECIPES, name, recipe, reduce_fn=lambda _, new: new)
  return value
