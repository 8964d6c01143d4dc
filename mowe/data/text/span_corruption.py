"""Span corruption and salient span masking: from tokens to inputs and targets.

The format is T5's. Each masked span becomes one sentinel in the inputs; the
targets hold every sentinel followed by the tokens it stands for. Sentinels fall
from the last id of the vocabulary: size - 1, size - 2, ... Neither sequence has
an EOS here: the task appends it.

Source: T5 (Raffel et al. 2020), section 3.1.4, and the arithmetic of its
random_spans_noise_mask and random_spans_helper. Guu et al. 2020 for salience.
"""

import dataclasses

import numpy as np

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0


@dataclasses.dataclass(frozen=True)
class CorruptedLengths:
  """Numbers of tokens after corruption, each with its EOS counted."""

  inputs: int
  targets: int
  num_spans: int


def count_noise(
  length: int,
  noise_density: float = NOISE_DENSITY,
  mean_span_length: float = MEAN_SPAN_LENGTH,
) -> tuple[int, int]:
  """Numbers of masked tokens and of spans in a text of `length` tokens.

  Raises:
    ValueError: fewer than two tokens: one must be masked and one must stay.
  """
  if length < 2:
    raise ValueError(
      'Span corruption needs at least 2 tokens, one to mask and one to keep, '
      f'but got {length}. Leave such texts out.'
    )
  num_noise = min(max(round(length * noise_density), 1), length - 1)
  num_spans = max(round(num_noise / mean_span_length), 1)
  # Each span has a masked token and an unmasked one before it. T5 does not ask
  # this, as its densities are low.
  return num_noise, min(num_spans, num_noise, length - num_noise)


def lengths_after_corruption(
  length: int,
  noise_density: float = NOISE_DENSITY,
  mean_span_length: float = MEAN_SPAN_LENGTH,
) -> CorruptedLengths:
  """Lengths of inputs and targets, EOS included, of `length` tokens."""
  num_noise, num_spans = count_noise(length, noise_density, mean_span_length)
  return CorruptedLengths(
    inputs=length - num_noise + num_spans + 1,
    targets=num_noise + num_spans + 1,
    num_spans=num_spans,
  )


def tokens_that_fill(
  inputs_length: int,
  targets_length: int | None = None,
  noise_density: float = NOISE_DENSITY,
  mean_span_length: float = MEAN_SPAN_LENGTH,
) -> int:
  """The largest number of tokens whose corruption fits the feature lengths.

  With targets_length None only the inputs are limited: 512 gives 568 tokens and
  114 targets, as T5's random_spans_helper does.

  Raises:
    ValueError: not even two tokens fit.
  """

  def fits(length):
    lengths = lengths_after_corruption(length, noise_density, mean_span_length)
    return lengths.inputs <= inputs_length and (
      targets_length is None or lengths.targets <= targets_length
    )

  if not fits(2):
    raise ValueError(
      'Span corruption needs feature lengths of at least 3 inputs and 3 '
      f'targets, but they are {inputs_length} and {targets_length}. '
      'Make them longer.'
    )
  # Both lengths never fall as the text grows, so bisection finds the last fit.
  low, high = 2, 4
  while fits(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


def random_spans(
  length: int,
  rng: np.random.Generator,
  noise_density: float = NOISE_DENSITY,
  mean_span_length: float = MEAN_SPAN_LENGTH,
) -> np.ndarray:
  """Draws T5's random spans: unmasked and masked segments alternate.

  Returns:
    <int64>[num_spans, 2] of [start, end), in order. The first token is never
    masked and the last one always is, as in T5.
  """
  num_noise, num_spans = count_noise(length, noise_density, mean_span_length)
  noise = _random_segments(num_noise, num_spans, rng)
  kept = _random_segments(length - num_noise, num_spans, rng)
  ends = np.cumsum(noise + kept)
  return np.stack([ends - noise, ends], axis=1)


def salient_budget(
  length: np.ndarray | int, noise_density: float
) -> np.ndarray | int:
  """Masked tokens that salient masking of `length` tokens aims at, from 1."""
  return np.maximum(np.rint(np.multiply(length, noise_density)), 1).astype(int)


def salient_spans(
  spans: np.ndarray,
  rng: np.random.Generator,
  *,
  budget: int,
  max_spans: int,
  max_targets: int,
) -> np.ndarray:
  """Chooses spans in random order while they stay within a noise budget.

  The first span drawn is always taken, however long, so that every example asks
  something.

  Args:
    spans: <int>[num_spans, 2], none empty, none overlapping.
    rng: of this example.
    budget: masked tokens not to be exceeded after the first span.
    max_spans: at most so many (the number of sentinels).
    max_targets: masked tokens plus sentinels not to be exceeded; spans that
      are too long on their own are never taken.

  Returns:
    <int>[chosen, 2] in order of the text; [0, 2] if no span fits.
  """
  chosen, masked = [], 0
  for index in rng.permutation(len(spans)):
    size = int(spans[index, 1] - spans[index, 0])
    if masked + size + len(chosen) + 1 > max_targets:
      continue
    if chosen and masked + size > budget:
      continue
    chosen.append(index)
    masked += size
    if masked >= budget or len(chosen) == max_spans:
      break
  return spans[np.sort(np.asarray(chosen, dtype=np.int64))]


def longest_salient_span(inputs_length: int, targets_length: int) -> int:
  """Tokens of the longest span that salient masking can ask for."""
  # Its sentinel and EOS share the targets with it.
  return min(targets_length - 2, inputs_length - 1)


def draw_salient(
  tokens: np.ndarray,
  spans: np.ndarray,
  rng: np.random.Generator,
  *,
  inputs_length: int,
  targets_length: int,
  max_spans: int,
  noise_density: float = NOISE_DENSITY,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws the text and the spans of one salient example.

  A text that is longer than the inputs is read through a window around one of
  its spans, drawn at random.

  Args:
    tokens: <int>[length], without EOS.
    spans: <int>[num_spans, 2], its salient spans.
    rng: of this example.
    inputs_length, targets_length: with EOS.
    max_spans: number of sentinels.
    noise_density: share of masked tokens not to be exceeded after one span.

  Returns:
    The tokens to use and the spans to mask, which are [0, 2] if none fits.
  """
  longest = longest_salient_span(inputs_length, targets_length)
  spans = spans[spans[:, 1] - spans[:, 0] <= longest]
  # k spans of m >= k tokens leave size - m + k + 1 <= size + 1 inputs.
  size = inputs_length - 1
  if len(tokens) > size and len(spans):
    start, end = spans[rng.integers(len(spans))].tolist()
    first, last = max(0, end - size), min(start, len(tokens) - size)
    begin = int(rng.integers(first, last + 1))
    inside = (spans[:, 0] >= begin) & (spans[:, 1] <= begin + size)
    tokens, spans = tokens[begin : begin + size], spans[inside] - begin
  chosen = salient_spans(
    spans,
    rng,
    budget=int(salient_budget(len(tokens), noise_density)),
    max_spans=max_spans,
    max_targets=targets_length - 1,
  )
  return tokens, chosen


def mask_spans(
  tokens: np.ndarray, spans: np.ndarray, first_sentinel: int
) -> tuple[np.ndarray, np.ndarray]:
  """Replaces spans by sentinels.

  Args:
    tokens: <int>[length].
    spans: <int>[num_spans, 2] of [start, end), in order, not overlapping.
    first_sentinel: id of the first sentinel; the next ones fall from it.

  Returns:
    inputs <int32>[...] and targets <int32>[...], neither with EOS.
  """
  inputs, targets, position = [], [tokens[:0]], 0  # There may be no span.
  for number, (start, end) in enumerate(np.asarray(spans).tolist()):
    sentinel = [first_sentinel - number]
    inputs += [tokens[position:start], sentinel]
    targets += [sentinel, tokens[start:end]]
    position = end
  inputs.append(tokens[position:])
  return _join(inputs), _join(targets)


def restore(
  inputs: np.ndarray, targets: np.ndarray, first_sentinel: int, num_spans: int
) -> np.ndarray:
  """The tokens that `mask_spans` was given; used to look at examples."""
  parts, position = [], 0
  marks = [first_sentinel - number for number in range(num_spans)]
  starts = [int(np.flatnonzero(targets == mark)[0]) for mark in marks]
  for mark, start, end in zip(
    marks, starts, starts[1:] + [len(targets)], strict=True
  ):
    place = int(np.flatnonzero(inputs == mark)[0])
    parts += [inputs[position:place], targets[start + 1 : end]]
    position = place + 1
  return _join(parts + [inputs[position:]])


def _random_segments(
  num_items: int, num_segments: int, rng: np.random.Generator
) -> np.ndarray:
  """Lengths of a uniformly random cut into segments that are not empty."""
  cuts = rng.choice(num_items - 1, num_segments - 1, replace=False) + 1
  return np.diff(np.sort(cuts), prepend=0, append=num_items)


def _join(parts: list) -> np.ndarray:
  return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
