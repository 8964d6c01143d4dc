"""Tests blocks of experts: equal counts, even loads, also for fewer devices."""

import dataclasses

import numpy as np
import pytest

from mowe.words import placement, routing_vocabulary


def _zipf(num_experts, num_words=3000, num_skipped=16):
  counts = 1e6 / np.arange(1, num_words + 1)
  counts[:num_skipped] = 0
  experts = np.arange(num_words) % num_experts
  return np.bincount(experts, weights=counts, minlength=num_experts)


def _placed(loads, num_blocks):
  numbers = placement.place_experts(loads, num_blocks)
  assert numbers.dtype == np.int32
  assert sorted(numbers.tolist()) == list(range(len(loads)))
  placed = np.empty(len(loads))
  placed[numbers] = loads
  return placed


def test_by_hand():
  # The heaviest are placed first: 9 | 7, then 5 and 4 go to the lighter block:
  # 9 4 | 7 5. The 1 then fills the second block and the 0 goes to the first:
  # {9, 4, 0} and {7, 5, 1}.
  loads = np.array([1, 9, 0, 5, 7, 4])
  numbers = placement.place_experts(loads, 2)
  # The old experts 1, 2 and 5 come first in their order, then 0, 3 and 4.
  assert numbers.tolist() == [3, 0, 1, 4, 5, 2]
  balance = placement.balance(_placed(loads, 2), 2)
  assert balance == placement.Balance(2, 1.0, ())


def test_one_block_changes_nothing():
  loads = np.array([1, 9, 0, 5])
  assert placement.place_experts(loads, 1).tolist() == [0, 1, 2, 3]


def test_one_placement_serves_all_divisors():
  loads = _zipf(2048)
  placed = _placed(loads, 32)
  for num_blocks in (2, 4, 8, 16, 32):
    even = placement.balance(placed, num_blocks)
    assert even.max_over_mean < 1.02
    # In the order of frequency the loads would be far from even.
    in_order = placement.balance(loads, num_blocks)
    assert in_order.max_over_mean > 1.4


def test_blocks_of_a_number_that_is_not_a_power_of_two():
  placed = _placed(_zipf(2160), 24)
  for num_blocks in (2, 3, 4, 6, 8, 12, 24):
    assert placement.balance(placed, num_blocks).max_over_mean < 1.02


def test_light_experts_gather_around_a_heavy_one():
  # Half of all tokens belong to one expert, so 2 blocks can be even and 4
  # cannot.
  loads = np.array([31, 1] + [2] * 15 + [0] * 23)
  placed = _placed(loads, 4)
  assert placement.balance(placed, 2).max_over_mean == 1.0
  balance = placement.balance(placed, 4)
  assert balance.max_over_mean == pytest.approx(31 / (62 / 4))
  assert len(balance.hot_experts) == 1
  assert placed[balance.hot_experts[0]] == 31


def test_nothing_seen_is_even():
  assert placement.balance(np.zeros(6), 3).max_over_mean == 1.0


@pytest.mark.parametrize('num_blocks', [0, 4])
def test_blocks_must_divide_the_experts(num_blocks):
  with pytest.raises(
    ValueError, match=f'num_experts = 6, but is {num_blocks}. Change one'
  ):
    placement.place_experts(np.ones(6), num_blocks)


def test_a_vocabulary_keeps_its_words_together(routing, tmp_path):
  routing = routing.with_experts(8, num_skipped=2)
  placed = placement.in_blocks(routing, 4)
  # Experts are only renumbered: the same words share one, and as many have
  # none.
  pairs = set(
    zip(routing.experts.tolist(), placed.experts.tolist(), strict=True)
  )
  assert len(pairs) == 9 and (8, 8) in pairs
  assert placed.experts.dtype == np.int32
  before, after = (
    placement.balance(one.loads().shares, 4).max_over_mean
    for one in (routing, placed)
  )
  assert after < before
  placed.save(tmp_path / 'placed.npz')
  loaded = routing_vocabulary.load(tmp_path / 'placed.npz')
  np.testing.assert_array_equal(loaded.experts, placed.experts)
  assert placement.in_blocks(routing, 1).sha256 == routing.sha256


def test_hot_words_are_named(routing):
  counts = np.ones_like(routing.counts)
  counts[:3] = 0, 1000, 600
  # Word 0 has no expert. Words 1 and 2 have experts 1 and 2 nearly to
  # themselves.
  routing = dataclasses.replace(routing, counts=counts)
  routing = routing.with_experts(8, num_skipped=1)
  assert placement.describe_hot_words(routing, 1) == ''
  text = placement.describe_hot_words(routing, 4)
  assert 'average, 25.0% for 4 blocks' in text
  assert f'{routing.word(1)!r} (expert 1) has' in text
  assert f'of {routing.word(2)!r} (expert 2) has' in text
  assert '--num_skipped' in text
  # With two blocks only the busiest word is hot.
  assert repr(routing.word(2)) not in placement.describe_hot_words(routing, 2)
