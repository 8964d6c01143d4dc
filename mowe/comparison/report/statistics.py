"""Intervals and paired tests say how far scores of questions can be trusted.

The score of a question is a number from 0 to 1; with several seeds it is the
mean over them. Questions are taken to be drawn at random: intervals and tests
say what other questions of the same kind would change, and nothing about other
seeds.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000
_Z = 1.959964  # The 97.5 % quantile of the normal distribution.


@dataclasses.dataclass(frozen=True)
class PairedTest:
  """Two models on the same questions.

  Attributes:
    difference: mean score of the second model less that of the first.
    low: lower end of the 95 % interval of the difference, by paired bootstrap.
    high: upper end of this interval.
    num_better: number of questions on which the second model is better.
    num_worse: number of questions on which the second model is worse; on all
      others both are equal.
    p_value: two-sided p-value of the exact sign test, which is how likely a
      split at least as uneven is if each model is equally likely to be the
      better one on a question.
  """

  difference: float
  low: float
  high: float
  num_better: int
  num_worse: int
  p_value: float

  def p_in_words(self) -> str:
    """Returns the p-value with two digits, or that it is below 0.0001."""
    return f'{self.p_value:.2g}' if self.p_value >= 1e-4 else '< 0.0001'


def bootstrap_interval(
  scores: Sequence[float] | np.ndarray, seed: int = 0
) -> tuple[float, float]:
  """Returns the 95 % interval of a mean score over the draw of the questions.

  Its ends are percentiles of the means of 10,000 resamples. If all scores are
  0, or all are 1, every resample is the same, as if nothing were uncertain.
  Wilson's interval of a proportion is returned in that case.

  Args:
    scores: <float>[questions], from 0 to 1.
    seed: seed of the resamples.

  Raises:
    ValueError: there are no scores, or one is not from 0 to 1.
  """
  scores = _check(scores)
  if np.ptp(scores) == 0 and scores[0] in (0, 1):
    return wilson_interval(scores[0], len(scores))
  return _interval(scores.tobytes(), seed)


def paired_test(
  first: Sequence[float] | np.ndarray,
  second: Sequence[float] | np.ndarray,
  seed: int = 0,
) -> PairedTest:
  """Compares two models by their scores of the same questions.

  Args:
    first: <float>[questions], scores of the first model, from 0 to 1.
    second: <float>[questions], scores of the second model, in the same order.
    seed: seed of the resamples.

  Raises:
    ValueError: there are no scores, they are not equally many, or one is not
      from 0 to 1.
  """
  first, second = _check(first), _check(second)
  if len(first) != len(second):
    raise ValueError(
      'A paired test needs the scores of the same questions, but there are '
      f'{len(first)} and {len(second)}. Ask both models the same questions.'
    )
  # Resamples of the differences are paired: each draws the same questions for
  # both models.
  differences = second - first
  low, high = _interval(differences.tobytes(), seed)
  num_better = int((differences > 0).sum())
  num_worse = int((differences < 0).sum())
  return PairedTest(
    difference=float(differences.mean()),
    low=low,
    high=high,
    num_better=num_better,
    num_worse=num_worse,
    p_value=sign_test(num_better, num_worse),
  )


def sign_test(num_better: int, num_worse: int) -> float:
  """Returns the two-sided p-value of the exact sign test; 1 without difference.

  Args:
    num_better: number of questions on which one model is better.
    num_worse: number of questions on which it is worse.
  """
  total = num_better + num_worse
  # The tail of the binomial distribution with probability 1/2, by logarithms,
  # because the binomial coefficients of many questions overflow.
  tail = [
    _log_choose(total, k) - total * math.log(2)
    for k in range(min(num_better, num_worse) + 1)
  ]
  return min(1.0, 2 * math.fsum(map(math.exp, tail)))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
  """Returns Wilson's 95 % interval of a proportion, with ends from 0 to 1.

  Args:
    share: the fraction of answers that are yes, from 0 to 1.
    count: number of answers.
  """
  middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
  spread = share * (1 - share) / count + _Z**2 / (4 * count**2)
  half = _Z * math.sqrt(spread) / (1 + _Z**2 / count)
  return max(0.0, float(middle - half)), min(1.0, float(middle + half))


@functools.lru_cache(maxsize=4096)
def _interval(values: bytes, seed: int) -> tuple[float, float]:
  """Returns percentiles of the means of resamples.

  Results are kept, because a report asks for the same intervals repeatedly.
  """
  means = _resampled_means(np.frombuffer(values, np.float64), seed)
  low, high = np.percentile(means, (2.5, 97.5))
  return float(low), float(high)


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
  """Returns the means of resamples with replacement, <float64>[resamples].

  Only few distinct scores occur, and a mean depends on how often each of them
  is drawn alone: these numbers have a multinomial distribution.
  """
  distinct, counts = np.unique(values, return_counts=True)
  rng = np.random.default_rng(seed)
  # [resamples, distinct scores]
  drawn = rng.multinomial(len(values), counts / len(values), _RESAMPLES)
  return drawn @ distinct / len(values)


def _log_choose(n: int, k: int) -> float:
  return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _check(scores) -> np.ndarray:
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 1 or not len(scores):
    raise ValueError(
      'There must be a score for each of at least one question, but the shape '
      f'of the scores is {scores.shape}. Ask at least one question.'
    )
  if not ((scores >= 0) & (scores <= 1)).all():
    raise ValueError(
      f'Scores must lie between 0 and 1, but they reach from {scores.min()} to '
      f'{scores.max()}. Divide percentages by 100.'
    )
  return scores
