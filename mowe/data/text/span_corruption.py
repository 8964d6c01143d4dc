"""Span corruption and salient span masking make inputs and targets of tokens.

The format is T5's. Each masked span becomes one sentinel in the inputs. The
targets hold every sentinel, followed by the tokens that it stands for. The ids
of sentinels are those of the vocabulary, in T5 its last ids.
The functions here append no EOS to either sequence; the tasks do.

Source: T5 (Raffel et al. 2020), section 3.1.4, and the arithmetic of its
random_spans_noise_mask and random_spans_helper. Salient spans are those of Guu
et al. 2020.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0


@dataclasses.dataclass(frozen=True)
class CorruptedLengths:
  """Lengths of an example after corruption.

  Attributes:
    inputs: number of tokens of the inputs, EOS included.
    targets: number of tokens of the targets, EOS included.
    num_spans: number of masked spans, each with one sentinel.
  """

  inputs: int
  targets: int
  num_spans: int


def count_noise(
  length: int,
  noise_density: float = NOISE_DENSITY,
  mean_span_length: float = MEAN_SPAN_LENGTH,
) -> tuple[int, int]:
  """Returns how many tokens and spans of a text are masked.

  Args:
    length: number of tokens of the text.
    noise_density: fraction of the tokens that is masked.
    mean_span_length: mean number of tokens of a masked span.

  Returns:
    The number of masked tokens, and the number of spans that they form.

  Raises:
    ValueError: there are fewer than two tokens, one to mask and one to keep.
  """
  if length < 2:
    raise ValueError(
      'Span corruption needs at least 2 tokens, one to mask and one to keep, '
      f'but got {length}. Leave such texts out.'
    )
  num_noise = min(max(round(length * noise_density), 1), length - 1)
  num_spans = max(round(num_noise / mean_span_length), 1)
  # Each span needs a masked token, and an unmasked token before it. T5 does not
  # check this, as its densities are low.
  return num_noise, min(num_spans, num_noise, length - num_noise)


def lengths_after_corruption(
  length: int,
  noise_density: float = NOISE_DENSITY,
  mean_span_length: float = MEAN_SPAN_LENGTH,
) -> CorruptedLengths:
  """Returns the lengths of a text of `length` tokens after corruption."""
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
  """Returns the most tokens whose corruption fits the feature lengths.

  Args:
    inputs_length: number of tokens of the inputs, EOS included.
    targets_length: number of tokens of the targets, EOS included; None does not
      limit them. 512 inputs then give 568 tokens and 114 targets, as with T5's
      random_spans_helper.
    noise_density: fraction of the tokens that is masked.
    mean_span_length: mean number of tokens of a masked span.

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
  # Neither length falls as the text grows, so that bisection finds the longest
  # text that fits.
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

  Args:
    length: number of tokens of the text.
    rng: generator of all random choices.
    noise_density: fraction of the tokens that is masked.
    mean_span_length: mean number of tokens of a masked span.

  Returns:
    <int64>[num_spans, 2], the bounds [start, end) of the spans, in order. The
    first token is never masked and the last one always is, as in T5.
  """
  num_noise, num_spans = count_noise(length, noise_density, mean_span_length)
  # [num_spans] each: the lengths of the masked segments, and of the unmasked
  # segments before them.
  noise = _random_segments(num_noise, num_spans, rng)
  kept = _random_segments(length - num_noise, num_spans, rng)
  ends = np.cumsum(noise + kept)
  return np.stack([ends - noise, ends], axis=1)


def salient_budget(
  length: np.ndarray | int, noise_density: float
) -> np.ndarray | int:
  """Returns how many tokens of `length` to mask as salient, at least 1."""
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

  The first span that is drawn is always taken, however long it is, so that
  every example asks something.

  Args:
    spans: <int>[num_spans, 2], spans that are not empty and do not overlap.
    rng: generator of the random choices of this example.
    budget: number of masked tokens that spans after the first must not exceed.
    max_spans: the most spans to choose, which is the number of sentinels.
    max_targets: the most masked tokens and sentinels together. A span that is
      too long on its own is never taken.

  Returns:
    <int>[chosen, 2], in the order of the text; [0, 2] if no span fits.
  """
  chosen, masked = [], 0
  for index in rng.permutation(len(spans)):
    size = int(spans[index, 1] - spans[index, 0])
    # Each span that was chosen, and this one, adds a sentinel to the targets.
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
  """Returns the most tokens that a span may have to be masked as salient."""
  # The targets hold its sentinel and EOS besides. A window of a long text has
  # one token less than the inputs, as in `draw_salient`.
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
  """Draws the tokens and the spans of one salient example.

  A text that is longer than the inputs is read through a window around one of
  its spans, which is drawn at random.

  Args:
    tokens: <int>[length], the text without EOS.
    spans: <int>[num_spans, 2], the salient spans of the text.
    rng: generator of the random choices of this example.
    inputs_length: number of tokens of the inputs, EOS included.
    targets_length: number of tokens of the targets, EOS included.
    max_spans: the most spans to mask, which is the number of sentinels.
    noise_density: fraction of the tokens that spans after the first must not
      exceed.

  Returns:
    The tokens to use, <int>[at most inputs_length - 1], and the spans to mask,
    <int>[chosen, 2], which are [0, 2] if no span fits.
  """
  longest = longest_salient_span(inputs_length, targets_length)
  spans = spans[spans[:, 1] - spans[:, 0] <= longest]
  # k masked spans have m >= k tokens, so that a window of `size` tokens gives
  # size - m + k inputs and EOS, which are at most inputs_length.
  size = inputs_length - 1
  if len(tokens) > size and len(spans):
    # The window begins anywhere where it contains the whole drawn span.
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
  tokens: np.ndarray, spans: np.ndarray, sentinels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Replaces spans by sentinels.

  Args:
    tokens: <int>[length], the text.
    spans: <int>[num_spans, 2], bounds [start, end), in order; they are not empty
      and do not overlap.
    sentinels: the ids of the sentinels, at least one for each span.

  Returns:
    The inputs <int32>[n] and the targets <int32>[m], both without EOS.
  """
  tokens, spans = np.asarray(tokens, np.int32), np.asarray(spans)
  starts, ends = spans[:, 0], spans[:, 1]
  marks = sentinels[: len(spans)]
  # Tokens of spans are True: 1 is added where a span starts, and taken away
  # where it ends.
  changes = np.zeros(len(tokens) + 1, np.int8)
  changes[starts] += 1
  changes[ends] -= 1
  is_masked = np.cumsum(changes[:-1], dtype=np.int8).astype(bool)

  # A sentinel takes the place of the first token of its span.
  is_input = ~is_masked
  is_input[starts] = True
  inputs = tokens.copy()
  inputs[starts] = marks

  num_masked = np.cumsum(ends - starts)
  targets = np.empty(np.count_nonzero(is_masked) + len(spans), np.int32)
  is_mark = np.zeros(len(targets), bool)
  is_mark[num_masked - (ends - starts) + np.arange(len(spans))] = True
  targets[is_mark] = marks
  targets[~is_mark] = tokens[is_masked]
  return inputs[is_input], targets


def restore(
  inputs: np.ndarray, targets: np.ndarray, marks: Sequence[int]
) -> np.ndarray:
  """Returns the tokens that `mask_spans` was given, to look at examples.

  Args:
    inputs: <int32>[n], as `mask_spans` returned them.
    targets: <int32>[m], the same.
    marks: the sentinels of all spans.
  """
  parts, position = [], 0
  starts = [int(np.flatnonzero(targets == mark)[0]) for mark in marks]
  for mark, start, end in zip(
    marks, starts, starts[1:] + [len(targets)], strict=True
  ):
    place = int(np.flatnonzero(inputs == mark)[0])
    parts += [inputs[position:place], targets[start + 1 : end]]
    position = place + 1
  parts.append(inputs[position:])
  return np.concatenate(parts).astype(np.int32)


def _random_segments(
  num_items: int, num_segments: int, rng: np.random.Generator
) -> np.ndarray:
  """Cuts items into non-empty segments at random, and returns their lengths."""
  bounds = np.empty(num_segments + 1, np.int64)
  bounds[0], bounds[-1] = 0, num_items
  bounds[1:-1] = rng.choice(num_items - 1, num_segments - 1, replace=False) + 1
  bounds.sort()
  return bounds[1:] - bounds[:-1]
