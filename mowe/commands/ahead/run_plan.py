"""Says what a run will do with its data, its learning rates and the disk."""

import math
import os
import pathlib
import shutil
from collections.abc import Iterable

import jax
import numpy as np

from mowe.commands import train
from mowe.data import batch_source

_GIB = 2**30
# Parts of a run after which the learning rates are shown.
_PLACES = (0.0, 0.1, 0.5, 1.0)


def lines(training: train.Training, prepared: train.Prepared) -> Iterable[str]:
  """Yields what is known of a run before it starts, a line each.

  Args:
    training: all parts and settings of the run.
    prepared: what was made of them.
  """
  num_steps = training.total_steps
  epochs = ', '.join(
    f'{_few_digits(number)} epochs of {name}'
    for name, number in prepared.batches.epochs(num_steps).items()
  )
  yield (
    f'Steps      {num_steps:,} of {training.data.batch_size:,} rows'
    + (f': {epochs}' if epochs else '')
  )
  yield f'Padding    {_padding(prepared.batches.first_batch)} in the first batch'
  for name, rate in training.rates.items():
    yield f'Rate       {name}: {_over_time(rate, num_steps)}'
  yield f'Disk       {_disk(training, prepared)}'


def in_words(num_bytes: float) -> str:
  """A number of bytes in GiB, or in MiB if it is small."""
  unit = ('GiB', _GIB) if num_bytes >= 0.1 * _GIB else ('MiB', 2**20)
  return f'{num_bytes / unit[1]:,.1f} {unit[0]}'


def _few_digits(number: float) -> str:
  return f'{number:,.0f}' if number >= 100 else f'{number:.3g}'


def _padding(batch: batch_source.Batch) -> str:
  """The shares of padding, whose id is 0, among the tokens of each stream."""
  names = {
    'encoder_input_tokens': 'inputs',
    'decoder_target_tokens': 'targets',
  }
  return ', '.join(
    f'{np.mean(np.asarray(batch[key]) == 0):.0%} of {said}'
    for key, said in names.items()
    if key in batch
  )


def _over_time(rate, num_steps: int) -> str:
  if not callable(rate):
    return f'{rate:.3g} at all steps'
  steps = [round(part * num_steps) for part in _PLACES]
  return ', '.join(
    f'{float(rate(step)):.3g} at step {step:,}' for step in dict.fromkeys(steps)
  )


def _disk(training: train.Training, prepared: train.Prepared) -> str:
  """How much the checkpoints take in the end, and how much is free."""
  state = prepared.setup.abstract
  size = sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(state)
  )
  kept, at_once = _num_checkpoints(training)
  folder = nearest_folder(training.model_dir)
  free = shutil.disk_usage(folder).free
  said = (
    f'checkpoints: {kept:,} of up to {in_words(size)}; '
    f'{in_words(free)} are free'
  )
  there = len(list(pathlib.Path(training.model_dir).glob('checkpoint_*')))
  if max(0, at_once - there) * size > free:
    said += (
      '. That is too little: free some, set another MODEL_DIR, or keep fewer '
      '(SaveConfig.keep_last)'
    )
  return said


def _num_checkpoints(training: train.Training) -> tuple[int, int]:
  """How many are kept in the end, and how many there are for a moment.

  A new checkpoint is written before the oldest is removed.
  """
  save = training.save
  # The best checkpoint is one of those that were evaluated.
  period = training.eval_period if save.best_metric else save.period
  saved = math.ceil(training.total_steps / period) if period else 1
  if save.keep_last is None:
    return saved, saved
  kept = save.keep_last + bool(save.best_metric)
  return min(saved, kept), min(saved, kept + 1)


def nearest_folder(folder: str) -> pathlib.Path:
  """Returns a folder, or the nearest one above it that is there."""
  path = pathlib.Path(os.path.abspath(folder))
  return next(one for one in (path, *path.parents) if one.exists())
