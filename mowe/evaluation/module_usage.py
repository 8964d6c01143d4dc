"""How often the tokens of a task choose each module, layer by layer."""

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
  """Choices of the tokens of one layer.

  Attributes:
    counts: for each module, the number of tokens that chose it.
    num_tokens: that were routed; padding was not.
  """

  counts: tuple[int, ...]
  num_tokens: int

  @property
  def shares(self) -> tuple[float, ...]:
    """Share of the tokens that chose each module."""
    return tuple(count / max(1, self.num_tokens) for count in self.counts)

  @property
  def num_effective(self) -> float:
    """e^entropy of the choices: N if all N modules are used alike."""
    total = sum(self.counts)
    parts = [count / total for count in self.counts if count]
    return math.exp(-sum(part * math.log(part) for part in parts))


@dataclasses.dataclass(frozen=True)
class Usage:
  """Usage of all layers of modules of a model on a task.

  Attributes:
    layers: place of a layer, such as 'decoder/layers_0/mlp' -> its usage.
    task: name of the task.
    model: what says which weights they were: folder, step, digest.
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
  """Counts choices; sums are exact.

  Args:
    model: with layers of modules; its batches carry its memory on, if it has
      one, so they must continue each other then.
    params: all its parameters.
    batches: batches of a task, as they are for training; padding is not
      counted.
    progress: called with the number of rows done so far.
  """
  totals: dict[str, list[Any]] = {}
  memory, num_rows = {}, 0
  for batch in batches:
    rows = len(batch['decoder_target_tokens'])
    if model.config.memory_length and not memory:
      memory = model.config.initial_memory(rows)
    stats, memory = _stats(model, params, memory, dict(batch))
    for path, one in jax.device_get(stats).items():
      # Of one batch the sums of float32 are whole numbers below 2^24.
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
  """Stats of every router by the place of its layer, and the next memory."""
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
  """The usage as a tree of JSON values."""
  return {
    'format': _FORMAT,
    'task': usage.task,
    'model': dict(usage.model),
    'layers': {
      place: dataclasses.asdict(layer) for place, layer in usage.layers.items()
    },
  }


def read(file: pathlib.Path) -> Usage:
  """What a file holds that was written of `to_json`.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is something else.
  """
  if not file.is_file():
    raise FileNotFoundError(
      f'The usage of modules must be a file, but {file} is none. Measure it '
      'with `mowe modules usage`, which writes usage.json.'
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
      f'{file} must be what `mowe modules usage` wrote, but reading it failed: '
      f'{type(error).__name__}: {error}. Give its usage.json.'
    ) from error
