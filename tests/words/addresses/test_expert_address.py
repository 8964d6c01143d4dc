"""Tests experts that are named by the rows of an address."""

import numpy as np
import pytest

from mowe.words.addresses import (
  expert_address,
  hashed_ngrams,
  ngram_hashes,
  piece_address,
)

_VOCAB = 40


def _bigrams(rows, heads=1):
  (hashed,) = ngram_hashes.engram_hashes(_VOCAB, [rows], heads)
  return hashed_ngrams.HashedNGrams(hashed)


def test_experts_are_the_rows_of_the_address():
  address = _bigrams(50)
  names = expert_address.ExpertAddress(address, 64)
  tokens = np.array([[3, 9, 9, 0], [5, 3, 9, 7]], np.int32)
  segments = np.array([[1, 1, 2, 0], [1, 1, 1, 1]], np.int32)
  rows = address.encoder_rows(tokens, segments)[..., 0]
  np.testing.assert_array_equal(names.encoder_ids(tokens, segments), rows)
  np.testing.assert_array_equal(names.decoder_ids(tokens, segments), rows)
  assert rows.shape == tokens.shape
  assert rows[0, 3] == -1 and rows[0, 1] != rows[0, 2]
  # The second 9 of the first row begins a text, so that it is no 2-gram 9 9.
  state, found = names.initial_state(2), []
  for column in tokens.T:
    ids, state = names.decoder_step(column[:, None], state)
    found.append(ids[:, 0])
  np.testing.assert_array_equal(
    np.stack(found, axis=1), names.decoder_ids(tokens)
  )


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='must name one row .* has 2 slots'):
    expert_address.ExpertAddress(_bigrams(50, heads=2), 500)
  pieces = piece_address.Pieces(_VOCAB)
  message = 'at least as many as its rows, 40, but num_experts is 39'
  with pytest.raises(ValueError, match=message):
    expert_address.ExpertAddress(pieces, 39)
