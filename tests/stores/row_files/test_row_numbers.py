"""Tests the hash table of row numbers against a dictionary."""

import numpy as np
import pytest

from mowe.stores.row_files import row_numbers


@pytest.mark.parametrize('most', [40, 5_000, 2**40])
def test_numbers_are_those_of_a_dictionary(most):
  rng = np.random.default_rng(most)
  numbers, expected = row_numbers.RowNumbers(), {}
  for size in (0, 1, 30, 3_000, 7, 2_000):
    rows = np.unique(rng.integers(0, most, size))
    rng.shuffle(rows)
    found = numbers.add(rows)
    for row in rows.tolist():
      expected.setdefault(row, len(expected))
    assert found.tolist() == [expected[row] for row in rows.tolist()]
    assert len(numbers) == len(expected)
    assert numbers.rows.tolist() == list(expected)
    asked = rng.integers(0, most, 500)
    assert numbers.find(asked).tolist() == [
      expected.get(row, -1) for row in asked.tolist()
    ]


def test_rows_that_collide_are_told_apart():
  numbers = row_numbers.RowNumbers()
  # Rows of one first place, which is that of 0: multiples of the inverse of the
  # multiplier begin at small products.
  inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
  rows = np.array([(i * inverse) % 2**63 for i in range(1, 60)], np.int64)
  rows = np.unique(rows)
  numbers.add(rows)
  assert numbers.find(rows).tolist() == list(range(len(rows)))
  assert numbers.find(rows + 1).tolist() == [-1] * len(rows)
