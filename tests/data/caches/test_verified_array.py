"""Tests that damage of a block is found when the block is read, and no other."""

import pathlib

import numpy as np
import pytest

from mowe.data.caches import verified_array

# Numbers of two bytes in a block, and in three blocks and a bit.
_OF_BLOCK = verified_array.BLOCK // 2
_LENGTH = 3 * _OF_BLOCK + 5


def _make(*damaged):
  array = np.arange(_LENGTH).astype(np.uint16)
  expected = verified_array.checksums(array)
  assert expected.shape == (4,) and expected.dtype == np.uint32
  for place in damaged:
    array[place] ^= 256
  return verified_array.VerifiedArray(
    array, expected, pathlib.Path('a.bin')
  ), array


@pytest.mark.parametrize(
  'part',
  [
    slice(0, 0),
    slice(_OF_BLOCK - 3, 2 * _OF_BLOCK + 1),
    slice(_LENGTH - 2, _LENGTH + 9),
    slice(None),
    np.array([[0, _LENGTH - 1], [_OF_BLOCK, 7]]),
    np.zeros((0, 2), int),
  ],
)
def test_parts_are_those_of_the_array(part):
  verified, array = _make()
  assert len(verified) == _LENGTH and verified.dtype == np.uint16
  for _ in range(2):
    np.testing.assert_array_equal(verified[part], array[part])
  np.testing.assert_array_equal(verified.whole(), array)


@pytest.mark.parametrize(
  'place, bytes_named',
  [
    (_OF_BLOCK, '65,536 to 131,072'),
    (2 * _OF_BLOCK - 1, '65,536 to 131,072'),
    (_LENGTH - 1, '196,608 to 196,618'),
  ],
)
def test_damage_is_found_where_it_is_read(place, bytes_named):
  verified, array = _make(place)
  # Other blocks can be read.
  np.testing.assert_array_equal(verified[:_OF_BLOCK], array[:_OF_BLOCK])
  verified[np.array([3, 2 * _OF_BLOCK])]
  for part in (slice(place, place + 1), np.array([5, place]), slice(None)):
    with pytest.raises(ValueError, match=f'a.bin .* bytes {bytes_named} have'):
      verified[part]


def test_an_empty_array_has_no_blocks():
  array = np.zeros(0, np.int64)
  expected = verified_array.checksums(array)
  assert expected.shape == (0,)
  verified = verified_array.VerifiedArray(array, expected, pathlib.Path('a'))
  assert len(verified.whole()) == 0
