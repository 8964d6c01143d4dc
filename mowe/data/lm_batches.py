"""Makes batches for models with one stack: inputs and targets in one row."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mowe.data import batch_source, lm_tasks
from mowe.data.caches import verified_array


def make_batch(
  rows: Sequence[Sequence[batch_source.Example]],
  feature_lengths: Mapping[str, int],
  segments: bool = False,
) -> batch_source.Batch:
  """Pads rows of examples into one batch.

  The targets of an example stand after its inputs, if it has some.

  Args:
    rows: the examples of each row; [] is a row of padding.
    feature_lengths: number of tokens of 'inputs', which may be missing, and
      'targets'. A row is as long as both together.
    segments: adds segment ids, which count from 1, and positions.

  Returns:
    The fields of a batch, [batch, length]. Loss weights are 1 for targets
    alone. If there may be inputs, 'decoder_causal_attention' is 1 where the
    model reads one.
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
        # One place more than there are inputs. At the place of the first
        # target, the model reads the last of the inputs: tokens are shifted.
        is_input[row, start : start + inputs + 1] = True
      start = end
  shifted = np.zeros_like(tokens)
  shifted[:, 1:] = tokens[:, :-1]
  # Each segment begins with 0 instead of the last token of the one before.
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


class ContiguousBatches(batch_source.RandomAccessSource):
  """Running text in its order, for models with a memory of earlier batches.

  The text is cut into as many parts as a batch has rows. Row r of batch b + 1
  continues row r of batch b, and the first input of a row is the token before
  it. When the parts have ended, all rows begin anew. In such a batch
  'decoder_begins_part' <bool>[batch] is True: a model must not use its memory,
  which is of another text.

  Args:
    task: the task whose text is read.
    batch_size: number of rows of a batch.

  Call: takes a step from 0 on, returns its batch (see docs/architecture/data.md
    for the fields).

  Raises:
    ValueError: the text does not fill one batch.
  """

  def __init__(self, task: lm_tasks.LanguageModelTask, batch_size: int):
    self.task = task
    self.batch_size = batch_size
    self._length = task.row_length
    # Each of the `batch_size` parts has this many whole rows. What does not fill
    # a row is left to evaluation.
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

  def epochs(self, num_steps: int) -> dict[str, float]:
    """See `BatchSource.epochs`."""
    return {self.task.name: num_steps / self.steps_per_epoch}

  def report(self) -> dict[str, dict[str, int]]:
    """Returns counts of the task, and of tokens that do not fill a batch."""
    used = self.steps_per_epoch * self.batch_size * self._length
    return {
      self.task.name: {
        **self.task.report(),
        'tokens_left_out': len(self.task.stream) - used,
      }
    }


def rows_of_stream(
  stream: np.ndarray | verified_array.VerifiedArray,
  starts: np.ndarray,
  length: int,
) -> batch_source.Batch:
  """Makes a batch of rows of running text.

  The first input of a row is the token before the row, 0 at the beginning of
  the stream.

  Args:
    stream: <int>[total], all tokens of the text.
    starts: <int>[rows], the place in the stream where each row begins. What
      lies beyond the end of the stream is padding.
    length: number of tokens of a row.
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
  stream: np.ndarray | verified_array.VerifiedArray,
  batch_size: int,
  length: int,
) -> Iterator[batch_source.Batch]:
  """Yields batches with every token once, in rows that continue each other.

  They are those of ContiguousBatches, but nothing is left out: the last rows
  are padded.

  Args:
    stream: <int>[total], all tokens of the text.
    batch_size: number of rows of a batch.
    length: number of tokens of a row.
  """
  num_rows = math.ceil(len(stream) / length)
  steps = math.ceil(num_rows / batch_size)
  for step in range(steps):
    rows = np.arange(batch_size) * steps + step
    yield rows_of_stream(stream, rows * length, length)


def sliding_windows(
  stream: np.ndarray | verified_array.VerifiedArray,
  batch_size: int,
  length: int,
  stride: int,
) -> Iterator[batch_source.Batch]:
  """Yields batches in which every token counts once, after enough others.

  A row is a window over the text, and its first input is the id 0. The window
  moves by `stride` tokens, and only its new tokens have a loss weight, so that
  each of them (but for those of the first window) has at least
  `length - stride` tokens before it in its window.

  Args:
    stream: <int>[total], all tokens of the text.
    batch_size: number of windows of a batch; the last batch is filled with
      padding.
    length: number of tokens of a window.
    stride: by how many tokens the window moves, from 1 to `length`. `length`
      gives windows side by side.

  Raises:
    ValueError: the stride is out of range.
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
    # The first tokens of a window were counted in the window before.
    seen = np.where(numbers > 0, length - stride, 0)
    batch['decoder_loss_weights'] *= np.arange(length) >= seen[:, None]
    yield batch
