"""Fresh parameters of a model, each drawn by a small program of its own."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
from flax import linen as nn

from mowe.layers import parameter
from mowe.models import parameters

_Path = tuple[str, ...]


def abstract_variables(model: nn.Module) -> Any:
  """Shapes of `params`, logical axes in `params_axes`, and the recipes."""
  init = functools.partial(
    parameters.initial_variables,
    model,
    mutable=('params', 'params_axes', parameter.RECIPES),
  )
  return jax.eval_shape(init, jax.random.key(0))


def initial_parameters(
  model: nn.Module, key: jax.Array, shardings: Any = None
) -> Any:
  """Draws the parameters of a model; to be called without `jit`.

  A value depends on the key and on the name of its parameter: not on the
  devices, nor on other parameters. It is not what `model.init` gives for that
  key, but has the same distribution.

  Parameters that were declared by `parameter.declare` share one program for
  each recipe and sharding. All others are drawn by one program together.

  Args:
    model: the model.
    key: the seed; one of `threefry.key` is fastest.
    shardings: tree of shardings like the parameters, each of which is made
      where it belongs, never whole on one device; None: on the default device.
  """
  variables = abstract_variables(model)
  paths = flax.traverse_util.flatten_dict(variables['params'])
  recipes = _recipes(variables)
  placed = dict.fromkeys(paths)
  if shardings is not None:
    placed = flax.traverse_util.flatten_dict(shardings)
  values = {
    path: _program(recipe, placed[path])(_key_of(path, key))
    for path, recipe in recipes.items()
  }
  others = {path: placed[path] for path in paths if path not in recipes}
  if others:
    values |= _draw_together(model, key, others)
  return flax.traverse_util.unflatten_dict(
    {path: values[path] for path in paths}
  )


def _recipes(variables: Any) -> dict[_Path, parameter.Recipe]:
  left = flax.traverse_util.flatten_dict(variables.get(parameter.RECIPES, {}))
  # Layers may leave other things in the same collection.
  return {
    path: recipe
    for path, recipe in left.items()
    if isinstance(recipe, parameter.Recipe)
  }


@functools.cache
def _program(
  recipe: parameter.Recipe, sharding: Any
) -> Callable[[jax.Array], jax.Array]:
  def draw(key):
    return recipe(key)

  return jax.jit(draw, out_shardings=sharding)


def _key_of(path: _Path, key: jax.Array) -> jax.Array:
  digest = hashlib.sha256('/'.join(path).encode()).digest()
  return jax.random.fold_in(key, int.from_bytes(digest[:4], 'big'))


def _draw_together(
  model: nn.Module, key: jax.Array, shardings: Mapping[_Path, Any]
) -> dict[_Path, jax.Array]:
  """What Linen's `init` gives for the parameters that have shardings here."""

  def draw(key):
    params = parameters.initial_variables(model, key)['params']
    flat = flax.traverse_util.flatten_dict(params)
    return {path: flat[path] for path in shardings}

  return jax.jit(draw, out_shardings=shardings)(key)
