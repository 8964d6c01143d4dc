"""Tests which blocks have experts, by hand."""

import pytest

from mowe.models import sparse_layers


@pytest.mark.parametrize(
  ('num_layers', 'n', 'expected'),
  [
    (12, 4, (3, 7, 11)),
    (6, 2, (1, 3, 5)),
    (3, 1, (0, 1, 2)),
    (5, 2, (1, 3)),
    (3, 3, (2,)),
  ],
)
def test_the_last_of_each_n(num_layers, n, expected):
  assert sparse_layers.every_nth(num_layers, n) == expected


@pytest.mark.parametrize('n', [0, 4])
def test_no_block_at_all_is_refused(n):
  with pytest.raises(ValueError, match=f'blocks, 3, but is {n}. 1 makes'):
    sparse_layers.every_nth(3, n)
