"""Which experts share a device: blocks of equal count and even load.

Tables are split over devices in contiguous blocks of experts. Words are far
from equally frequent, so the blocks are packed by expected load: experts,
heaviest first, go to the lightest part that has room. It is done from the top:
all experts in a few parts, each of these again in parts, down to the blocks. So
the blocks of one placement can also be taken together, neighbours with
neighbours, for fewer devices; and the light experts gather around a heavy one
already in the large parts.

Source: greedy packing, longest processing time first (Graham, 1969).
"""

import dataclasses
import heapq

import numpy as np

from mowe.words import routing_vocabulary

# Hot words that are named.
_MOST_NAMED = 3


def in_blocks(
  vocabulary: routing_vocabulary.RoutingVocabulary, num_blocks: int
) -> routing_vocabulary.RoutingVocabulary:
  """The same words on the same experts, numbered by `place_experts`."""
  numbers = place_experts(vocabulary.loads().shares, num_blocks)
  # The number of experts itself stands for no expert.
  numbers = np.append(numbers, np.int32(vocabulary.num_experts))
  return dataclasses.replace(vocabulary, experts=numbers[vocabulary.experts])


def describe_hot_words(
  vocabulary: routing_vocabulary.RoutingVocabulary, num_blocks: int
) -> str:
  """Names the words that are too frequent for a block; '' if none is."""
  shares = vocabulary.loads().shares
  hot = balance(shares, num_blocks).hot_experts
  if not hot:
    return ''
  named = []
  for expert in hot[:_MOST_NAMED]:
    # Entries are in the order of their counts.
    entry = int(np.flatnonzero(vocabulary.experts[:-1] == expert)[0])
    share = shares[expert] / shares.sum()
    named.append(
      f'{vocabulary.word(entry)!r} (expert {expert}) has {share:.1%}'
    )
  more = len(hot) - len(named)
  return (
    'No expert should have more tokens than a block of experts has on '
    f'average, {1 / num_blocks:.1%} for {num_blocks} blocks, but that of '
    f'{", of ".join(named)}{f", and {more} more" if more else ""}: all '
    'devices wait for theirs. Use fewer blocks, or build the routing '
    'vocabulary with a larger --num_skipped.'
  )


def place_experts(loads: np.ndarray, num_blocks: int) -> np.ndarray:
  """New numbers of experts, so that contiguous blocks are evenly loaded.

  Args:
    loads: <float>[num_experts], expected tokens of each.
    num_blocks: of as many experts each. Every number that divides it has even
      blocks as well, best if it does so prime by prime: of 24 those of 2, 4, 8
      and 24 are packed, those of 3 are made of whole blocks.

  Returns:
    <int32>[num_experts], the new number of each expert. Experts of one block
    keep their order.

  Raises:
    ValueError: `num_blocks` does not divide the number of experts.
  """
  num_experts = len(loads)
  check_num_blocks(num_experts, num_blocks)
  loads = np.asarray(loads, np.float64)
  parts = [np.arange(num_experts)]
  for number in _prime_factors(num_blocks):
    parts = [
      block for part in parts for block in _pack(part, loads[part], number)
    ]
  numbers = np.empty(num_experts, np.int32)
  numbers[np.concatenate(parts)] = np.arange(num_experts, dtype=np.int32)
  return numbers


def check_num_blocks(num_experts: int, num_blocks: int) -> None:
  """Raises ValueError unless blocks can hold equally many experts."""
  if num_blocks < 1 or num_experts % num_blocks:
    raise ValueError(
      'Blocks must hold equally many experts, so their number must divide '
      f'num_experts = {num_experts}, but is {num_blocks}. Change one of them; '
      'powers of two serve most numbers of devices.'
    )


@dataclasses.dataclass(frozen=True)
class Balance:
  """How evenly tokens fall on contiguous blocks of experts.

  Attributes:
    num_blocks: of as many experts each.
    max_over_mean: load of the busiest block in units of the mean.
    hot_experts: those that alone have more than the mean of a block, busiest
      first; no placement makes their blocks even.
  """

  num_blocks: int
  max_over_mean: float
  hot_experts: tuple[int, ...]


def balance(loads: np.ndarray, num_blocks: int) -> Balance:
  """Balance of `loads` <float>[num_experts] over contiguous blocks."""
  mean = loads.sum() / num_blocks
  blocks = loads.reshape(num_blocks, -1).sum(axis=1)
  order = np.argsort(-loads, kind='stable')
  return Balance(
    num_blocks=num_blocks,
    max_over_mean=float(blocks.max() / mean) if mean else 1.0,
    hot_experts=tuple(order[loads[order] > mean].tolist()),
  )


def _pack(experts, loads, number):
  """The experts in so many parts, in each of them ascending."""
  room = len(experts) // number
  parts: list[list[int]] = [[] for _ in range(number)]
  lightest = [(0.0, part) for part in range(number)]
  order = np.argsort(-loads, kind='stable')
  for expert, load in zip(
    experts[order].tolist(), loads[order].tolist(), strict=True
  ):
    total, part = lightest[0]
    parts[part].append(expert)
    if len(parts[part]) == room:
      heapq.heappop(lightest)
    else:
      heapq.heapreplace(lightest, (total + load, part))
  return [np.sort(part) for part in parts]


def _prime_factors(number):
  factors, prime = [], 2
  while number > 1:
    while number % prime == 0:
      factors.append(prime)
      number //= prime
    prime += 1
  return factors
