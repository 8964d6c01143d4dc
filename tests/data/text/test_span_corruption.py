"""Tests span corruption: T5's lengths, exact inverses, small cases by hand."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from mowe.data.text import span_corruption

# Sentinels count down from here and must not reach the ids of tokens.
_SENTINELS = range(9999, 8999, -1)


def test_mask_spans_by_hand():
  tokens = np.array([10, 11, 12, 13, 14, 15])
  inputs, targets = span_corruption.mask_spans(
    tokens, np.array([[1, 3], [5, 6]]), sentinels=range(99, 89, -1)
  )
  np.testing.assert_array_equal(inputs, [10, 99, 13, 14, 98])
  np.testing.assert_array_equal(targets, [99, 11, 12, 98, 15])
  assert inputs.dtype == targets.dtype == np.int32


def test_no_span_leaves_the_text():
  inputs, targets = span_corruption.mask_spans(
    np.array([10, 11]), np.zeros((0, 2), int), [99]
  )
  np.testing.assert_array_equal(inputs, [10, 11])
  assert len(targets) == 0


def test_lengths_are_those_of_t5():
  # In T5 1.1, inputs of 512 hold 568 tokens of text, and their targets have
  # 114.
  assert span_corruption.tokens_that_fill(512) == 568
  lengths = span_corruption.lengths_after_corruption(568)
  assert (lengths.inputs, lengths.targets, lengths.num_spans) == (512, 114, 28)
  # Of 568 tokens 568 * 0.15 = 85.2 are masked, in 85 / 3 = 28.3 spans.
  assert span_corruption.count_noise(568) == (85, 28)


@hypothesis.given(
  length=strategies.integers(2, 700),
  density=strategies.floats(0.01, 0.9),
  mean=strategies.floats(1, 10),
  seed=strategies.integers(0, 2**32 - 1),
)
def test_lengths_are_exact_and_the_text_comes_back(length, density, mean, seed):
  tokens = np.arange(length)
  rng = np.random.default_rng(seed)
  spans = span_corruption.random_spans(length, rng, density, mean)
  inputs, targets = span_corruption.mask_spans(tokens, spans, _SENTINELS)
  lengths = span_corruption.lengths_after_corruption(length, density, mean)
  assert len(inputs) + 1 == lengths.inputs
  assert len(targets) + 1 == lengths.targets
  assert len(spans) == lengths.num_spans
  # As in T5, the first token is never masked and the last one always is.
  assert spans[0, 0] > 0 and spans[-1, 1] == length
  assert (spans[:, 1] > spans[:, 0]).all()
  assert (spans[1:, 0] > spans[:-1, 1]).all()
  restored = span_corruption.restore(inputs, targets, _SENTINELS[: len(spans)])
  np.testing.assert_array_equal(restored, tokens)


@hypothesis.given(
  inputs_length=strategies.integers(3, 2000),
  targets_length=strategies.none() | strategies.integers(3, 600),
  density=strategies.floats(0.05, 0.6),
)
def test_tokens_that_fill_is_the_largest(
  inputs_length, targets_length, density
):
  length = span_corruption.tokens_that_fill(
    inputs_length, targets_length, density
  )

  def fits(length):
    lengths = span_corruption.lengths_after_corruption(length, density)
    return lengths.inputs <= inputs_length and (
      targets_length is None or lengths.targets <= targets_length
    )

  assert fits(length) and not fits(length + 1)


def test_statistics_of_random_spans():
  rng = np.random.default_rng(0)
  masked = np.zeros(100)
  sizes = []
  for _ in range(2000):
    spans = span_corruption.random_spans(100, rng)
    for start, end in spans:
      masked[start:end] += 1
      sizes.append(end - start)
  # Always 15 of 100 tokens are masked, in 5 spans.
  assert masked.sum() == 2000 * 15
  assert np.mean(sizes) == 3
  # If 15 is cut uniformly into 5 parts, P(size 1) = C(13, 3) / C(14, 4).
  assert np.mean(np.equal(sizes, 1)) == pytest.approx(286 / 1001, abs=0.02)
  # No place in the middle is masked more often than others.
  assert masked[20:80].std() / masked[20:80].mean() < 0.12


def test_too_short_is_refused():
  with pytest.raises(ValueError, match='at least 2 tokens.*got 1'):
    span_corruption.random_spans(1, np.random.default_rng(0))
  with pytest.raises(ValueError, match='at least 3 inputs.*2 and 9'):
    span_corruption.tokens_that_fill(2, 9)


_SPANS = np.array([[0, 2], [3, 4], [5, 12], [12, 13]])


@pytest.mark.parametrize('seed', range(20))
def test_salient_spans_keep_to_the_budget_after_the_first(seed):
  rng = np.random.default_rng(seed)
  chosen = span_corruption.salient_spans(
    _SPANS, rng, budget=3, max_spans=9, max_targets=99
  )
  sizes = chosen[:, 1] - chosen[:, 0]
  # The span of 7 tokens exceeds the budget, so it may only come alone.
  assert 1 <= len(chosen) and (sizes.sum() <= 3 or sizes.tolist() == [7])
  assert (np.diff(chosen[:, 0]) > 0).all()


def test_salient_spans_obey_their_limits():
  def draw(seed, **limits):
    return span_corruption.salient_spans(
      _SPANS,
      np.random.default_rng(seed),
      **({'budget': 99, 'max_spans': 9, 'max_targets': 99} | limits),
    )

  np.testing.assert_array_equal(draw(0), _SPANS)
  assert all(len(draw(seed, max_spans=2)) == 2 for seed in range(9))
  # Targets of length 2 hold one sentinel and one token, so longer spans are
  # out.
  short = [draw(seed, max_targets=2).tolist() for seed in range(9)]
  assert {(0, 2), (5, 12)}.isdisjoint(tuple(s[0]) for s in short)
  assert draw(0, max_targets=1).shape == (0, 2)


@hypothesis.given(
  data=strategies.data(),
  length=strategies.integers(1, 60),
  inputs_length=strategies.integers(3, 40),
  targets_length=strategies.integers(3, 20),
  seed=strategies.integers(0, 1000),
)
def test_salient_examples_fit_and_come_back(
  data, length, inputs_length, targets_length, seed
):
  cuts = data.draw(strategies.sets(strategies.integers(0, length), max_size=12))
  bounds = sorted(cuts)
  spans = np.array(list(zip(bounds[::2], bounds[1::2], strict=False)), int)
  spans = spans.reshape(-1, 2)
  tokens, chosen = span_corruption.draw_salient(
    np.arange(length),
    spans,
    np.random.default_rng(seed),
    inputs_length=inputs_length,
    targets_length=targets_length,
    max_spans=3,
  )
  longest = span_corruption.longest_salient_span(inputs_length, targets_length)
  assert bool(len(chosen)) == any(
    end - start <= longest for start, end in spans
  )
  if not len(chosen):
    return
  inputs, targets = span_corruption.mask_spans(tokens, chosen, _SENTINELS)
  assert len(inputs) + 1 <= inputs_length
  assert len(targets) + 1 <= targets_length
  restored = span_corruption.restore(inputs, targets, _SENTINELS[: len(chosen)])
  np.testing.assert_array_equal(restored, tokens)
  # The tokens are numbered by place, so it shows that whole spans are masked.
  for start, end in chosen:
    assert [tokens[start], tokens[end - 1] + 1] in spans.tolist()
