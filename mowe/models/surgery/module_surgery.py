"""Finds the layers of modules in a model, and where each module lies.

A layer of modules has a router, and parameters with the logical axis `expert`:
one slab for each module. A module is its slabs and its column of the router.
This holds for MLP modules and for attention modules, in any stack.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from mowe.layers.routers import added_modules, pruned_modules
from mowe.models import initialization, model_config, parameters
from mowe.models.families import families

Path = tuple[str, ...]
# All parameters of a model by path.
Params = Mapping[Path, np.ndarray]

_AXIS = 'expert'
_ROUTER = 'router'
_MLP = 'mlp'

# Which axis of a router's parameter counts modules, by the end of its path.
_COLUMNS = {
  ('w', 'kernel'): 1,
  ('w', 'bias'): 0,
  ('centroids',): 0,
  ('selection_bias',): 0,
}


@dataclasses.dataclass(frozen=True)
class ModuleLayer:
  """A layer of modules in one block.

  Attributes:
    place: path of the layer, such as 'decoder/layers_0/mlp'.
    layer: the Linen module of the layer, with its fields.
    num_modules: number of modules that tokens can choose.
    slabs: from the path of each parameter of the modules to the axis that
      counts modules.
    outputs: paths of those `slabs` whose last axis is the width of the model.
    columns: from the path of each parameter of the router to the axis that
      counts modules. If removed modules still count in the softmax, this axis
      is longer than `num_modules`.
  """

  place: str
  layer: nn.Module
  num_modules: int
  slabs: Mapping[Path, int]
  outputs: frozenset[Path]
  columns: Mapping[Path, int]

  @property
  def kind(self) -> str:
    """'mlp' or 'attention'."""
    return _MLP if self.place.endswith(f'/{_MLP}') else 'attention'

  @property
  def num_columns(self) -> int:
    """Number of columns of the router."""
    return self.num_modules + getattr(self.layer.logits, 'num_removed', 0)


def module_layers(config: model_config.ModelConfig) -> tuple[ModuleLayer, ...]:
  """All layers of modules, in the order of their places; () without any."""
  variables = initialization.abstract_variables(families.build(config))
  shapes = flax.traverse_util.flatten_dict(
    flax.core.unfreeze(variables['params'])
  )
  ordinary, _ = parameters.split_tables(
    flax.traverse_util.unflatten_dict(shapes)
  )
  names = flax.traverse_util.flatten_dict(
    flax.core.unfreeze(partitioning.get_axis_names(variables['params_axes']))
  )
  ordinary = flax.traverse_util.flatten_dict(ordinary)
  routers = {
    path[: path.index(_ROUTER)] for path in ordinary if _ROUTER in path
  }
  found: dict[Path, dict[Path, int]] = {}
  for path in ordinary:
    axes = tuple(names[path])
    owners = [place for place in routers if path[: len(place)] == place]
    if _AXIS in axes and owners:
      found.setdefault(max(owners, key=len), {})[path] = axes.index(_AXIS)
  return tuple(
    ModuleLayer(
      place='/'.join(place),
      layer=layer_at(config, '/'.join(place)),
      num_modules=min(shapes[path].shape[axis] for path, axis in slabs.items()),
      slabs=slabs,
      outputs=frozenset(p for p in slabs if tuple(names[p])[-1] == 'embed'),
      columns=_columns(place, ordinary),
    )
    for place, slabs in sorted(found.items(), key=_in_order)
  )


def layer_at(config: model_config.ModelConfig, place: str) -> nn.Module:
  """The layer at a place such as 'decoder/layers_0/mlp', with its fields."""
  stream, number, name = split_place(place)
  own = model_config.of_block(config, stream, number)
  if name == _MLP:
    return own.sparse_layers()[stream]
  return own.attentions()[name]


def split_place(place: str) -> tuple[str, int, str]:
  """Stream, number of the block, and name of the layer in it."""
  stream, block, name = place.split('/')
  return stream, int(block.removeprefix('layers_')), name


def with_layers(
  config: model_config.ModelConfig, changes: Mapping[str, Mapping[str, Any]]
) -> model_config.ModelConfig:
  """Returns a config whose layers at some places have other fields.

  If all layers that one field of the config makes change in the same way, that
  field is changed; otherwise the changed layers become `block_layers`.

  Args:
    config: the config of the model.
    changes: from the place of a layer to its changed fields by name.
  """
  factories = dict(config.block_layers)
  of_field: dict[str, list[str]] = {}
  for place in _places(config):
    stream, _, name = split_place(place)
    field = _field_of(config, stream, name)
    of_field.setdefault(field, []).append(place)
  fields = {}
  for field, places in of_field.items():
    first = changes.get(places[0])
    alike = all(changes.get(place) == first for place in places)
    if first and alike and not any(place in factories for place in places):
      fields[field] = _changed(getattr(config, field), first)
      continue
    for place in places:
      if place in changes:
        old = factories.get(place, getattr(config, field))
        factories[place] = _changed(old, changes[place])
  return dataclasses.replace(
    config, **fields, block_layers=tuple(sorted(factories.items(), key=_first))
  )


def check_router(layer: ModuleLayer) -> None:
  """Raises ValueError if modules cannot be added to or taken from a layer."""
  router = layer.layer.routing
  is_known = router.is_learned and router.each_token_chooses
  if not is_known or router.routes_padding:
    raise ValueError(
      'Modules can only be added to or removed from a layer in which each '
      'token chooses by learned logits and padding is not routed, but '
      f'{layer.place} has {router}. Train such a model with TokensChoose.'
    )


def plain_losses(losses: Any) -> Any:
  """Returns router losses without the loss that holds added modules back."""
  if isinstance(losses, added_modules.AddedLosses):
    return losses.losses
  return losses


def fewest(router: Any, num_modules: int) -> list[tuple[range, int]]:
  """Returns ranges of modules, each with the number that a token chooses."""
  if isinstance(router, added_modules.AddedChoose):
    old = fewest(router.router, router.num_old)
    return [*old, (range(router.num_old, num_modules), router.k)]
  while isinstance(router, pruned_modules.KeptChoose):
    router = router.router
  if isinstance(router, added_modules.AddedChoose):
    raise ValueError(
      'A layer that was pruned with its gates kept can only be pruned again if '
      'no modules had been added before, but some had. Prune the model from '
      'which it came, once.'
    )
  return [(range(num_modules), router.k)]


def _places(config):
  """Yields the places of all layers that the config's factories make."""
  blocks = config.sparse_blocks()
  for stream, name in config.layer_fields:
    numbers = blocks[stream] if name == _MLP else range(config.depths()[stream])
    if _field_of(config, stream, name) is not None:
      yield from (f'{stream}/layers_{number}/{name}' for number in numbers)


def _field_of(config, stream, name):
  """Returns the field whose factory makes these layers; None if none does."""
  field = config.layer_fields[stream, name]
  if getattr(config, field) is None:
    field = config.shared_fields.get(field, field)
  return None if getattr(config, field) is None else field


def _changed(factory: Callable[..., nn.Module], changes):
  """Returns a factory of layers with the changes, which must be fields of it.

  (`model_config.changed_factory` leaves layers alone that lack a field.)
  """
  return lambda **given: factory(**given).clone(parent=None, **changes)


def _columns(place, shapes):
  start = (*place, _ROUTER)
  return {
    path: axis
    for path in shapes
    for end, axis in _COLUMNS.items()
    if path[: len(start)] == start and path[-len(end) :] == end
  }


def _in_order(entry):
  stream, block, name = entry[0][:3]
  return stream != 'encoder', int(block.removeprefix('layers_')), name


def _first(pair):
  return pair[0]
