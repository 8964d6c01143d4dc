"""The parameter tree of a model: ordinary parameters, and tables."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers.memory import grouped, row_table
from mowe.words.plans import step_plans

# The module name of every expert table: `experts/wi_0`, `.../mlp/experts/wo`.
_TABLE = 'experts'

# From the name of a stream to a list with one entry for each of its layers that
# use the table: the `grouped.Factors` of the gradients by the name of the
# kernel.
TableFactors = dict[str, list[dict[str, grouped.Factors]]]

# From the path of a table, such as `experts`, to its kernels by name; the only
# "kernel" of a memory's table are its rows.
Tables = dict[str, dict[str, jax.Array]]


def split_tables(params: Any) -> tuple[Any, Tables]:
  """Splits the parameters of a model into ordinary ones and tables.

  Tables are those of word experts and of memories.
  """
  ordinary, tables = {}, {}
  for path, value in flax.traverse_util.flatten_dict(params).items():
    is_table = len(path) > 1 and path[-2] == _TABLE
    if is_table or path[-1] == row_table.ROWS:
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


def is_memory(kernels: dict[str, Any]) -> bool:
  """Whether a table is that of a memory."""
  return row_table.ROWS in kernels


def in_groups(tables: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Sorts what tables have by groups, whose rows are named alike.

  Args:
    tables: path of a table -> anything.

  Returns:
    `step_plans.EXPERTS`, or the name of a memory -> path of a table -> what it
    has. Groups without a table are left out.
  """
  groups: dict[str, dict[str, Any]] = {}
  for path, value in tables.items():
    is_experts = path.rpartition('/')[2] == _TABLE
    group = step_plans.EXPERTS if is_experts else path
    groups.setdefault(group, {})[path] = value
  return groups


def by_table(factors: Any, tables: Tables) -> dict[str, TableFactors]:
  """Sorts what layers left in the collection `word_experts.FACTORS`.

  Args:
    factors: the collection, a tree from the stream over the block (`layers_0`)
      and the layer to the name of the kernel, with `grouped.Factors` as leaves.
    tables: the expert tables. A layer without a table of its own uses the
      shared table.

  Returns:
    The factors of the layers that use each table, by the path of the table.
  """
  layers: dict[tuple[str, ...], dict[str, grouped.Factors]] = {}
  for path, value in flax.traverse_util.flatten_dict(factors).items():
    layers.setdefault(path[:-1], {})[path[-1]] = value
  sorted_out: dict[str, TableFactors] = {
    name: {} for name, kernels in tables.items() if not is_memory(kernels)
  }
  for path, kernels in layers.items():
    own = '/'.join((*path, _TABLE))
    streams = sorted_out[own if own in tables else _TABLE]
    streams.setdefault(path[0], []).append(kernels)
  return sorted_out


def initial_variables(model: nn.Module, key: jax.Array, **settings: Any) -> Any:
  """Returns what `model.init` gives; call it within `jit` or `eval_shape`.

  The inputs are tiny, because no parameter depends on their length.

  Args:
    model: the module whose variables are made.
    key: random key from which parameters are drawn.
    **settings: settings of Linen's `init`, such as `mutable`.
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
