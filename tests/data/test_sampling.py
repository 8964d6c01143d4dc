"""Tests that orders are permutations, and that mixtures have exact counts."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from mowe.data import sampling


@hypothesis.given(
  size=strategies.integers(1, 3000),
  seed=strategies.integers(0, 2**31),
  epoch=strategies.integers(0, 1000),
)
def test_permutation_is_a_bijection(size, seed, epoch):
  order = sampling.permute(np.arange(size), size, (seed, epoch))
  np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_a_part_of_a_permutation_is_that_part():
  whole = sampling.permute(np.arange(1000), 1000, (3, 1))
  part = sampling.permute(np.array([[7], [999]]), 1000, (3, 1))
  np.testing.assert_array_equal(part, [[whole[7]], [whole[999]]])
  assert int(sampling.permute(5, 1000, (3, 1))) == whole[5]


def test_epochs_and_seeds_give_other_orders_that_look_random():
  orders = [
    sampling.permute(np.arange(1000), 1000, key)
    for key in ((0, 0), (0, 1), (1, 0))
  ]
  for a, b in ((0, 1), (0, 2), (1, 2)):
    # Two random orders agree in one place on average.
    assert (orders[a] == orders[b]).sum() < 8
  for order in orders:
    correlation = np.corrcoef(order, np.arange(1000))[0, 1]
    neighbours = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 0.12 and abs(neighbours) < 0.12


def test_indices_outside_are_refused():
  with pytest.raises(ValueError, match='modulo the size'):
    sampling.permute(np.array([3]), 3, (0, 0))


@hypothesis.given(
  rates=strategies.lists(strategies.floats(0.01, 10), min_size=1, max_size=6),
  seed=strategies.integers(0, 1000),
  block=strategies.integers(0, 10**6),
)
@hypothesis.settings(max_examples=30)
def test_mixture_counts_are_exact_in_every_block(rates, seed, block):
  mixture = sampling.TaskMixture(rates, seed)
  numbers = block * sampling.BLOCK + np.arange(sampling.BLOCK)
  tasks, ranks = mixture.locate(numbers)
  counts = np.bincount(tasks, minlength=len(rates))
  np.testing.assert_array_equal(counts, mixture.counts)
  exact = np.array(rates) / sum(rates) * sampling.BLOCK
  assert (np.abs(counts - exact) < 1).all()
  for task, count in enumerate(counts):
    # Each number of an example within its task comes once, in order.
    expected = block * count + np.arange(count)
    np.testing.assert_array_equal(ranks[tasks == task], expected)


def test_mixture_by_hand():
  # The shares of 4096 are 4096 * (1, 2, 4) / 7 = 585.14, 1170.29, 2340.57. The
  # last task gets the one that remains after rounding down.
  mixture = sampling.TaskMixture([1, 2, 4], seed=0)
  assert mixture.counts.tolist() == [585, 1170, 2341]


def test_places_across_blocks_agree_with_each_block():
  mixture = sampling.TaskMixture([1, 3], seed=5)
  numbers = np.arange(4000, 9000)
  whole = mixture.locate(numbers)
  for part in np.split(numbers, 5):
    for expected, actual in zip(whole, mixture.locate(part), strict=True):
      np.testing.assert_array_equal(expected[part - 4000], actual)


@pytest.mark.parametrize('rates', [[], [1, 0], [1, -1], [1, float('nan')]])
def test_bad_rates_are_refused(rates):
  with pytest.raises(ValueError, match='must be positive'):
    sampling.TaskMixture(rates, 0)


def test_a_rate_too_low_for_a_block_is_refused():
  with pytest.raises(ValueError, match='Raise the lowest'):
    sampling.TaskMixture([1, 1e-5], 0)
