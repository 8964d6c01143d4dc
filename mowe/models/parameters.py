"""The parameter tree of a model: ordinary parameters, and expert tables."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers.memory import grouped

# Module name of every expert table: `experts/wi_0`, `.../mlp/experts/wo`.
_TABLE = 'experts'

# Stream name -> for each of its layers that use a table: kernel name ->
# `grouped.Factors` of the kernel's gradient.
TableFactors = dict[str, list[dict[str, grouped.Factors]]]

# Path of a table, such as `experts` -> its kernels by name.
Tables = dict[str, dict[str, jax.Array]]


def split_tables(params: Any) -> tuple[Any, Tables]:
  """Takes the expert tables out of a model's parameters."""
  ordinary, tables = {}, {}
  for path, value in flax.traverse_util.flatten_dict(params).items():
    if len(path) > 1 and path[-2] == _TABLE:
      tables.setdefault('/'.join(path[:-1]), {})[path[-1]] = value
    else:
      ordinary[path] = value
  return flax.traverse_util.unflatten_dict(ordinary), tables


def merge_tables(params: Any, tables: Tables) -> Any:
  """Inverse of `split_tables`."""
  flat = flax.traverse_util.flatten_dict(params)
  for name, kernels in tables.items():
    for kernel, value in kernels.items():
      flat[(*name.split('/'), kernel)] = value
  return flax.traverse_util.unflatten_dict(flat)


def by_table(factors: Any, tables: Tables) -> dict[str, TableFactors]:
  """Sorts what layers left in the collection `word_experts.FACTORS`.

  Args:
    factors: stream -> `layers_0` -> ... -> kernel name -> Factors.
    tables: a layer without a table of its own uses the shared one.

  Returns:
    For the path of each table the factors of its layers.
  """
  layers: dict[tuple[str, ...], dict[str, grouped.Factors]] = {}
  for path, value in flax.traverse_util.flatten_dict(factors).items():
    layers.setdefault(path[:-1], {})[path[-1]] = value
  sorted_out: dict[str, TableFactors] = {name: {} for name in tables}
  for path, kernels in layers.items():
    own = '/'.join((*path, _TABLE))
    streams = sorted_out[own if own in tables else _TABLE]
    streams.setdefault(path[0], []).append(kernels)
  return sorted_out


def initial_variables(model: nn.Module, key: jax.Array, **settings: Any) -> Any:
  """What `model.init` gives; wrap in `jit` or `eval_shape`.

  Lengths do not matter to any parameter, so tiny inputs do. `settings` are for
  Linen, such as `mutable`.
  """
  ids, config = jnp.ones((1, 2), jnp.int32), model.config
  batch = {'decoder_target_tokens': ids}
  for stream in config.streams:
    batch[f'{stream}_input_tokens'] = ids
    if config.sparse_feed_forward is not None:
      batch[f'{stream}_routing_ids'] = jnp.zeros((1, 2), jnp.int32)
  return model.init(
    key, batch, enable_dropout=False, method='of_batch', **settings
  )
