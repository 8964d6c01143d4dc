"""Hashes from the last few ids of a text to rows of one table.

A hash takes a *history*: the ids at a position, one before it, two before it
and so on, each <int32>[batch, length]. It has several slots for each order n of
its n-grams, and each slot has a part of the table for itself. Slots come in the
order of the rising orders, heads inside.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mowe.words.addresses import primes, wide_integers

Array = Any  # numpy.ndarray or jax.Array.

# From each order, 2-grams first, to the sizes of its slots' parts of the table.
Moduli = tuple[tuple[int, ...], ...]


class NGramHash(Protocol):
  """What an address of n-grams needs of a hash.

  Attributes:
    moduli: of each order, 2-grams first, the rows of each of its slots.
  """

  moduli: Moduli

  def __call__(self, history: Sequence[Array]) -> Array:
    """Returns rows <int32>[batch, length, slots] of one table."""


def max_ngram(moduli: Moduli) -> int:
  """Returns the length of the longest n-gram."""
  return len(moduli) + 1


def offsets(moduli: Moduli) -> list[int]:
  """Returns the first row of each slot; the last number is that of all rows."""
  return list(itertools.accumulate(itertools.chain(*moduli), initial=0))


@dataclasses.dataclass(frozen=True)
class MultiplyXor:
  """Ids times odd constants, joined by exclusive or, modulo primes.

  Source: Engram, arXiv 2601.07372, and its demo. All slots of an order share
  one hash and differ in the prime alone. Distinct primes keep two n-grams that
  collide in one slot apart in the others.

  Attributes:
    multipliers: of each position of an n-gram, from the last id on, its factor.
    moduli: see `NGramHash`.
  """

  multipliers: tuple[int, ...]
  moduli: Moduli

  def __post_init__(self):
    if len(self.multipliers) != max_ngram(self.moduli):
      raise ValueError(
        'MultiplyXor must have a multiplier for each id of its longest n-gram, '
        f'{max_ngram(self.moduli)}, but has {len(self.multipliers)}. Make both '
        'with engram_hashes.'
      )
    if not all(0 < factor < 2**63 for factor in self.multipliers):
      raise ValueError(
        'Multipliers must be from 1 to 2^63 - 1, but are '
        f'{self.multipliers}. Make them with engram_hashes.'
      )
    check_moduli(self.moduli)

  def __call__(self, history: Sequence[Array]) -> Array:
    """See `NGramHash`."""
    starts = iter(offsets(self.moduli))
    mixed = wide_integers.times(history[0], self.multipliers[0])
    slots = []
    for n, of_order in enumerate(self.moduli, 1):
      mixed = wide_integers.xor(
        mixed, wide_integers.times(history[n], self.multipliers[n])
      )
      slots += [
        wide_integers.remainder(mixed, modulus) + np.int32(next(starts))
        for modulus in of_order
      ]
    return history[0].__array_namespace__().stack(slots, axis=-1)


@dataclasses.dataclass(frozen=True)
class Polynomial:
  """The ids as the digits of a number, the last id the lowest, modulo sizes.

  Sources: Over-Encoding, arXiv 2501.16975, and LongCat, arXiv 2601.21204.

  Attributes:
    base: the base of the number, at least the number of different ids.
    moduli: see `NGramHash`.
  """

  base: int
  moduli: Moduli

  def __post_init__(self):
    check_moduli(self.moduli)

  def __call__(self, history: Sequence[Array]) -> Array:
    """See `NGramHash`."""
    starts = iter(offsets(self.moduli))
    slots = [
      self._slot(history[:n], modulus) + np.int32(next(starts))
      for n, of_order in enumerate(self.moduli, 2)
      for modulus in of_order
    ]
    return history[0].__array_namespace__().stack(slots, axis=-1)

  def _slot(self, ids: Sequence[Array], modulus: int) -> Array:
    # Every digit is reduced by itself, because the whole number would need more
    # than 64 bits. The sum of two remainders needs at most 32 bits unsigned.
    total = wide_integers.remainder(wide_integers.times(ids[0], 1), modulus)
    for i, digit in enumerate(ids[1:], 1):
      weight = pow(self.base, i, modulus)
      term = wide_integers.remainder(
        wide_integers.times(digit, weight), modulus
      )
      both = total.astype(np.uint32) + term.astype(np.uint32)
      total = (both % np.uint32(modulus)).astype(np.int32)
    return total


def engram_hashes(
  num_ids: int,
  rows_wanted: Sequence[int],
  heads: int,
  layers: Sequence[int] = (0,),
  seed: int = 0,
  hash_bits: int = 64,
) -> tuple[MultiplyXor, ...]:
  """Returns the hash of each layer that hosts an Engram memory.

  Source: the demo of Engram. The multipliers of a layer come from NumPy's
  generator with the seed `seed + 10007 * layer`. With `hash_bits=32` they are
  those of MaxText, which are other numbers.

  Args:
    num_ids: number of different ids, which bounds the multipliers.
    rows_wanted: for each order, 2-grams first, the rows of each of its slots;
      the next primes are taken that no other slot of any layer has.
    heads: number of slots of each order.
    layers: numbers of the layers. Their order matters, because a later layer
      gets larger primes.
    seed: chooses the multipliers.
    hash_bits: 64 or 32, the width of the products.
  """
  dtype = {64: np.int64, 32: np.int32}[hash_bits]
  bound = max(1, int(np.iinfo(dtype).max) // num_ids // 2)
  all_moduli = primes.distinct([list(rows_wanted)] * len(layers), heads)
  hashes = []
  for layer, moduli in zip(layers, all_moduli, strict=True):
    generator = np.random.default_rng(seed + 10007 * layer)
    drawn = generator.integers(0, bound, len(rows_wanted) + 1, dtype=dtype)
    multipliers = tuple(2 * int(one) + 1 for one in drawn)
    hashes.append(MultiplyXor(multipliers, moduli))
  return tuple(hashes)


def longcat_hash(
  vocab_size: int, ratio: float, slots_per_ngram: int, max_ngram: int
) -> Polynomial:
  """Returns LongCat's hash: parts of about `ratio` vocabularies each.

  Source: arXiv 2601.21204; the sizes are int(ratio * vocab_size) + 2 slot + 1.
  """
  first = int(ratio * vocab_size) + 1
  return Polynomial(vocab_size, _rising(first, slots_per_ngram, max_ngram))


def over_encoding_hash(
  vocab_size: int, rows: int, slots_per_ngram: int, max_ngram: int
) -> Polynomial:
  """Returns Over-Encoding's hash: parts of `rows` + 2, `rows` + 4, and so on.

  Source: arXiv 2501.16975.
  """
  return Polynomial(vocab_size, _rising(rows + 2, slots_per_ngram, max_ngram))


def check_moduli(moduli: Moduli) -> None:
  """Raises ValueError unless there are n-grams and the table has int32 rows."""
  if not moduli or not all(moduli):
    raise ValueError(
      'N-grams must have at least two tokens and one slot for each order, but '
      f'the rows of their slots are {moduli}. Give rows_wanted for 2-grams at '
      'least, and heads of at least 1.'
    )
  smallest = min(itertools.chain(*moduli))
  total = offsets(moduli)[-1]
  if smallest < 1 or total >= 2**31:
    raise ValueError(
      'A table of n-grams must have at least one row for each slot and fewer '
      f'than 2^31 in all, but the smallest slot has {smallest:,} and all have '
      f'{total:,}. Change the rows or the number of slots.'
    )


def _rising(first: int, slots_per_ngram: int, max_ngram: int) -> Moduli:
  """Parts of first, first + 2, first + 4, ... rows."""
  sizes = itertools.count(first, 2)
  return tuple(
    tuple(itertools.islice(sizes, slots_per_ngram))
    for _ in range(max_ngram - 1)
  )
