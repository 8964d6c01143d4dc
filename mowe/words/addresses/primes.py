"""Prime sizes of hash tables."""

from collections.abc import Sequence


def distinct(
  first_above: Sequence[Sequence[int]],
  tables: int,
) -> tuple[tuple[tuple[int, ...], ...], ...]:
  """Finds a prime for each table, no prime twice.

  Source: the demo of Engram. The search for each order of n-grams begins again
  at its own number of rows, and skips primes that are in use, so that later
  groups have larger tables.

  Args:
    first_above: of each group (a layer) the rows wanted, one for each order.
      Primes of an order are at least that large.
    tables: number of tables (heads) of each order.

  Returns:
    Of each group and each order the primes of its tables, rising.
  """
  used: set[int] = set()
  groups = []
  for wanted in first_above:
    orders = []
    for rows in wanted:
      candidate, found = rows - 1, []
      while len(found) < tables:
        candidate += 1
        if candidate not in used and is_prime(candidate):
          used.add(candidate)
          found.append(candidate)
      orders.append(tuple(found))
    groups.append(tuple(orders))
  return tuple(groups)


def next_prime(number: int) -> int:
  """Returns the smallest prime that is at least `number`."""
  while not is_prime(number):
    number += 1
  return number


def is_prime(number: int) -> bool:
  """Returns whether a number below 3.3e24 is prime, by Miller and Rabin.

  With the first 13 primes as bases the test is exact up to there: Sorenson and
  Webster, arXiv 1509.00864.
  """
  bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
  if number < 2:
    return False
  if any(number % base == 0 for base in bases):
    return number in bases
  odd, twos = number - 1, 0
  while odd % 2 == 0:
    odd, twos = odd // 2, twos + 1
  return all(_passes(number, base, odd, twos) for base in bases)


def _passes(number: int, base: int, odd: int, twos: int) -> bool:
  """Whether base^(odd 2^i) is -1 for some i < twos, or base^odd is 1."""
  power = pow(base, odd, number)
  if power in (1, number - 1):
    return True
  for _ in range(twos - 1):
    power = power * power % number
    if power == number - 1:
      return True
  return False
