"""Counts how often the tokens of a task choose each module of each layer."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import jax
import numpy as np
from flax import linen as nn

from mowe.evaluation import inference
from mowe.layers.routers import router_losses
from mowe.models import model_config

FILE_NAME = 'usage.json'
_FORMAT = 'mowe module usage'


@dataclasses.dataclass(frozen=True)
class LayerUsage:
  """What the tokens chose in one layer.

  Attributes:
    counts: for each module, the number of tokens that chose it.
    num_tokens: number of tokens that were routed; padding is not counted.
  """

  counts: tuple[int, ...]
  num_tokens: int

  @property
  def shares(self) -> tuple[float, ...]:
    """For each module, the share of the tokens that chose it, 0 to 1."""
    return tuple(count / max(1, self.num_tokens) for count in self.counts)

  @property
  def num_effective(self) -> float:
    """e^(entropy of the choices): N if all N modules are used equally."""
    total = sum(self.counts)
    parts = [count / total for count in self.counts if count]
    return math.exp(-sum(part * math.log(part) for part in parts))


@dataclasses.dataclass(frozen=True)
class Usage:
  """Usage of all modules of a model on a task.

  Attributes:
    layers: the usage of each layer by its place, such as
      'decoder/layers_0/mlp'.
    task: name of the task.
    model: the folder, the step and the manifest's sha256 of the weights.
  """

  layers: Mapping[str, LayerUsage]
  task: str
  model: Mapping[str, Any]


def count(
  model: nn.Module,
  params: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  progress: inference.Progress | None = None,
) -> dict[str, LayerUsage]:
  """Counts the choices of all tokens exactly, layer by layer.

  Args:
    model: a model with layers of modules. If it has a memory, this is carried
      from batch to batch, so the batches must continue each other.
    params: all parameters of the model.
    batches: batches of a task, in the form of training; padding is not counted.
    progress: called with the number of rows done so far.

  Returns:
    The usage of each layer by its place.
  """
  totals: dict[str, list[Any]] = {}
  memory, num_rows = {}, 0
  for batch in batches:
    rows = len(batch['decoder_target_tokens'])
    if model.config.memory_length and not memory:
      memory = model.config.initial_memory(rows)
    stats, memory = _stats(model, params, memory, dict(batch))
    for path, one in jax.device_get(stats).items():
      # The float32 sums of one batch are exact, as they are whole numbers below
      # 2^24. Those of all batches may exceed it, so they are int64.
      # A choice counts even if a capacity dropped it.
      counts = np.rint(one.load + one.dropped).astype(np.int64)
      tokens = round(float(one.num_tokens)) - round(float(one.num_padding))
      total = totals.setdefault(path, [np.zeros_like(counts), 0])
      total[0] += counts
      total[1] += tokens
    num_rows += rows
    if progress is not None:
      progress(num_rows)
  return {
    path: LayerUsage(tuple(counts.tolist()), tokens)
    for path, (counts, tokens) in totals.items()
  }


@functools.partial(jax.jit, static_argnums=0)
def _stats(model, params, memory, batch):
  """The RouterStats of each layer by its place, and the next memory."""
  _, changed = model.apply(
    {'params': params, model_config.MEMORY: memory},
    batch,
    enable_dropout=False,
    method='of_batch',
    mutable=[router_losses.COLLECTION, model_config.MEMORY],
  )
  sown = flax.traverse_util.flatten_dict(
    flax.core.unfreeze(changed.get(router_losses.COLLECTION, {}))
  )
  stats = {'/'.join(path[:-1]): one for path, one in sown.items()}
  return stats, changed.get(model_config.MEMORY, {})


def to_json(usage: Usage) -> dict[str, Any]:
  """Turns a usage into a tree of JSON values; `read` reads it back."""
  return {
    'format': _FORMAT,
    'task': usage.task,
    'model': dict(usage.model),
    'layers': {
      place: dataclasses.asdict(layer) for place, layer in usage.layers.items()
    },
  }


def read(file: pathlib.Path) -> Usage:
  """Reads a usage.json, which holds what `to_json` returned.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file holds something else.
  """
  if not file.is_file():
    raise FileNotFoundError(
      f'The usage of modules must be a file, but there is no file {file}. '
      'Measure it with `mowe modules usage`, which writes usage.json.'
    )
  try:
    tree = json.loads(file.read_text('utf-8'))
    if tree['format'] != _FORMAT:
      raise ValueError(f'its format is {tree["format"]!r}')
    layers = {
      place: LayerUsage(
        tuple(int(count) for count in layer['counts']), int(layer['num_tokens'])
      )
      for place, layer in tree['layers'].items()
    }
    return Usage(layers, tree['task'], dict(tree['model']))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{file} must be a file that `mowe modules usage` wrote, but reading it '
      f'failed: {type(error).__name__}: {error}. Give its usage.json.'
    ) from error
