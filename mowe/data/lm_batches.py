"""Batches of a model with one stack: inputs and targets in one row."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mowe.data import batch_source, lm_tasks


def make_batch(
  rows: Sequence[Sequence[batch_source.Example]],
  feature_lengths: Mapping[str, int],
  segments: bool = False,
) -> batch_source.Batch:
  """Pads rows of examples into one batch; see `batches.make_batch`.

  The targets of an example stand after its inputs, if it has some. A row is as
  long as the lengths of both together. Loss weights are those of targets;
  'decoder_causal_attention' marks where inputs go in, if there may be any.
  """
  num_inputs = feature_lengths.get('inputs', 0)
  length = num_inputs + feature_lengths['targets']
  joined = [[np.concatenate(example) for example in row] for row in rows]
  tokens, segment_ids, positions = np.zeros((3, len(rows), length), np.int32)
  is_input, is_target = np.zeros((2, len(rows), length), bool)
  for row, sequences in enumerate(joined):
    start = 0
    for segment, sequence in enumerate(sequences, start=1):
      end = start + len(sequence)
      inputs = len(rows[row][segment - 1][0])
      tokens[row, start:end] = sequence
      segment_ids[row, start:end] = segment
      positions[row, start:end] = np.arange(len(sequence))
      is_target[row, start + inputs : end] = True
      if inputs:
        # One place more: its input is the last of the inputs.
        is_input[row, start : start + inputs + 1] = True
      start = end
  shifted = np.zeros_like(tokens)
  shifted[:, 1:] = tokens[:, :-1]
  # Each segment begins with 0 instead of the end of the one before.
  shifted[:, 1:][segment_ids[:, 1:] != segment_ids[:, :-1]] = 0
  batch = {
    'decoder_input_tokens': shifted,
    'decoder_target_tokens': tokens,
    'decoder_loss_weights': is_target.astype(np.float32),
  }
  if num_inputs:
    batch['decoder_causal_attention'] = is_input.astype(np.int32)
  if segments:
    batch |= {
      'decoder_segment_ids': segment_ids,
      'decoder_positions': positions,
    }
  return batch


class ContiguousBatches:
  """Running text in its order, for models with a memory of earlier batches.

  The text is cut into as many parts as a batch has rows. Row r of batch b + 1
  continues row r of batch b; the token before a row is its first input. When
  the parts have ended, all rows begin anew, and 'decoder_begins_part'
  <bool>[batch] is True: the memory of the batch before is of another text.

  Args:
    task: the text.
    batch_size: rows of a batch.

  Call: step from 0, to the batch of docs/architecture.md.

  Raises:
    ValueError: the text does not fill one batch.
  """

  def __init__(self, task: lm_tasks.LanguageModelTask, batch_size: int):
    self.task = task
    self.batch_size = batch_size
    self._length = task.row_length
    # A last row that is not full is for evaluation only.
    self.steps_per_epoch = len(task.stream) // self._length // batch_size
    if not self.steps_per_epoch:
      raise ValueError(
        'The text must fill at least one batch, but has '
        f'{len(task.stream)} tokens for {batch_size} rows of {self._length}. '
        'Give more text, or smaller batches.'
      )

  def __call__(self, step: int) -> batch_source.Batch:
    place = step % self.steps_per_epoch
    rows = np.arange(self.batch_size) * self.steps_per_epoch + place
    batch = rows_of_stream(self.task.stream, rows * self._length, self._length)
    batch['decoder_begins_part'] = np.full(self.batch_size, place == 0)
    return batch

  def from_step(self, first_step: int = 0) -> Iterator[batch_source.Batch]:
    """The batches from `first_step` on, without end."""
    while True:
      yield self(first_step)
      first_step += 1

  def report(self) -> dict[str, dict[str, int]]:
    """Rows of the task, and tokens that do not fill a batch."""
    used = self.steps_per_epoch * self.batch_size * self._length
    return {
      self.task.name: {
        **self.task.report(),
        'tokens_left_out': len(self.task.stream) - used,
      }
    }


def rows_of_stream(
  stream: np.ndarray, starts: np.ndarray, length: int
) -> batch_source.Batch:
  """Rows of running text, each after the token before it.

  Args:
    stream: <int>[total].
    starts: <int>[rows]; beyond the end of the stream is padding.
    length: tokens of a row.
  """
  places = np.asarray(starts)[:, None] + np.arange(length)
  is_real = places < len(stream)
  last = len(stream) - 1
  read = lambda at: stream[np.clip(at, 0, last)].astype(np.int32)
  targets = np.where(is_real, read(places), 0)
  inputs = np.where(is_real & (places > 0), read(places - 1), 0)
  return {
    'decoder_input_tokens': inputs,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': is_real.astype(np.float32),
  }


def segments(
  stream: np.ndarray, batch_size: int, length: int
) -> Iterator[batch_source.Batch]:
  """Every token once, in order: rows that continue each other.

  As ContiguousBatches, with nothing left out: the last rows are padded.
  """
  num_rows = math.ceil(len(stream) / length)
  steps = math.ceil(num_rows / batch_size)
  for step in range(steps):
    rows = np.arange(batch_size) * steps + step
    yield rows_of_stream(stream, rows * length, length)


def sliding_windows(
  stream: np.ndarray, batch_size: int, length: int, stride: int
) -> Iterator[batch_source.Batch]:
  """Every token once, each but the first ones after enough others.

  A window is a row of its own and begins with id 0. It moves by `stride`
  tokens, and only those count that are new, so that each has at least
  `length - stride` tokens before it in its window.

  Args:
    stream: <int>[total].
    batch_size: windows of a batch; the last one is filled with padding.
    length: tokens of a window.
    stride: from 1 to `length`; `length` for windows side by side.

  Raises:
    ValueError: the stride is out of its range.
  """
  if not 1 <= stride <= length:
    raise ValueError(
      f'stride must be from 1 to the length of a window, {length}, but is '
      f'{stride}. The length itself gives windows side by side.'
    )
  num_windows = 1 + max(0, math.ceil((len(stream) - length) / stride))
  for first in range(0, num_windows, batch_size):
    numbers = np.arange(first, first + batch_size)
    starts = np.where(numbers < num_windows, numbers * stride, len(stream))
    batch = rows_of_stream(stream, starts, length)
    batch['decoder_input_tokens'][:, 0] = 0
    # What the window before has counted.
    seen = np.where(numbers > 0, length - stride, 0)
    batch['decoder_loss_weights'] *= np.arange(length) >= seen[:, None]
    yield batch
