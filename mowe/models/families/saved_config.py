"""A model's config as JSON, so that a folder of weights says what it holds.

Such a file may come with weights from a stranger. So reading one imports and
makes nothing but the classes of `mowe.layers`, and those of modules that the
user has trusted by name (`trust`): the file is data, never code.
"""

import base64
import contextlib
import dataclasses
import functools
import importlib
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.models import model_config, token_memories
from mowe.models.families import families
from mowe.words.addresses import expert_address

# Fields of a layer that the stack, the run or Linen sets. They are not part of
# the saved config.
_GIVEN = {
  'parent',
  'name',
  'dtype',
  'dropout_rate',
  'table',
  'num_slots',
  'rows_from',
}

# Fields that the stack sets in addition, by the config field of the layer.
_OF_HEADS = {'num_heads', 'head_dim', 'relpos_bias'}
_GIVEN_TO = {
  'attention': _OF_HEADS,
  'encoder_attention': _OF_HEADS,
  'decoder_attention': _OF_HEADS,
}

# The field of the file that names the family.
_FAMILY = 'family'

_BLOCK_LAYERS = 'block_layers'
_MEMORIES = 'memories'
_EXPERT_NAMES = 'expert_names'
_ROUTING = 'routing'
_ADDRESS = 'address'

# The key of a factory of layers that is a field of another layer.
_FACTORY = 'factory'

# Modules and packages of this package whose classes a saved config may name.
_OWN = ('mowe.layers.', 'mowe.words.addresses.', 'mowe.models.token_memories.')

# Longer tuples of integers, such as the table of a HashRouter, become bytes.
_LONG = 64
_INTEGER_TYPES = ('uint8', 'uint16', 'int64')


# Full names of the modules and packages that were given to `trust`.
_trusted: set[str] = set()


def trust(*modules: str) -> None:
  """Lets saved configs name classes of these modules, for this process.

  Importing a module runs its code: trust what you would run yourself.

  Args:
    *modules: full names, such as 'my_project.layers'; a package stands for all
      modules in it.
  """
  _trusted.update(modules)


def to_json(config: model_config.ModelConfig) -> dict[str, Any]:
  """The config as a tree of JSON values; the routing is saved on its own.

  Raises:
    ValueError: a layer holds a class or a value that could not be read again.
  """
  tree: dict[str, Any] = {_FAMILY: families.of_config(config).name}
  parts = config.parts()
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name == _ROUTING:
      continue
    if field.name == _BLOCK_LAYERS:
      # The key is left out if there are none.
      if value:
        tree[field.name] = _block_layers_to_json(config)
      continue
    if field.name == _MEMORIES:
      if value:
        tree[field.name] = list(map(_memory_to_json, value))
      continue
    if field.name == _EXPERT_NAMES:
      if value is not None:
        tree[field.name] = _expert_names_to_json(value)
      continue
    if field.name == 'dtype':
      value = jnp.dtype(value).name
    if field.name in parts:
      value = _layer_to_json(field.name, parts[field.name])
    tree[field.name] = value
  return json.loads(json.dumps(tree))


def from_json(
  tree: dict[str, Any],
  routing: model_config.Routing | None = None,
  **changes: Any,
) -> model_config.ModelConfig:
  """Inverse of `to_json`.

  Args:
    tree: what `to_json` gave.
    routing: the model's routing vocabulary, if it has one.
    **changes: fields to replace, such as `dropout_rate=0.0`.

  Raises:
    ValueError: the tree names a field or a class that this package lacks.
  """
  tree = dict(tree)
  cls = families.family_of_name(tree.pop(_FAMILY, None)).config_class
  known = {field.name for field in dataclasses.fields(cls)}
  _check_names('A model config', tree, known)
  values = {}
  for name, value in tree.items():
    if name == _BLOCK_LAYERS:
      values[name] = tuple(
        (place, _factory_from_json(layer)) for place, layer in value.items()
      )
    elif name == _MEMORIES:
      values[name] = tuple(_memory_from_json(one, routing) for one in value)
    elif name == _EXPERT_NAMES:
      values[name] = _expert_names_from_json(value, routing)
    elif isinstance(value, dict):
      values[name] = _factory_from_json(value)
    else:
      values[name] = _tuples(value)
  return cls(**(values | {'routing': routing} | changes))


def _block_layers_to_json(config):
  layers = {}
  for place, _ in config.block_layers:
    stream, block, name = place.split('/')
    number = int(block.removeprefix('layers_'))
    field = config.layer_fields[stream, name]
    layer = config.of_block(stream, number).parts()[field]
    layers[place] = _layer_to_json(field, layer)
  return layers


def _memory_to_json(memory):
  tree = {
    field.name: getattr(memory, field.name)
    for field in dataclasses.fields(memory)
    if field.name != 'rows_from'
  }
  payload = memory.make_payload(parent=None)
  return tree | {
    'address': _address_to_json(memory.address),
    'payload': _part_to_json(payload, leave_out=_GIVEN),
    'place': _part_to_json(memory.place),
  }


def _memory_from_json(tree, routing):
  known = {field.name for field in dataclasses.fields(token_memories.Memory)}
  _check_names('A saved memory', tree, known)
  return token_memories.Memory(
    **tree
    | {
      'address': _address_from_json(tree['address'], routing),
      'payload': _factory_from_json(tree['payload']),
      'place': _value_from_json(tree['place']),
    }
  )


def _expert_names_to_json(names):
  return {
    'address': _address_to_json(names.address),
    'num_experts': names.num_experts,
  }


def _expert_names_from_json(tree, routing):
  known = {
    field.name for field in dataclasses.fields(expert_address.ExpertAddress)
  }
  _check_names('A saved name of experts', tree, known)
  address = _address_from_json(tree['address'], routing)
  return expert_address.ExpertAddress(**tree | {'address': address})


def _address_to_json(address):
  # The routing vocabulary is a file of its own, and an address may hold another
  # one that reads it.
  tree = _part_to_json(address, leave_out={_ROUTING, _ADDRESS})
  if _has_field(address, _ADDRESS):
    tree['fields'][_ADDRESS] = _address_to_json(address.address)
  return tree


def _address_from_json(tree, routing):
  inner = tree['fields'].get(_ADDRESS)
  tree = tree | {
    'fields': {k: v for k, v in tree['fields'].items() if k != _ADDRESS}
  }
  cls, fields = _part_from_json(tree, 'A saved address')
  if inner is not None:
    fields[_ADDRESS] = _address_from_json(inner, routing)
  if _has_field(cls, _ROUTING):
    fields[_ROUTING] = routing
  return cls(**fields)


def _has_field(part, name):
  return any(field.name == name for field in dataclasses.fields(part))


def _layer_to_json(field, layer):
  given = _GIVEN | _GIVEN_TO.get(field, set())
  return _part_to_json(layer, leave_out=given)


def _factory_from_json(tree):
  what = 'A saved layer'
  cls, fields = _part_from_json(tree, what)
  if not issubclass(cls, nn.Module):
    raise ValueError(_not_a_class(what, tree))
  # A class without changed fields stays a bare class, because configs are
  # compared and two `functools.partial` are never equal.
  return functools.partial(cls, **fields) if fields else cls


def _part_to_json(part, leave_out=frozenset()) -> dict[str, Any]:
  """Returns a layer, or a part of one, as its class and its fields."""
  # gin makes a subclass of a configured class, with the same module and name.
  cls = type(part)
  name = f'{cls.__module__}.{cls.__qualname__}'
  if cls.__module__ == '__main__' or not _imported(name):
    raise ValueError(
      'A model can only be saved if its classes are at the top level of a '
      'module that can be imported, so that it can be read again, but it has '
      f'a {name}. Move the class to a module of its own.'
    )
  fields = {
    field.name: _value_to_json(
      getattr(part, field.name), f'{name}.{field.name}'
    )
    for field in dataclasses.fields(part)
    if field.name not in leave_out
  }
  return {'class': name, 'fields': fields}


def _value_to_json(value, name):
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, tuple | list):
    if len(value) > _LONG and all(type(x) is int for x in value):
      return _integers_to_json(value)
    return [_value_to_json(x, name) for x in value]
  if isinstance(value, type | functools.partial):
    return {_FACTORY: _part_to_json(value(parent=None), leave_out=_GIVEN)}
  if dataclasses.is_dataclass(value) and not isinstance(value, nn.Module):
    return _part_to_json(value)
  raise ValueError(
    f'{name} must be a number, a text, a tuple or a class of mowe.layers to be '
    f'saved, but is a {type(value).__name__}. Make an array a tuple with '
    'tuple(array.tolist()).'
  )


def _part_from_json(tree, what) -> tuple[type, dict[str, Any]]:
  """The class that a tree names, and the values of its fields."""
  cls = None
  if set(tree) == {'class', 'fields'} and isinstance(tree['class'], str):
    cls = _class_of(tree['class'])
  if cls is None:
    raise ValueError(_not_a_class(what, tree))
  known = {field.name for field in dataclasses.fields(cls)}
  _check_names(tree['class'], tree['fields'], known)
  values = {
    key: _value_from_json(value) for key, value in tree['fields'].items()
  }
  return cls, values


def _value_from_json(value):
  if isinstance(value, list):
    return tuple(map(_value_from_json, value))
  if isinstance(value, dict):
    if 'integers' in value:
      return _integers_from_json(value)
    if _FACTORY in value:
      return _factory_from_json(value[_FACTORY])
    what = 'A part of a saved feed-forward'
    cls, fields = _part_from_json(value, what)
    if issubclass(cls, nn.Module):
      raise ValueError(_not_a_class(what, value))
    return cls(**fields)
  return value


def _class_of(name):
  """Returns the layer or frozen class of this name; None if there is none.

  Raises:
    ValueError: the class is in a module that is not trusted.
  """
  module, _, _ = name.rpartition('.')
  if not module.startswith('mowe.'):
    _check_trusted(name, module)
  elif not f'{module}.'.startswith(_OWN):
    return None
  return _imported(name)


def _imported(name):
  """The dataclass of this name after its module was imported, or None."""
  module, _, short = name.rpartition('.')
  found = None
  with contextlib.suppress(ImportError, ValueError):
    found = getattr(importlib.import_module(module), short, None)
  is_whole_name = isinstance(found, type) and found.__module__ == module
  return found if is_whole_name and dataclasses.is_dataclass(found) else None


def _check_trusted(name, module):
  parts = module.split('.')
  packages = {'.'.join(parts[:i]) for i in range(1, len(parts) + 1)}
  if not packages & _trusted:
    raise ValueError(
      'A saved model must be made of classes of mowe.layers or of modules that '
      f'you trust, as importing a module runs its code, but it names {name!r}. '
      'If you know where the model comes from, add --trust_module '
      f"{module}, or call mowe.trust('{module}')."
    )


def _not_a_class(what, tree):
  return (
    f'{what} must name a class of mowe.layers, or of a module that you trust, '
    'and give its fields, but is '
    f'{tree.get("class", tree)!r}. Make the config in code instead of loading '
    'it.'
  )


def _check_names(what, found, known):
  unknown = sorted(set(found) - known)
  if unknown:
    raise ValueError(
      f'{what} may only have the fields {sorted(known)}, but has {unknown}. It '
      'was written by another version of mowe: use that version.'
    )


def _integers_to_json(values):
  # The smallest integer type that holds all values.
  kind = next(
    kind
    for kind in _INTEGER_TYPES
    if np.iinfo(kind).min <= min(values) <= max(values) <= np.iinfo(kind).max
  )
  array = np.asarray(values, np.dtype(kind).newbyteorder('<'))
  return {
    'integers': base64.b64encode(array.tobytes()).decode(),
    'dtype': kind,
  }


def _integers_from_json(tree):
  kind = tree.get('dtype')
  if kind not in _INTEGER_TYPES:
    raise ValueError(
      f'Saved integers must have one of the types {_INTEGER_TYPES}, but have '
      f'{kind!r}. The file was changed: restore it.'
    )
  content = base64.b64decode(tree['integers'], validate=True)
  return tuple(
    np.frombuffer(content, np.dtype(kind).newbyteorder('<')).tolist()
  )


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
