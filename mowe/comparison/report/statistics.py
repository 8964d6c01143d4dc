"""How far scores of questions can be trusted: intervals and paired tests.

A score of a question is a number from 0 to 1, of several seeds their mean.
Questions are what is drawn at random: intervals and tests say what other
questions of the same kind would change, and nothing of other seeds.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000
_Z = 1.959964


@dataclasses.dataclass(frozen=True)
class PairedTest:
  """Two models on the same questions.

  Attributes:
    difference: mean score of the second less that of the first.
    low, high: its 95 % interval, by paired bootstrap.
    num_better: questions on which the second is better.
    num_worse: questions on which it is worse; on all others they are equal.
    p_value: two-sided, of the exact sign test: how likely at least so uneven a
      split is if either model is as likely to be the better one.
  """

  difference: float
  low: float
  high: float
  num_better: int
  num_worse: int
  p_value: float


def bootstrap_interval(
  scores: Sequence[float] | np.ndarray, seed: int = 0
) -> tuple[float, float]:
  """The 95 % interval of a mean score over the draw of the questions.

  Percentiles of the means of 10,000 resamples. Where all scores are 0, or all
  are 1, resampling would say that nothing is uncertain: Wilson's interval of a
  share stands in.

  Args:
    scores: <float>[questions], from 0 to 1.
    seed: of the resamples.

  Raises:
    ValueError: no scores, or one that is not from 0 to 1.
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
    first: <float>[questions], from 0 to 1.
    second: the same of the other model, in the same order.
    seed: of the resamples.

  Raises:
    ValueError: no scores, another number of them, or one not from 0 to 1.
  """
  first, second = _check(first), _check(second)
  if len(first) != len(second):
    raise ValueError(
      'A paired test needs the scores of the same questions, but there are '
      f'{len(first)} and {len(second)}. Ask both models the same questions.'
    )
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
  """The two-sided p-value of the exact sign test; 1 without a difference."""
  total = num_better + num_worse
  tail = [
    _log_choose(total, k) - total * math.log(2)
    for k in range(min(num_better, num_worse) + 1)
  ]
  return min(1.0, 2 * math.fsum(map(math.exp, tail)))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
  """The 95 % interval of a share of `count` yes-or-no answers, 0 to 1."""
  middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
  spread = share * (1 - share) / count + _Z**2 / (4 * count**2)
  half = _Z * math.sqrt(spread) / (1 + _Z**2 / count)
  return max(0.0, float(middle - half)), min(1.0, float(middle + half))


@functools.lru_cache(maxsize=4096)
def _interval(values: bytes, seed: int) -> tuple[float, float]:
  """Percentiles of the means of resamples; a report asks again and again."""
  means = _resampled_means(np.frombuffer(values, np.float64), seed)
  low, high = np.percentile(means, (2.5, 97.5))
  return float(low), float(high)


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
  """Means of resamples with replacement, <float64>[resamples].

  Few scores differ: how often each of them is drawn is all that counts.
  """
  distinct, counts = np.unique(values, return_counts=True)
  rng = np.random.default_rng(seed)
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
