"""Tests primes against division by all smaller numbers."""

import itertools

from mowe.words.addresses import primes


def test_is_prime_up_to_10000():
  sieve = [True] * 10_000
  sieve[:2] = [False, False]
  for number in range(2, 100):
    if sieve[number]:
      sieve[number**2 :: number] = [False] * len(sieve[number**2 :: number])
  assert [primes.is_prime(i) for i in range(10_000)] == sieve


def test_strong_pseudoprimes_are_not_prime():
  # The smallest composite numbers that pass for the first 4, 8 and 12 bases.
  for number in (
    3_215_031_751,
    341_550_071_728_321,
    318_665_857_834_031_151_167_461,
  ):
    assert not primes.is_prime(number)
  assert primes.is_prime(2**31 - 1)
  assert primes.is_prime(2**61 - 1)


def test_next_prime():
  assert [primes.next_prime(i) for i in (0, 3, 8, 32128)] == [2, 3, 11, 32141]


def test_no_prime_is_taken_twice():
  found = primes.distinct([(5, 3), (5, 3)], 3)
  assert found == (((5, 7, 11), (3, 13, 17)), ((19, 23, 29), (31, 37, 41)))
  flat = list(itertools.chain(*itertools.chain(*found)))
  assert len(set(flat)) == len(flat)
