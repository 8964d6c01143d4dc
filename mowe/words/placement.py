"""Places experts on devices, in blocks of equal size and about equal load.

Tables are split over devices in contiguous blocks of experts. Words are far
from equally frequent, so that blocks are packed by expected load: the experts,
the heaviest first, each go to the lightest part that still has room. Packing
proceeds from the top: all experts are packed into a few parts, each of these
again into parts, and so on down to the blocks. Neighbouring blocks can
therefore be joined for fewer devices and remain even; and light experts gather
around a heavy one already in the large parts.

Source: greedy packing, longest processing time first (Graham, 1969).
"""

import dataclasses
import heapq

import numpy as np

from mowe.words import routing_vocabulary

# Number of hot words that a message names.
_MOST_NAMED = 3


def in_blocks(
  vocabulary: routing_vocabulary.RoutingVocabulary, num_blocks: int
) -> routing_vocabulary.RoutingVocabulary:
  """Returns the vocabulary with its experts renumbered by `place_experts`."""
  numbers = place_experts(vocabulary.loads().shares, num_blocks)
  # The id `num_experts` stands for no expert and stays as it is.
  numbers = np.append(numbers, np.int32(vocabulary.num_experts))
  return dataclasses.replace(vocabulary, experts=numbers[vocabulary.experts])


def describe_hot_words(
  vocabulary: routing_vocabulary.RoutingVocabulary, num_blocks: int
) -> str:
  """Returns a warning that names words too frequent for a block, or ''."""
  shares = vocabulary.loads().shares
  hot = balance(shares, num_blocks).hot_experts
  if not hot:
    return ''
  named = []
  for expert in hot[:_MOST_NAMED]:
    # Entries are in the order of their counts: the first entry of the expert is
    # its most frequent one.
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
  """Renumbers experts so that contiguous blocks are evenly loaded.

  Args:
    loads: <float>[num_experts], expected tokens of each expert.
    num_blocks: number of blocks, which have equally many experts. Every divisor
      of it gives even blocks as well, best if it is a product of its first
      prime factors: of 24 blocks, divisions into 2, 4, 8 and 24 are packed,
      and a division into 3 is made of whole blocks.

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
  # The loop divides every part again, by one prime factor at a time.
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
    num_blocks: number of blocks, which have equally many experts.
    max_over_mean: load of the busiest block in units of the mean.
    hot_experts: the experts that alone have more than the mean load of a block,
      busiest first. No placement makes their blocks even.
  """

  num_blocks: int
  max_over_mean: float
  hot_experts: tuple[int, ...]


def balance(loads: np.ndarray, num_blocks: int) -> Balance:
  """Returns how evenly loads <float>[num_experts] fall on contiguous blocks."""
  mean = loads.sum() / num_blocks
  blocks = loads.reshape(num_blocks, -1).sum(axis=1)
  order = np.argsort(-loads, kind='stable')
  return Balance(
    num_blocks=num_blocks,
    max_over_mean=float(blocks.max() / mean) if mean else 1.0,
    hot_experts=tuple(order[loads[order] > mean].tolist()),
  )


def _pack(experts, loads, number):
  """Packs experts into parts of equal size and about equal load.

  Args:
    experts: <int>[experts], the experts to be packed.
    loads: <float>[experts], their loads.
    number: number of parts.

  Returns:
    A list of `number` arrays of experts, each ascending.
  """
  room = len(experts) // number
  parts: list[list[int]] = [[] for _ in range(number)]
  lightest = [(0.0, part) for part in range(number)]
  order = np.argsort(-loads, kind='stable')
  for expert, load in zip(
    experts[order].tolist(), loads[order].tolist(), strict=True
  ):
    total, part = lightest[0]
    parts[part].append(expert)
    # A full part leaves the heap.
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
