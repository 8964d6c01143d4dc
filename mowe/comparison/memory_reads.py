"""Counts the rows of tables that a token names, and their bytes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np

from mowe.comparison.report import answer_comparison
from mowe.models import initialization, model_config, parameters, token_memories
from mowe.models.families import costs, families
from mowe.words.plans import step_plans

Batch = Mapping[str, np.ndarray]

_INPUTS = {'encoder': 'encoder_input_tokens', 'decoder': 'decoder_input_tokens'}


def of_model(
  config: model_config.ModelConfig, batches: Sequence[Batch]
) -> answer_comparison.Reads | None:
  """Returns what a model reads; None for a model without addressed rows.

  Args:
    config: the config of the model.
    batches: batches of token ids that are not packed, with padding.
  """
  params = initialization.abstract_variables(families.build(config))['params']
  ordinary, tables = parameters.split_tables(params)
  groups = parameters.in_groups(tables)
  num_tokens = sum(
    int(np.count_nonzero(batch[_target(name)]))
    for batch in batches
    for name in _streams(config, batch)
  )
  if not num_tokens:
    return None
  rows = size = moved = 0.0
  for group, in_group in groups.items():
    row = sum(_row_bytes(leaf) for leaf in jax.tree.leaves(in_group))
    # Word experts may have a table for each layer.
    num_tables = len(in_group)
    for batch in batches:
      named = np.concatenate(
        [find(batch).ravel() for find in _finders(config, group)]
      )
      named = named[named >= 0]
      rows += len(named) * num_tables
      size += len(named) * row
      moved += len(np.unique(named)) * row
  learned_rows, learned_size = _learned(config, ordinary, batches)
  if not groups and not learned_rows:
    return None
  return answer_comparison.Reads(
    (rows + learned_rows) / num_tokens,
    (size + learned_size) / num_tokens,
    None if learned_rows else moved / num_tokens,
  )


def _streams(config, batch) -> list[str]:
  return [name for name in config.streams if _INPUTS[name] in batch]


def _target(stream: str) -> str:
  """The feature that is 0 for padding alone."""
  return {'encoder': _INPUTS['encoder'], 'decoder': 'decoder_target_tokens'}[
    stream
  ]


def _finders(config, group) -> list[Callable[[Batch], np.ndarray]]:
  """For each stream a function from a batch to the rows that it names."""
  if group == step_plans.EXPERTS:
    names = model_config.names_experts(config)
    ids = {'encoder': names.encoder_ids, 'decoder': names.decoder_ids}

    def experts(batch, stream):
      found = np.asarray(ids[stream](batch[_INPUTS[stream]]))
      return np.where(found < names.num_experts, found, -1)

    return [
      lambda batch, stream=stream: _of_real(
        experts(batch, stream), batch, stream
      )
      for stream in model_config.word_streams(config)
    ]
  (memory,) = (one for one in config.memories if one.name == group)
  return [
    lambda batch, stream=stream: _of_real(
      token_memories.rows_of(config, stream, batch[_INPUTS[stream]])[group],
      batch,
      stream,
    )
    for stream in token_memories.streams_of(memory)
  ]


def _of_real(rows, batch, stream) -> np.ndarray:
  """The rows, with -1 where the stream has padding."""
  real = np.asarray(batch[_target(stream)]) > 0
  real = real.reshape(real.shape + (1,) * (rows.ndim - real.ndim))
  return np.where(real, rows, -1)


def _learned(config, ordinary, batches) -> tuple[float, float]:
  """Rows and bytes that learned addresses read of ordinary parameters."""
  tokens = {
    name: sum(np.count_nonzero(batch[_target(name)]) for batch in batches)
    for name in config.streams
  }
  rows = size = 0.0
  for path, leaf in flax.traverse_util.flatten_dict(ordinary).items():
    for reader in costs.shares_read(config, path):
      if reader.share == 1 or costs.is_expert(path):
        continue
      named = float(reader.share) * leaf.shape[0] * reader.num_blocks
      rows += named * tokens[reader.stream]
      size += named * tokens[reader.stream] * _row_bytes(leaf)
  return rows, size


def _row_bytes(leaf: Any) -> int:
  return int(np.prod(leaf.shape[1:])) * leaf.dtype.itemsize
