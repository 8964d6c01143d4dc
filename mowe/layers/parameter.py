"""Declares the parameters of layers, with logical axes and a recipe.

Linen's `init` is one program that draws every parameter. It takes seconds to
compile, because the code of a draw is repeated for each parameter. A parameter
that is declared here leaves its `Recipe` beside its value. With all recipes,
`models/initialization.py` draws the parameters one by one, and compiles one
small program for each distinct recipe.
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

# Linen's initializers, cached: equal settings give the same function object, so
# that recipes which hold them compare equal.
normal = functools.cache(nn.initializers.normal)
variance_scaling = functools.cache(nn.initializers.variance_scaling)

# The collection of recipes. Linen's `init` does not return this collection
# unless it is asked to, so that recipes do not appear among the variables.
RECIPES = 'intermediates'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a parameter is drawn. Equal recipes share one compiled program.

  Attributes:
    initializer: function of key, shape and dtype that draws the parameter.
      Recipes are equal only if this is the same function object, as `normal`
      and `variance_scaling` of this module return it for equal settings.
    shape: shape of the parameter.
    dtype: dtype of the parameter.

  Call: a key to the parameter, <dtype>[*shape].
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
  """Declares a parameter of a layer and returns its value.

  Args:
    module: the layer, in its `setup` or its compact method.
    name: name of the parameter in the layer.
    initializer: function of key, shape and dtype that draws the parameter; see
      `Recipe`.
    shape: shape of the parameter.
    axes: logical name of each axis, kept in `params_axes` as T5X expects.
    dtype: dtype of the parameter.

  Returns:
    The parameter, <dtype>[*shape].
  """
  recipe = Recipe(initializer, shape, dtype)
  value = partitioning.param_with_axes(
    name, initializer, shape, recipe.dtype, axes=axes, module=module
  )
  if module.is_initializing():
    # Without reduce_fn Linen would collect the values of `sow` in a tuple.
    module.sow(RECIPES, name, recipe, reduce_fn=lambda _, new: new)
  return value
