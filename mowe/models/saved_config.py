"""A model's config as JSON, so that a folder of weights says what it holds.

Reading one can make nothing but the classes of this package: a file that came
with downloaded weights is data, never code.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mowe.models import t5

# What the stack gives to a layer, or what Linen adds: no part of its config.
_GIVEN = {'parent', 'name', 'dtype', 'dropout_rate', 'table'}


def to_json(config: t5.T5Config) -> dict[str, Any]:
  """The config as a tree of JSON values; the routing is saved on its own."""
  tree = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name == 'routing':
      continue
    if field.name == 'dtype':
      value = jnp.dtype(value).name
    if field.name == 'sparse_feed_forward' and value is not None:
      value = _layer_to_json(config.make_sparse_feed_forward())
    tree[field.name] = value
  return json.loads(json.dumps(tree))


def from_json(
  tree: dict[str, Any], routing: t5.Routing | None = None, **changes: Any
) -> t5.T5Config:
  """Inverse of `to_json`.

  Args:
    tree: what `to_json` gave.
    routing: the model's routing vocabulary, if it has one.
    **changes: fields to replace, such as `dropout_rate=0.0`.

  Raises:
    ValueError: the tree names a field or a class that this package lacks.
  """
  known = {field.name for field in dataclasses.fields(t5.T5Config)}
  unknown = sorted(set(tree) - known)
  if unknown:
    raise ValueError(
      f'A model config may only have the fields {sorted(known)}, but has '
      f'{unknown}. It was written by another version: use that one.'
    )
  values = {name: _tuples(value) for name, value in tree.items()}
  layer = tree.get('sparse_feed_forward')
  if layer is not None:
    values['sparse_feed_forward'] = _layer_from_json(layer)
  return t5.T5Config(**(values | {'routing': routing} | changes))


def _layer_to_json(layer) -> dict[str, Any]:
  # gin makes a subclass of what it configures: the module's own class counts.
  cls = next(c for c in type(layer).__mro__ if c.__module__.startswith('mowe.'))
  fields = {
    field.name: getattr(layer, field.name)
    for field in dataclasses.fields(layer)
    if field.name not in _GIVEN
  }
  return {'class': f'{cls.__module__}.{cls.__qualname__}', 'fields': fields}


def _layer_from_json(tree: dict[str, Any]):
  module, _, name = tree['class'].rpartition('.')
  layer = None
  if module.startswith('mowe.layers.'):
    with contextlib.suppress(ImportError):
      layer = getattr(importlib.import_module(module), name, None)
  if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
    raise ValueError(
      'A saved feed-forward must be a class in mowe.layers, but is '
      f'{tree["class"]!r}. Make the config in code instead of loading it.'
    )
  fields = {key: _tuples(value) for key, value in tree['fields'].items()}
  return functools.partial(layer, **fields)


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
