"""Draws fresh parameters of a model, each by a small compiled program."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from mowe.layers import parameter
from mowe.models import parameters, threefry

_Path = tuple[str, ...]


def abstract_variables(model: nn.Module) -> Any:
  """Returns a model's variables as shapes, without drawing any.

  `params` holds shapes, `params_axes` logical axes, and `parameter.RECIPES` how
  each parameter is drawn. A parameter that was declared without logical axes,
  such as that of a plain `nn.Dense` in a user's layer, gets axes without names,
  so it is replicated on every device.
  """
  variables = _abstract_variables(_SameConfig(model))
  # The caller may change its tree.
  flat = flax.traverse_util.flatten_dict(variables, keep_empty_nodes=True)
  return flax.traverse_util.unflatten_dict(flat)


class _SameConfig:
  """A model that equals all others of the very same config object.

  Equal configs are not enough: a factory of gin stands for what the gin files
  bind now.
  """

  def __init__(self, model: nn.Module):
    self.model = model

  def __hash__(self) -> int:
    return hash((type(self.model), id(self.model.config)))

  def __eq__(self, other: object) -> bool:
    return (
      isinstance(other, _SameConfig)
      and type(other.model) is type(self.model)
      and other.model.config is self.model.config
    )


# A run asks for the variables of its model several times, and tracing a deep
# model takes seconds.
@functools.lru_cache(maxsize=8)
def _abstract_variables(same: _SameConfig) -> Any:
  model = same.model
  init = functools.partial(
    parameters.initial_variables,
    model,
    mutable=('params', 'params_axes', parameter.RECIPES),
  )
  variables = flax.core.unfreeze(jax.eval_shape(init, jax.random.key(0)))
  axes = flax.traverse_util.flatten_dict(variables.get('params_axes', {}))
  for path, leaf in flax.traverse_util.flatten_dict(
    variables['params']
  ).items():
    # The name under which Linen keeps the axes of a parameter.
    named = (*path[:-1], f'{path[-1]}_axes')
    if named not in axes:
      axes[named] = partitioning.AxisMetadata((None,) * leaf.ndim)
  variables['params_axes'] = flax.traverse_util.unflatten_dict(axes)
  return variables


def initial_parameters(
  model: nn.Module, key: jax.Array, shardings: Any = None
) -> Any:
  """Draws the parameters of a model; call it outside of `jit`.

  A value depends on the key and on the name of its parameter, but neither on
  the devices nor on other parameters. It differs from the value of `model.init`
  for the same key, but has the same distribution.

  Parameters that were declared by `parameter.declare` share one program for
  each recipe and sharding. All others are drawn by one program together.

  Args:
    model: the module whose parameters are drawn.
    key: the random key; one that `threefry.key` returned is the fastest.
    shardings: tree of shardings of the parameters to draw. Each is drawn in its
      sharding and never exists whole on one device. None draws all parameters
      on the default device.

  Returns:
    The tree of the parameters that were drawn.
  """
  variables = abstract_variables(model)
  recipes = _recipes(variables)
  if shardings is None:
    placed = dict.fromkeys(flax.traverse_util.flatten_dict(variables['params']))
  else:
    placed = flax.traverse_util.flatten_dict(shardings)
  values = {
    path: _program(recipes[path], sharding)(_key_of(path, key))
    for path, sharding in placed.items()
    if path in recipes
  }
  others = {path: placed[path] for path in placed if path not in recipes}
  if others:
    values |= _draw_together(model, key, others)
  return flax.traverse_util.unflatten_dict(
    {path: values[path] for path in placed}
  )


def initial_rows(
  model: nn.Module, key: jax.Array, tables: parameters.Tables
) -> Callable[[np.ndarray], parameters.Tables]:
  """Draws some rows of expert tables as `initial_parameters` draws them all.

  Args:
    model: the module that has the tables.
    key: a random key that `threefry.key` returned.
    tables: from the path of a table to its kernels by name; only the names are
      read, so abstract arrays will do.

  Returns:
    A function from the numbers of experts <int>[n] to their rows, arrays of
    NumPy. Programs are compiled for each kind of kernel and few numbers of
    them, see `_ROOMS`.
  """
  recipes = _recipes(abstract_variables(model))
  paths = {
    table: {kernel: (*table.split('/'), kernel) for kernel in kernels}
    for table, kernels in tables.items()
  }

  def draw_some(rows):
    room = next(one for one in _ROOMS if one >= len(rows))
    padded = np.resize(np.asarray(rows, np.uint32), room)
    return jax.tree.map(
      lambda path: _program_of_rows(recipes[path])(_key_of(path, key), padded),
      paths,
      is_leaf=lambda node: isinstance(node, tuple),
    )

  def draw(rows):
    largest = _ROOMS[-1]
    drawn = [
      draw_some(rows[first : first + largest])
      for first in range(0, max(1, len(rows)), largest)
    ]
    # Only the last ones may be too many. JAX would compile a slice of them
    # anew for each number of rows.
    return jax.tree.map(
      lambda *some: np.concatenate(some)[: len(rows)], *jax.device_get(drawn)
    )

  return draw


# Rows are drawn so many at a time, more than the largest number in several
# calls: so there are a few programs, and few rows are drawn in vain.
_ROOMS = tuple(4**i for i in range(2, 7))


def _recipes(variables: Any) -> dict[_Path, parameter.Recipe]:
  left = flax.traverse_util.flatten_dict(variables.get(parameter.RECIPES, {}))
  # Layers of users may leave other values in the same collection.
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


@functools.cache
def _program_of_rows(
  recipe: parameter.Recipe,
) -> Callable[[jax.Array, np.ndarray], jax.Array]:
  one = dataclasses.replace(recipe, shape=(1, *recipe.shape[1:]))

  def draw_one(key, row):
    return one(threefry.key_of_rows(key, row, recipe.shape))[0]

  return jax.jit(jax.vmap(draw_one, in_axes=(None, 0)))


def _key_of(path: _Path, key: jax.Array) -> jax.Array:
  # A hash of the name, so that the key does not depend on other parameters.
  digest = hashlib.sha256('/'.join(path).encode()).digest()
  return jax.random.fold_in(key, int.from_bytes(digest[:4], 'big'))


def _draw_together(
  model: nn.Module, key: jax.Array, shardings: Mapping[_Path, Any]
) -> dict[_Path, jax.Array]:
  """Draws the parameters that have shardings here by Linen's `init`."""

  def draw(key):
    params = parameters.initial_variables(model, key)['params']
    flat = flax.traverse_util.flatten_dict(params)
    return {path: flat[path] for path in shardings}

  return jax.jit(draw, out_shardings=shardings)(key)
