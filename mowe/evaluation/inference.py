"""Generates outputs for many inputs of any lengths, with few compilations."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from mowe.models import decoding
from mowe.words import base_vocabulary

_logger = logging.getLogger(__name__)

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Generations:
  """What was generated, in the order of the inputs.

  Attributes:
    tokens: for each input the generated tokens <int32>[length]. They end with
      EOS unless the maximum length was reached.
    scores: <float32>[inputs], as the strategy defines them.
    num_trimmed: number of inputs that were too long and lost their end.
    num_unfinished: number of outputs that reached the maximum length without
      EOS.
  """

  tokens: list[np.ndarray]
  scores: np.ndarray
  num_trimmed: int
  num_unfinished: int


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
  """Generates outputs for any number of inputs, in batches of few shapes.

  Inputs are sorted by length, and each batch is padded to the next of the
  `input_lengths`. So at most one program is compiled for each of these lengths.
  Generators with equal models and settings share their programs: a new
  Generator for each checkpoint compiles nothing.

  Attributes:
    model: a Linen module that was built from a `model_config.ModelConfig`.
    params: all parameters of the model, expert tables included
      (`models.parameters.merge_tables`).
    strategy: how tokens are chosen.
    batch_size: number of rows of a batch; the last batch is filled up.
    max_target_length: maximum number of tokens of an output, EOS included.
    input_lengths: lengths to which batches are padded, in rising order. Longer
      inputs are trimmed but keep their EOS, and are counted.
    seed: the seed of strategies that sample. The same inputs give the same
      outputs.

  Call: token ids of the inputs, each with its EOS, to Generations. `progress`
    is called with the number of inputs done so far.

  Raises:
    ValueError: a size is below 1, the lengths do not rise, or an input is
      empty.
  """

  model: nn.Module
  params: Any
  strategy: decoding.Strategy = decoding.Greedy()
  batch_size: int = 64
  max_target_length: int = 64
  input_lengths: tuple[int, ...] = (32, 64, 128, 256, 512)
  seed: int = 0

  def __post_init__(self):
    lengths = tuple(self.input_lengths)
    object.__setattr__(self, 'input_lengths', lengths)
    rises = bool(lengths) and lengths == tuple(sorted(set(lengths)))
    if min(self.batch_size, self.max_target_length) < 1 or not (
      rises and lengths[0] > 1
    ):
      raise ValueError(
        'A Generator needs batch_size and max_target_length of at least 1 and '
        f'rising input_lengths from 2, but they are {self.batch_size}, '
        f'{self.max_target_length} and {lengths}. Change what is out of range.'
      )

  def __call__(
    self,
    inputs: Sequence[Sequence[int] | np.ndarray],
    progress: Progress | None = None,
  ) -> Generations:
    rows = [self._trim(tokens) for tokens in inputs]
    num_trimmed = sum(
      len(row) < len(tokens) for row, tokens in zip(rows, inputs, strict=True)
    )
    if num_trimmed:
      _logger.warning(
        '%d of %d inputs are longer than %d tokens and were trimmed.',
        num_trimmed,
        len(rows),
        self.input_lengths[-1],
      )
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(rows)
    scores = np.zeros(len(rows), np.float32)
    done = 0
    key = jax.random.key(self.seed)
    for number, (indices, tokens) in enumerate(self._batches(rows)):
      generated, batch_scores = self._generate(
        tokens, jax.random.fold_in(key, number)
      )
      for place, index in enumerate(indices.tolist()):
        outputs[index] = _until_eos(generated[place])
        scores[index] = batch_scores[place]
      done += len(indices)
      if progress is not None:
        progress(done)
    return Generations(
      tokens=outputs,
      scores=scores,
      num_trimmed=num_trimmed,
      num_unfinished=sum(
        bool(row[-1] != base_vocabulary.EOS_ID) for row in outputs
      ),
    )

  def _trim(self, tokens) -> np.ndarray:
    tokens = np.asarray(tokens, np.int32)
    if not len(tokens):
      raise ValueError(
        'Every input must have at least one token, but one has none. Append '
        'EOS to each input.'
      )
    longest = self.input_lengths[-1]
    if len(tokens) <= longest:
      return tokens
    return np.append(tokens[: longest - 1], tokens[-1])

  def _batches(
    self, rows: list[np.ndarray]
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the input indices of a batch, and its tokens [batch, length]."""
    lengths = np.array([len(row) for row in rows], np.int64)
    # The longest come first, so that a lack of memory shows in the first batch.
    order = np.argsort(-lengths, kind='stable')
    for start in range(0, len(rows), self.batch_size):
      indices = order[start : start + self.batch_size]
      bucket = np.searchsorted(self.input_lengths, lengths[indices[0]])
      shape = (self.batch_size, self.input_lengths[bucket])
      tokens = np.zeros(shape, np.int32)
      for place, index in enumerate(indices.tolist()):
        tokens[place, : len(rows[index])] = rows[index]
      # Rows that are left over repeat the last input. Empty rows might never
      # generate EOS, and the batch would run to the maximum length.
      tokens[len(indices) :] = tokens[len(indices) - 1]
      yield indices, tokens

  def _generate(
    self, tokens: np.ndarray, key: jax.Array
  ) -> tuple[np.ndarray, np.ndarray]:
    generated = decoding.generate(
      self.model,
      {'params': self.params},
      tokens,
      self.max_target_length,
      self.strategy,
      key=key,
    )
    return jax.device_get(generated)


def generate_texts(
  generator: Generator,
  texts: Sequence[str],
  subwords: base_vocabulary.Vocabulary,
  progress: Progress | None = None,
) -> list[str]:
  """Generates one output text for each input text.

  Args:
    generator: generates the tokens of the outputs.
    texts: the inputs, as the model reads them: prompts are already in them.
    subwords: the vocabulary of the model.
    progress: called with the number of inputs done so far.
  """
  inputs = [
    [*ids, subwords.eos_id] for ids in subwords.encode_batch(list(texts))
  ]
  return [subwords.decode(row) for row in generator(inputs, progress).tokens]


def _until_eos(row: np.ndarray) -> np.ndarray:
  """The tokens up to the first EOS, which is kept."""
  ends = np.flatnonzero(row == base_vocabulary.EOS_ID)
  return row[: ends[0] + 1] if len(ends) else row
