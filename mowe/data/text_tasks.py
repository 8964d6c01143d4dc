"""Tasks over a token cache make inputs and targets of an example's number.

`Task` is what all of them have in common, and all that
`batch_source.Batches` needs.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from mowe.data.caches import token_cache, verified_array
from mowe.data.text import span_corruption

_logger = logging.getLogger(__name__)


class Task(Protocol):
  """What batches need of a task.

  Attributes:
    name: name of the task in logs.
    num_examples: number of examples in one epoch.
  """

  name: str
  num_examples: int

  def length_bounds(self) -> np.ndarray:
    """Returns the most tokens of the inputs and targets of each example.

    <int64>[num_examples, 2], EOS included.
    """
    ...

  def example(
    self, index: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs <int32>[n] and the targets <int32>[m] of an example.

    Both end with EOS. All random choices are drawn from `rng`.
    """
    ...

  def report(self) -> dict[str, int]:
    """Returns counts of what was read, and of what was trimmed or left out."""
    ...


@dataclasses.dataclass(frozen=True)
class SpanCorruptionTask:
  """T5's pretraining task: random spans of chunks of the text are masked.

  The texts of the cache, with an EOS after each, follow each other and are cut
  into chunks whose corruption exactly fills the feature lengths. The last chunk
  is shorter.

  Attributes:
    cache: a cache of kind 'text'.
    feature_lengths: number of tokens of 'inputs' and 'targets', EOS included.
    noise_density: fraction of the tokens that is masked.
    mean_span_length: mean number of tokens of a masked span.
    name: name of the task in logs.

  Raises:
    ValueError: the feature lengths leave no room, the vocabulary has too few
      sentinels, or there is no text.
  """

  cache: token_cache.TokenCache
  feature_lengths: Mapping[str, int]
  noise_density: float = span_corruption.NOISE_DENSITY
  mean_span_length: float = span_corruption.MEAN_SPAN_LENGTH
  name: str = 'span_corruption'

  def __post_init__(self):
    if not 0 < self.noise_density < 1 or self.mean_span_length < 1:
      raise ValueError(
        'noise_density must be between 0 and 1 and mean_span_length at least '
        f'1, but they are {self.noise_density} and {self.mean_span_length}. '
        "T5's are 0.15 and 3."
      )
    _check_text(self.cache)
    if len(self._stream) < 2:
      raise ValueError(
        'Span corruption needs at least 2 tokens of text, but '
        f'{self.cache.path} has {len(self._stream)}. Cache more text.'
      )
    _check_sentinels(self.cache, self._lengths_of(self.chunk_length).num_spans)
    _log_report(self)

  @functools.cached_property
  def chunk_length(self) -> int:
    """Number of tokens of a full chunk."""
    inputs, targets = _check_feature_lengths(self.feature_lengths)
    return span_corruption.tokens_that_fill(
      inputs, targets, self.noise_density, self.mean_span_length
    )

  @functools.cached_property
  def num_examples(self) -> int:
    full, rest = divmod(len(self._stream), self.chunk_length)
    # A chunk of one token cannot be corrupted, so that the last token of the
    # text may remain unused.
    return full + (rest >= 2)

  @functools.cached_property
  def _stream(self) -> verified_array.VerifiedArray:
    return self.cache.stream('targets')

  def length_bounds(self) -> np.ndarray:
    full = self._lengths_of(min(self.chunk_length, len(self._stream)))
    rest = len(self._stream) - (self.num_examples - 1) * self.chunk_length
    last = self._lengths_of(min(rest, self.chunk_length))
    bounds = np.empty((self.num_examples, 2), np.int64)
    bounds[:] = full.inputs, full.targets
    bounds[-1] = last.inputs, last.targets
    return bounds

  def example(
    self, index: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    start = index * self.chunk_length
    tokens = self._stream[start : start + self.chunk_length]
    spans = span_corruption.random_spans(
      len(tokens), rng, self.noise_density, self.mean_span_length
    )
    return _mask(self.cache, tokens, spans)

  def report(self) -> dict[str, int]:
    used = min(len(self._stream), self.num_examples * self.chunk_length)
    return {
      'examples': self.num_examples,
      'tokens': len(self._stream),
      'tokens_left_out': len(self._stream) - used,
    }

  def _lengths_of(self, length: int) -> span_corruption.CorruptedLengths:
    return span_corruption.lengths_after_corruption(
      length, self.noise_density, self.mean_span_length
    )


@dataclasses.dataclass(frozen=True)
class SalientSpanTask:
  """Salient span masking of one text, or of a window of it, per example.

  Spans are drawn anew each time, at random until the noise budget is reached,
  and at least one. A text that is longer than the inputs is read through a
  window around one of its spans, which is drawn anew each time as well. Texts
  without a span that can be masked are left out and counted.

  Attributes:
    cache: a cache of kind 'text' with the feature 'spans'.
    feature_lengths: number of tokens of 'inputs' and 'targets', EOS included.
    noise_density: fraction of the tokens that spans after the first one must
      not exceed.
    name: name of the task in logs.

  Raises:
    ValueError: the feature lengths leave no room, there are no spans, or no
      text is left.
  """

  cache: token_cache.TokenCache
  feature_lengths: Mapping[str, int]
  noise_density: float = span_corruption.NOISE_DENSITY
  name: str = 'salient_spans'

  def __post_init__(self):
    if not 0 < self.noise_density <= 1:
      raise ValueError(
        f'noise_density must be in (0, 1], but is {self.noise_density}. The '
        'usual one is 0.15.'
      )
    _check_text(self.cache)
    _check_sentinels(self.cache, 1)
    if not self.num_examples:
      raise ValueError(
        'At least one text must have a span that fits the targets, but none '
        f'of the {self.cache.num_examples} texts in {self.cache.path} has '
        f'one ({self.report()}). Give longer targets, or texts with spans.'
      )
    _log_report(self)

  @property
  def num_examples(self) -> int:
    return len(self._kept)

  @functools.cached_property
  def _longest_span(self) -> int:
    return span_corruption.longest_salient_span(
      *_check_feature_lengths(self.feature_lengths)
    )

  @functools.cached_property
  def _span_sizes(self) -> np.ndarray:
    """Number of tokens of every span of the cache, <int64>[spans]."""
    spans = self.cache.flat('spans').reshape(-1, 2)
    return (spans[:, 1] - spans[:, 0]).astype(np.int64)

  @functools.cached_property
  def _kept(self) -> np.ndarray:
    """Texts with a span that can be masked, <int64>[num_examples]."""
    good = np.cumsum(self._span_sizes <= self._longest_span)
    good = np.concatenate([[0], good])
    bounds = self.cache.offsets('spans') // 2
    return np.flatnonzero(good[bounds[1:]] > good[bounds[:-1]])

  def length_bounds(self) -> np.ndarray:
    targets_length = self.feature_lengths['targets']
    # The EOS is not counted, because it is not part of the text to be masked.
    lengths = self.cache.lengths('targets')[self._kept] - 1
    lengths = np.minimum(lengths, self.feature_lengths['inputs'] - 1)
    budget = span_corruption.salient_budget(lengths, self.noise_density)
    longest, total, most = self._span_limits(budget)
    # The targets are one long span, or several spans within the budget, each
    # with its sentinel; EOS comes last.
    targets = np.maximum(longest + 1, np.minimum(budget, total) + most) + 1
    return np.stack([lengths + 1, np.minimum(targets, targets_length)], axis=1)

  def _span_limits(
    self, budget: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns limits of the spans that can be masked in each example.

    Args:
      budget: <int64>[num_examples], masked tokens not to be exceeded.

    Returns:
      The tokens of the longest span, the tokens of all spans together, and the
      most spans that fit the budget, each <int64>[num_examples].
    """
    offsets = self.cache.offsets('spans') // 2
    examples = np.repeat(
      np.arange(self.num_examples), np.diff(offsets)[self._kept]
    )
    is_kept = np.zeros(self.cache.num_examples, bool)
    is_kept[self._kept] = True
    sizes = self._span_sizes[np.repeat(is_kept, np.diff(offsets))]
    good = sizes <= self._longest_span
    sizes, examples = sizes[good], examples[good]
    order = np.lexsort((sizes, examples))  # The smallest first.
    sizes = sizes[order]
    starts = np.searchsorted(examples, np.arange(self.num_examples))
    # [spans]: the tokens of each span and the smaller ones of its example.
    sums = np.cumsum(sizes)
    sums -= np.repeat(
      sums[starts] - sizes[starts], np.diff(starts, append=len(sizes))
    )
    total = np.add.reduceat(sizes, starts)
    most = np.add.reduceat((sums <= budget[examples]).astype(int), starts)
    return np.maximum.reduceat(sizes, starts), total, most

  def example(
    self, index: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    text = int(self._kept[index])
    tokens, spans = span_corruption.draw_salient(
      self.cache.tokens('targets', text)[:-1],
      self.cache.spans(text),
      rng,
      inputs_length=self.feature_lengths['inputs'],
      targets_length=self.feature_lengths['targets'],
      max_spans=len(self.cache.sentinels),
      noise_density=self.noise_density,
    )
    return _mask(self.cache, tokens, spans)

  def report(self) -> dict[str, int]:
    lengths = self.cache.lengths('targets')[self._kept]
    windowed = lengths > self.feature_lengths['inputs']
    return {
      'examples': self.num_examples,
      'texts_without_span': self.cache.num_examples - self.num_examples,
      'texts_in_windows': int(windowed.sum()),
      'spans': len(self._span_sizes),
      'spans_too_long': int((self._span_sizes > self._longest_span).sum()),
    }


@dataclasses.dataclass(frozen=True)
class TextToTextTask:
  """Inputs and targets as they were cached, such as questions and answers.

  Examples that are longer than the feature lengths are trimmed at the end, keep
  their EOS, and are counted.

  Attributes:
    cache: a cache with the features 'inputs' and 'targets'.
    feature_lengths: number of tokens of 'inputs' and 'targets', EOS included.
    name: name of the task in logs.

  Raises:
    ValueError: the cache lacks a feature, an example has no target, or a
      feature length leaves no room for a token before EOS.
  """

  cache: token_cache.TokenCache
  feature_lengths: Mapping[str, int]
  name: str = 'text_to_text'

  def __post_init__(self):
    _check_feature_lengths(self.feature_lengths, least=2)
    empty = np.flatnonzero(self._lengths[:, 1] < 2)
    if len(empty):
      raise ValueError(
        f'Every example must have a target, but {len(empty)} of '
        f'{self.num_examples} in {self.cache.path} have only EOS (the first '
        f'is number {empty[0]}). Leave them out and build the cache again.'
      )
    _log_report(self)

  @property
  def num_examples(self) -> int:
    return self.cache.num_examples

  @functools.cached_property
  def _lengths(self) -> np.ndarray:
    """Tokens of inputs and targets with EOS, <int64>[num_examples, 2]."""
    names = ('inputs', 'targets')
    return np.stack([self.cache.lengths(name) for name in names], axis=1)

  def length_bounds(self) -> np.ndarray:
    limits = self.feature_lengths['inputs'], self.feature_lengths['targets']
    return np.minimum(self._lengths, limits)

  def example(
    self, index: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    del rng  # Nothing here is random.
    return self._trimmed('inputs', index), self._trimmed('targets', index)

  def report(self) -> dict[str, int]:
    limits = self.feature_lengths['inputs'], self.feature_lengths['targets']
    inputs, targets = (self._lengths > limits).sum(axis=0).tolist()
    return {
      'examples': self.num_examples,
      'inputs_trimmed': inputs,
      'targets_trimmed': targets,
    }

  def _trimmed(self, feature: str, index: int) -> np.ndarray:
    tokens = self.cache.tokens(feature, index)
    limit = self.feature_lengths[feature]
    if len(tokens) > limit:
      tokens = np.append(tokens[: limit - 1], tokens[-1])
    return tokens


def _mask(
  cache: token_cache.TokenCache, tokens: np.ndarray, spans: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  inputs, targets = span_corruption.mask_spans(tokens, spans, cache.sentinels)
  eos = np.int32(cache.vocabulary['eos_id'])
  return np.append(inputs, eos), np.append(targets, eos)


def _check_feature_lengths(
  feature_lengths: Mapping[str, int], least: int = 3
) -> tuple[int, int]:
  found = tuple(feature_lengths.get(name, 0) for name in ('inputs', 'targets'))
  if min(found) < least:
    raise ValueError(
      f"feature_lengths must give 'inputs' and 'targets' at least {least} "
      f'tokens each, but is {dict(feature_lengths)}. Make them longer.'
    )
  return found


def _check_text(cache: token_cache.TokenCache) -> None:
  # Masking the answers of a cache of questions would work, but teach nonsense.
  if cache.kind != 'text':
    raise ValueError(
      f"Masking needs a cache of kind 'text', but {cache.path} is of kind "
      f'{cache.kind!r}. Use TextToTextTask for it, or cache the text.'
    )


def _check_sentinels(cache: token_cache.TokenCache, num_spans: int) -> None:
  there = len(cache.sentinels)
  if num_spans > there:
    raise ValueError(
      f'A chunk needs {num_spans} sentinels, but the vocabulary of '
      f'{cache.path} has only {there}. Use shorter feature '
      'lengths, longer spans, or a vocabulary with more extra_ids.'
    )


def _log_report(task: Task) -> None:
  counts = ', '.join(f'{name} {count}' for name, count in task.report().items())
  _logger.info('Task %s: %s', task.name, counts)
