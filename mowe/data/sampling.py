"""Pseudo-random orders of examples and mixtures of tasks, in closed form.

Nothing here has state. The order of a million examples is a function of the
seed and the epoch, which is evaluated at the places that are asked for.
"""

import functools
from collections.abc import Sequence

import numpy as np

BLOCK = 4096  # Number of examples of a mixture that are dealt out together.
_NUM_ROUNDS = 6  # Rounds of the Feistel network.


def permute(indices: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
  """Returns what a pseudo-random permutation of range(size) maps indices to.

  The permutation is a Feistel network over the next power of four, which is
  applied again until the result is below `size` (cycle walking, Black and
  Rogaway 2002). It needs no memory for the permutation.

  Args:
    indices: <int>[...], from 0 to size - 1.
    size: number of things that are permuted.
    key: numbers from 0 on that name the permutation, such as (seed, epoch).

  Returns:
    <int64>[...], from 0 to size - 1; different indices give different results.

  Raises:
    ValueError: an index is outside 0 .. size - 1.
  """
  values = np.asarray(indices, dtype=np.int64)
  if values.size and (values.min() < 0 or values.max() >= size):
    raise ValueError(
      f'Indices to be permuted must be in 0 .. {size - 1}, but reach from '
      f'{values.min()} to {values.max()}. Take them modulo the size.'
    )
  half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
  keys = np.random.SeedSequence(list(key)).generate_state(
    _NUM_ROUNDS, np.uint64
  )
  flat = values.reshape(-1).astype(np.uint64)
  walking = np.arange(flat.size)
  while walking.size:
    flat[walking] = _feistel(flat[walking], half, keys)
    walking = walking[flat[walking] >= size]
  return flat.astype(np.int64).reshape(values.shape)


def _feistel(
  values: np.ndarray, half: np.uint64, keys: np.ndarray
) -> np.ndarray:
  """Applies a bijection of [0, 4 ** half)."""
  mask = (np.uint64(1) << half) - np.uint64(1)
  left, right = values >> half, values & mask
  for key in keys:
    left, right = right, left ^ (_mix(right ^ key) & mask)
  return (left << half) | right


def _mix(values: np.ndarray) -> np.ndarray:
  """Applies the finaliser of splitmix64: every bit depends on all bits."""
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


class TaskMixture:
  """Deals a stream of numbers out to several tasks at fixed rates.

  Each block of 4096 numbers gives every task its share, rounded by the largest
  remainder, in an order that is shuffled by the seed and the block.

  Args:
    rates: the rate of each task; they need not sum to one.
    seed: seed of the shuffled orders.

  Attributes:
    counts: <int64>[tasks], how many numbers of a block each task has.

  Raises:
    ValueError: a rate is not positive, or so low that a block gives the task
      nothing.
  """

  def __init__(self, rates: Sequence[float], seed: int):
    shares = np.asarray(rates, dtype=np.float64)
    if not len(shares) or not np.all(np.isfinite(shares) & (shares > 0)):
      raise ValueError(
        f'The rates of a mixture must be positive, but are {list(rates)}. '
        'Leave a task out to give it none.'
      )
    exact = shares / shares.sum() * BLOCK
    self.counts = np.floor(exact).astype(np.int64)
    missing = BLOCK - self.counts.sum()
    # The sort is stable: of equal remainders the earlier task gets more.
    self.counts[np.argsort(self.counts - exact, kind='stable')[:missing]] += 1
    if not self.counts.all():
      raise ValueError(
        f'Every task must have a rate of about 1/{BLOCK} of the sum or more, '
        f'but the rates are {list(rates)}. Raise the lowest, or leave it out.'
      )
    self._seed = seed
    self._block = functools.lru_cache(maxsize=8)(self._deal)

  def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the task of each number, and its rank among those of the task.

    Args:
      numbers: <int>[...], from 0 on.

    Returns:
      tasks: <int64>[...], the task of each number.
      ranks: <int64>[...], how many smaller numbers the task has.
    """
    numbers = np.asarray(numbers, dtype=np.int64)
    tasks, ranks = np.empty_like(numbers), np.empty_like(numbers)
    blocks = numbers // BLOCK
    for block in np.unique(blocks).tolist():
      here = blocks == block
      dealt, rank = self._block(block)
      place = numbers[here] % BLOCK
      tasks[here] = dealt[place]
      ranks[here] = block * self.counts[dealt[place]] + rank[place]
    return tasks, ranks

  def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the task of each place of a block, and its rank in the task."""
    dealt = np.repeat(np.arange(len(self.counts)), self.counts)
    rank = np.concatenate([np.arange(count) for count in self.counts.tolist()])
    order = np.random.default_rng([self._seed, block]).permutation(BLOCK)
    dealt = dealt[order]
    # The ranks of a task follow the order of its places after the shuffle.
    by_task = np.argsort(dealt, kind='stable')
    ranks = np.empty(BLOCK, np.int64)
    ranks[by_task] = rank
    return dealt, ranks
