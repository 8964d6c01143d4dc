"""Tests banks: rows are allotted by widths, and padded to the widest bank.

Also tests `bank_widths`.
"""

import numpy as np
import pytest

from mowe.words.addresses import bank_address, bank_widths, piece_address

_PIECES = piece_address.Pieces(4)


def test_banks_are_consecutive_rows():
  banks = bank_address.Banks(_PIECES, (2, 1, 3, 1))
  assert (banks.num_slots, banks.num_rows) == (3, 7)
  tokens = np.array([[3, 2, 1, 0]], np.int32)
  np.testing.assert_array_equal(
    banks.encoder_rows(tokens)[0],
    [[6, -1, -1], [3, 4, 5], [2, -1, -1], [-1, -1, -1]],
  )


def test_equal_widths_are_one_number():
  one, each = (
    bank_address.Banks(_PIECES, widths) for widths in (3, (3, 3, 3, 3))
  )
  assert one.fingerprint == each.fingerprint
  tokens = np.array([[1, 2]], np.int32)
  np.testing.assert_array_equal(
    one.decoder_rows(tokens)[0], [[3, 4, 5], [6, 7, 8]]
  )


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='for each row of their address, 4, but'):
    bank_address.Banks(_PIECES, (1, 2))
  with pytest.raises(ValueError, match='the narrowest has 0'):
    bank_address.Banks(_PIECES, (1, 0, 2, 2))
  with pytest.raises(ValueError, match='there are 3 rows for 4 banks'):
    bank_widths.share_rows({}, 4, 3, 2)


def test_frequent_ends_get_wide_banks():
  # An id that follows many others has many codewords that end in it.
  rng = np.random.default_rng(0)
  texts = [
    [2 if i % 2 else int(one) for i, one in enumerate(rng.integers(3, 40, 60))]
    for _ in range(50)
  ]
  counts = bank_widths.count_codewords(texts, 40)
  widths = bank_widths.share_rows(counts, 40, 120, 16)
  assert sum(widths) == 120 and widths[2] == max(widths) == 16
  assert widths[0] == widths[1] == 1
