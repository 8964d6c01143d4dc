"""Bakes experts that see a token's row alone into a table (MoLE)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax
import jax
import numpy as np

from mowe.layers.memory import row_table
from mowe.layers.memory.payloads import lookup_experts
from mowe.models import model_config, token_memories

Path = tuple[str, ...]

# Rows whose experts are computed at a time.
_AT_ONCE = 1024


def baked(
  config: model_config.ModelConfig, params: Mapping[Path, Any]
) -> tuple[model_config.ModelConfig, dict[Path, Any]]:
  """Returns the same model with tables in place of its lookup experts.

  Source: MoLE, arXiv 2503.15798. Each `LookupExperts` becomes a
  `LookupMixture`, whose rows have a part for each block, as each block has
  experts of its own. A token then costs a sum instead of all experts.

  Args:
    config: the config of the model.
    params: its parameters by path; tables may be read a slice at a time.

  Returns:
    The config and the parameters of the new model.

  Raises:
    ValueError: no memory has lookup experts.
  """
  params = dict(params)
  memories = []
  for memory in config.memories:
    payload = memory.make_payload(parent=None)
    if isinstance(payload, lookup_experts.LookupExperts):
      memory = _bake(memory, payload, params)
    memories.append(memory)
  if tuple(memories) == config.memories:
    names = [memory.name for memory in config.memories]
    raise ValueError(
      'Only memories with LookupExperts can be baked into a table, but the '
      f'memories of this model are {names} without any. Give a model of '
      'gin_configs/memories/mole.gin.'
    )
  return dataclasses.replace(config, memories=tuple(memories)), params


def _bake(memory, payload, params) -> token_memories.Memory:
  """Replaces the parameters of one memory; returns the new memory."""
  table = params[memory.name, row_table.ROWS]
  parts = []
  for stream, number in memory.places():
    place = (stream, f'layers_{number}', 'memories', memory.name)
    part = memory.part_of(stream, number)
    parts.append(_outputs(payload, _below(params, place), table, part))
    for path in [path for path in params if path[: len(place)] == place]:
      if path[len(place)] != 'router':
        del params[path]
  params[memory.name, row_table.ROWS] = np.stack(parts, axis=1)
  return dataclasses.replace(
    memory,
    payload=functools.partial(
      lookup_experts.LookupMixture, payload.num_experts
    ),
    shares_rows=False,
    table_dtype='float32',
  )


def _below(params, place) -> dict[str, Any]:
  """The tree of the parameters below a place, in memory."""
  return flax.traverse_util.unflatten_dict(
    {
      path[len(place) :]: np.asarray(array[...])
      for path, array in params.items()
      if path[: len(place)] == place
    }
  )


def _outputs(payload, tree, table, part) -> np.ndarray:
  """What the experts of one block give for all rows, [rows, experts * embed]."""
  apply = jax.jit(
    lambda rows: payload.clone(dtype='float32').apply(
      {'params': tree}, rows, method='outputs_of_experts'
    )
  )
  number = table.shape[0]
  found = []
  for first in range(0, number, _AT_ONCE):
    # The last slice begins earlier, so that one program is compiled.
    start = max(0, min(first, number - _AT_ONCE))
    rows = np.asarray(table[start : start + _AT_ONCE], np.float32)[:, part]
    outputs = np.asarray(apply(rows))
    found.append(
      outputs[first - start :].reshape(len(rows) - first + start, -1)
    )
  return np.concatenate(found)
