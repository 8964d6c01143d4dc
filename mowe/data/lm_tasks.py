"""Tasks of language models over a token cache, whose texts are the targets.

They are tasks in the sense of `text_tasks.Task`, and have no inputs.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping

import numpy as np

from mowe.data.caches import lm_cache, token_cache, verified_array

_logger = logging.getLogger(__name__)

_KINDS = ('text', lm_cache.KIND)
_NO_INPUTS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class LanguageModelTask:
  """Running text: all texts, one after another, cut into rows.

  Attributes:
    cache: a cache of kind 'text' or 'language_model'.
    feature_lengths: number of tokens of 'targets' in a row.
    name: name of the task in logs.

  Raises:
    ValueError: the cache is of another kind, or no length is given.
  """

  cache: token_cache.TokenCache
  feature_lengths: Mapping[str, int]
  name: str = 'language_model'

  def __post_init__(self):
    _check(self.cache, self.feature_lengths)
    _logger.info('Task %s: %s', self.name, self.report())

  @functools.cached_property
  def stream(self) -> verified_array.VerifiedArray:
    """All tokens of the text, <uint16 or int32>[total]."""
    return self.cache.stream('targets')

  @property
  def row_length(self) -> int:
    return self.feature_lengths['targets']

  @property
  def num_examples(self) -> int:
    return -(-len(self.stream) // self.row_length)

  def length_bounds(self) -> np.ndarray:
    bounds = np.zeros((self.num_examples, 2), np.int64)
    bounds[:, 1] = self.row_length
    bounds[-1, 1] = len(self.stream) - (self.num_examples - 1) * self.row_length
    return bounds

  def example(
    self, index: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    del rng  # Nothing here is random.
    start = index * self.row_length
    tokens = self.stream[start : start + self.row_length]
    return _NO_INPUTS, tokens.astype(np.int32)

  def report(self) -> dict[str, int]:
    return {'examples': self.num_examples, 'tokens': len(self.stream)}


@dataclasses.dataclass(frozen=True)
class ContiguousText(LanguageModelTask):
  """Running text in its order, for models with a memory.

  Each row of a batch continues the same row of the batch before (see
  `lm_batches.ContiguousBatches`).
  """


@dataclasses.dataclass(frozen=True)
class SeparateTexts:
  """One text, or one piece of a long text, in each example; to be packed.

  A token sees nothing of other texts, nor of earlier pieces of its text.

  Attributes:
    cache: a cache of kind 'text' or 'language_model', with an EOS after each
      text.
    feature_lengths: the most tokens of 'targets' in an example; a longer text
      is cut into pieces.
    name: name of the task in logs.

  Raises:
    ValueError: the cache is of another kind, or no length is given.
  """

  cache: token_cache.TokenCache
  feature_lengths: Mapping[str, int]
  name: str = 'separate_texts'

  def __post_init__(self):
    _check(self.cache, self.feature_lengths)
    _logger.info('Task %s: %s', self.name, self.report())

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    """Where each example begins in the stream, and where the last one ends.

    <int64>[num_examples + 1].
    """
    offsets, most = (
      self.cache.offsets('targets'),
      self.feature_lengths['targets'],
    )
    lengths = np.diff(offsets)
    pieces = -(-lengths // most)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    number = np.arange(len(first)) - first
    starts = np.repeat(offsets[:-1], pieces) + number * most
    return np.append(starts, offsets[-1])

  @property
  def num_examples(self) -> int:
    return len(self._starts) - 1

  def length_bounds(self) -> np.ndarray:
    bounds = np.zeros((self.num_examples, 2), np.int64)
    bounds[:, 1] = np.diff(self._starts)
    return bounds

  def example(
    self, index: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    del rng  # Nothing here is random.
    start, end = self._starts[index : index + 2]
    tokens = self.cache.stream('targets')[start:end]
    return _NO_INPUTS, tokens.astype(np.int32)

  def report(self) -> dict[str, int]:
    return {
      'examples': self.num_examples,
      'texts': self.cache.num_examples,
      'tokens': len(self.cache.stream('targets')),
    }


def _check(
  cache: token_cache.TokenCache, feature_lengths: Mapping[str, int]
) -> None:
  if cache.kind not in _KINDS:
    raise ValueError(
      f'Language modeling needs a cache of one of the kinds {_KINDS}, but '
      f'{cache.path} is of kind {cache.kind!r}. Build one with `mowe '
      'cache-task --kind language_model`.'
    )
  if feature_lengths.get('targets', 0) < 1:
    raise ValueError(
      "feature_lengths must give 'targets' at least 1 token, but is "
      f"{dict(feature_lengths)}. Write {{'targets': 256}}."
    )
