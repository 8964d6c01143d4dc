"""Tests the look-up of words in tokens against a plain loop."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mowe.words import base_vocabulary, lookup

BATCH, LENGTH = 3, 11

# The vocabulary has 12 ids: padding, EOS and unknown; then pieces that start
# and continue words, and punctuation; and two sentinels at the end.
KINDS = np.array([3, 3, 2, 1, 1, 1, 0, 0, 0, 2, 3, 3], np.uint8)
WORDS = [(3,), (3, 6), (4, 7, 7), (6, 8), (8,), (5, 6, 7, 8, 6)]


def make_tables(words=WORDS, kinds=KINDS, num_experts=5):
  hashes = lookup.hash_pieces(len(kinds))
  offsets = np.concatenate([[0], np.cumsum([len(word) for word in words])])
  pieces = np.array([piece for word in words for piece in word])
  keys = lookup.hash_words(hashes, pieces, offsets)
  order = np.argsort(keys)
  keys, key_word_ids, bucket_starts, num_probes = lookup.index_keys(
    keys[order], order.astype(np.int32)
  )
  num_words = len(words) + len(kinds)
  piece_word_ids = len(words) + np.arange(len(kinds), dtype=np.int32)
  piece_word_ids[kinds == base_vocabulary.SPECIAL] = num_words
  experts = np.arange(num_words + 1, dtype=np.int32) % num_experts
  experts[[0, -1]] = num_experts
  return lookup.LookupTables(
    piece_kinds=kinds,
    piece_hashes=hashes,
    piece_word_ids=piece_word_ids,
    keys=keys,
    key_word_ids=key_word_ids,
    bucket_starts=bucket_starts,
    experts=experts,
    num_probes=num_probes,
    num_experts=num_experts,
  )


TABLES = make_tables()


def plain_words(row, segments, whole):
  """The rule of whole words as a plain loop, with words as tuples."""
  words = []  # Each word is a list of its pieces.
  for i, piece in enumerate(row):
    continues = (
      i > 0
      and KINDS[piece] == base_vocabulary.CONTINUES
      and KINDS[row[i - 1]]
      in (base_vocabulary.CONTINUES, base_vocabulary.STARTS)
      and segments[i] == segments[i - 1]
    )
    if not continues:
      words.append([])
    words[-1].append(piece)
  expected = []
  for word in words:
    for i, piece in enumerate(word):
      key = tuple(word if whole else word[: i + 1])
      if key in WORDS:
        expected.append(WORDS.index(key))
      else:
        expected.append(int(TABLES.piece_word_ids[piece]))
  return expected


@jax.jit
def jax_words(arrays, tokens, segment_ids):
  tables = dataclasses.replace(TABLES, **arrays)
  return (
    lookup.whole_words(tables, tokens, segment_ids),
    lookup.words_so_far(tables, tokens, segment_ids),
  )


@jax.jit
def jax_step(arrays, tokens, state):
  return lookup.next_word_so_far(
    dataclasses.replace(TABLES, **arrays), tokens, state
  )


# Most ids start or continue words, or long words would be rare.
tokens_strategy = st.lists(
  st.sampled_from(list(range(12)) + [3, 4, 5, 6, 6, 7, 7, 8, 8]),
  min_size=BATCH * LENGTH,
  max_size=BATCH * LENGTH,
).map(lambda ids: np.array(ids, np.int32).reshape(BATCH, LENGTH))
segments_strategy = st.lists(
  st.booleans(), min_size=BATCH * LENGTH, max_size=BATCH * LENGTH
).map(lambda new: 1 + np.cumsum(np.reshape(new, (BATCH, LENGTH)), 1, np.int32))
quick = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


def test_by_hand():
  # The tokens are padding | 3 6 | 4 7, no word, so its pieces are routed | '.'
  # | 6 8 | EOS | 8 | sentinel | padding.
  tokens = np.array([[0, 3, 6, 4, 7, 9, 6, 8, 1, 8, 11, 0]])
  whole = lookup.whole_words(TABLES, tokens)
  # A piece has the id 6 + its number. Special ones have 18, the number of
  # words.
  assert whole.tolist() == [[18, 1, 1, 10, 13, 15, 3, 3, 18, 4, 18, 18]]
  so_far = lookup.words_so_far(TABLES, tokens)
  # For prefixes, 3 is word 0. The 6 of `6 8` is no word and backs off to 12.
  assert so_far.tolist() == [[18, 0, 1, 10, 13, 15, 12, 3, 18, 4, 18, 18]]
  experts = lookup.to_experts(TABLES, tokens, whole)
  # Experts are id % 5, padding is -1, and special ids and the skipped word 0
  # have 5.
  assert experts.tolist() == [[-1, 1, 1, 0, 3, 0, 3, 3, 5, 4, 5, -1]]
  assert experts.dtype == np.int32
  skipped = lookup.to_experts(TABLES, np.array([[3]]), np.array([[0]]))
  assert skipped.tolist() == [[5]]


def test_hash_words_follows_the_formula():
  hashes = lookup.hash_pieces(len(KINDS))
  assert lookup._MULTIPLIER % 8 == 5
  expected = 0
  for piece in (5, 6, 7):
    expected = (expected * lookup._MULTIPLIER + int(hashes[piece])) % 2**32
  pieces, offsets = np.array([4, 5, 6, 7]), np.array([0, 1, 4])
  found = lookup.hash_words(hashes, pieces, offsets)
  assert found.tolist() == [int(hashes[4]), expected]


@quick
@hypothesis.given(tokens_strategy, segments_strategy)
def test_equals_a_plain_loop_in_numpy_and_jax(tokens, segments):
  for whole, function, found in zip(
    (True, False),
    (lookup.whole_words, lookup.words_so_far),
    jax_words(TABLES.arrays(), tokens, segments),
    strict=True,
  ):
    expected = [
      plain_words(row, row_segments, whole)
      for row, row_segments in zip(
        tokens.tolist(), segments.tolist(), strict=True
      )
    ]
    actual = function(TABLES, tokens, segments)
    assert actual.tolist() == expected
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(found, actual)
    assert found.dtype == jnp.int32


@quick
@hypothesis.given(tokens_strategy)
def test_steps_equal_words_so_far(tokens):
  expected = lookup.words_so_far(TABLES, tokens)
  state = jax_state = np.zeros((BATCH, 2), np.uint32)
  for i in range(LENGTH):
    column = tokens[:, i : i + 1]
    word_ids, state = lookup.next_word_so_far(TABLES, column, state)
    np.testing.assert_array_equal(word_ids, expected[:, i : i + 1])
    jax_ids, jax_state = jax_step(TABLES.arrays(), column, jax_state)
    np.testing.assert_array_equal(jax_ids, word_ids)
    np.testing.assert_array_equal(jax_state, state)
    assert state.dtype == np.uint32


@quick
@hypothesis.given(tokens_strategy, st.integers(1, LENGTH - 1))
def test_packing_equals_separate_rows(tokens, cut):
  segments = np.ones_like(tokens)
  segments[:, cut:] = 2
  for function in (lookup.whole_words, lookup.words_so_far):
    first = function(TABLES, tokens[:, :cut])
    second = function(TABLES, tokens[:, cut:])
    np.testing.assert_array_equal(
      function(TABLES, tokens, segments),
      np.concatenate([first, second], axis=1),
    )


@quick
@hypothesis.given(tokens_strategy, tokens_strategy, st.integers(1, LENGTH - 1))
def test_later_tokens_change_no_earlier_word_so_far(tokens, others, cut):
  changed = np.concatenate([tokens[:, :cut], others[:, cut:]], axis=1)
  np.testing.assert_array_equal(
    lookup.words_so_far(TABLES, tokens)[:, :cut],
    lookup.words_so_far(TABLES, changed)[:, :cut],
  )


def test_float_tokens_and_ids_beyond_the_vocabulary():
  tokens = np.array([[3, 6, 99, 6, -1]])
  whole = lookup.whole_words(TABLES, tokens.astype(np.float32))
  # The id 99 counts as the last id, a sentinel, and -1 counts as padding.
  assert whole.tolist() == [[1, 1, 18, 12, 18]]
  assert lookup.to_experts(TABLES, tokens, whole).tolist() == [[1, 1, 5, 2, -1]]
  found = jax.jit(lambda tokens: lookup.whole_words(TABLES, tokens))(tokens)
  np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize('num_keys', [0, 1, 2, 100, 5000])
def test_every_key_is_found_and_nothing_else(num_keys):
  rng = np.random.default_rng(num_keys)
  # The keys crowd at both ends, so that there are large buckets, the largest
  # hash, and a first bucket that is not empty.
  keys = rng.integers(0, 2**32, num_keys, dtype=np.uint64)
  keys[num_keys // 2 :] >>= 20
  keys = np.unique(np.append(keys, [2**32 - 1] * (num_keys > 1)))
  keys = keys.astype(np.uint32)
  ids = np.arange(len(keys), dtype=np.int32)
  padded, padded_ids, bucket_starts, num_probes = lookup.index_keys(keys, ids)
  tables = dataclasses.replace(
    TABLES,
    keys=padded,
    key_word_ids=padded_ids,
    bucket_starts=bucket_starts,
    num_probes=num_probes,
  )
  others = np.setdiff1d(
    np.concatenate([keys + 1, keys - 1, [0, 2**32 - 1]]).astype(np.uint32), keys
  )
  token = np.array([[3]], np.int32)
  back_off = int(TABLES.piece_word_ids[3])
  hashes = np.concatenate([keys, others])[None, :]
  tokens = np.broadcast_to(token, hashes.shape)
  expected = ids.tolist() + [back_off] * len(others)
  assert lookup._find(tables, hashes, tokens)[0].tolist() == expected


def test_a_long_row():
  # In a long row the sums of the prefix trick overflow many times.
  tokens = np.full((1, 3000), 7, np.int32)
  tokens[0, 2000:2005] = [5, 6, 7, 8, 6]
  tokens[0, 2005] = 9
  assert (lookup.whole_words(TABLES, tokens)[0, 2000:2005] == 5).all()


def test_tokens_without_a_batch_are_refused():
  with pytest.raises(
    ValueError, match=r'have \(4,\)\. Give one text as tokens'
  ):
    lookup.whole_words(TABLES, np.zeros(4, np.int32))
