"""Tests intervals and paired tests against resampling and explicit sums."""

import math

import numpy as np
import pytest

from mowe.comparison.report import statistics


def _resample(values, seed, number=4000):
  """Means of bootstrap samples, which draw whole questions."""
  rng = np.random.default_rng(seed)
  return np.array(
    [rng.choice(values, len(values)).mean() for _ in range(number)]
  )


def _scores(number, share, seed, seeds=1):
  rng = np.random.default_rng(seed)
  return rng.binomial(seeds, share, number) / seeds


@pytest.mark.parametrize(('number', 'share', 'seeds'), [(60, 0.3, 1), (401, 0.07, 1), (90, 0.5, 3)])  # fmt: skip
def test_intervals_are_those_of_plain_resampling(number, share, seeds):
  scores = _scores(number, share, 5, seeds)
  expected = np.percentile(_resample(scores, 11), (2.5, 97.5))
  found = statistics.bootstrap_interval(scores)
  # Percentiles of two sets of samples may differ by the error of a percentile,
  # and by one or two of the steps of 1 / questions that a mean can take.
  error = 4 * scores.std() / math.sqrt(number) / math.sqrt(4000) + 1 / number
  np.testing.assert_allclose(found, expected, atol=2 * error)
  assert found[0] < scores.mean() < found[1]


def test_an_interval_is_as_wide_as_the_normal_one():
  scores = _scores(3000, 0.4, 3)
  low, high = statistics.bootstrap_interval(scores)
  half = 1.96 * scores.std() / math.sqrt(len(scores))
  assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_intervals_can_be_repeated():
  scores = np.random.default_rng(3).random(50)
  assert statistics.bootstrap_interval(scores) == (
    statistics.bootstrap_interval(list(scores))
  )
  assert statistics.bootstrap_interval(scores, seed=1) != (
    statistics.bootstrap_interval(scores)
  )


def test_none_right_is_not_certainly_none():
  low, high = statistics.bootstrap_interval(np.zeros(100))
  assert low == 0 and 0.03 < high < 0.04
  low, high = statistics.bootstrap_interval(np.ones(100))
  assert 0.96 < low < 0.97 and high == 1
  # Wilson's interval for 5 of 10 has the middle 0.5 and the half width 0.2634.
  assert statistics.wilson_interval(0.5, 10) == pytest.approx(
    (0.2366, 0.7634), abs=1e-4
  )


def test_sign_test_by_hand():
  # Of 2^8 ways to split, 1 + 8 are at least as uneven to one side.
  assert statistics.sign_test(7, 1) == pytest.approx(2 * 9 / 256)
  assert statistics.sign_test(1, 7) == statistics.sign_test(7, 1)
  assert statistics.sign_test(0, 0) == statistics.sign_test(4, 4) == 1
  for better, worse in ((90, 60), (3, 200), (512, 500)):
    total = better + worse
    tail = sum(math.comb(total, k) for k in range(min(better, worse) + 1))
    expected = min(1.0, 2 * tail / 2**total)
    assert statistics.sign_test(better, worse) == pytest.approx(expected)
  # These powers of two are far beyond the range of floats.
  assert 0 <= statistics.sign_test(4000, 100) < 1e-300


def test_paired_tests_keep_questions_together():
  # The questions differ much more than the models do. The second model answers
  # what the first one does, and 12 of 200 questions besides.
  first = np.arange(200) % 2.0
  second = np.where(np.arange(200) < 24, 1.0, first)
  found = statistics.paired_test(first, second)
  assert found.difference == pytest.approx(12 / 200)
  assert (found.num_better, found.num_worse) == (12, 0)
  assert found.p_value == pytest.approx(2 / 2**12)
  expected = np.percentile(_resample(second - first, 3), (2.5, 97.5))
  np.testing.assert_allclose((found.low, found.high), expected, atol=0.01)
  assert found.low > 0
  back = statistics.paired_test(second, first)
  assert back.difference == -found.difference
  assert (back.num_better, back.num_worse) == (0, 12)
  same = statistics.paired_test(first, first)
  assert same == statistics.PairedTest(0.0, 0.0, 0.0, 0, 0, 1.0)


@pytest.mark.parametrize(
  ('scores', 'message'),
  [
    ([], 'at least one question'),
    ([0.5, 12.0], 'Divide percentages by 100'),
    ([0.5, float('nan')], 'between 0 and 1'),
    ([[1.0]], 'at least one question'),
  ],
)
def test_what_is_no_score_is_refused(scores, message):
  with pytest.raises(ValueError, match=message):
    statistics.bootstrap_interval(scores)


def test_scores_of_other_questions_are_refused():
  with pytest.raises(ValueError, match='3 and 2. Ask both models the same'):
    statistics.paired_test([1, 0, 1], [1, 0])
