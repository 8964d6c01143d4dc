"""What must hold for every address, whatever names its rows.

Also tests `hashed_ngrams`, `ngram_hashes`, `piece_address`, `word_address`, and
`word_ngrams`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.words import base_vocabulary, lookup
from mowe.words.addresses import (
  bank_address,
  compressed_vocabulary,
  hashed_ngrams,
  ngram_hashes,
  piece_address,
  word_address,
  word_ngrams,
)

BATCH, LENGTH = 3, 17
NAMES = [
  'pieces', 'words', 'word_ngrams', 'engram', 'longcat', 'eos', 'banks',
]  # fmt: skip


@pytest.fixture(scope='module')
def addresses(tiny, routing):
  compressed = compressed_vocabulary.of_vocabulary(tiny)
  (engram,) = ngram_hashes.engram_hashes(max(compressed) + 1, [50, 40], 2)
  (of_words,) = ngram_hashes.engram_hashes(
    word_ngrams.num_ids(routing), [60, 70], 3
  )
  longcat = ngram_hashes.longcat_hash(tiny.size, 1.5, 2, 4)
  return {
    'pieces': piece_address.Pieces(tiny.size),
    'words': word_address.Words(routing),
    'word_ngrams': word_ngrams.WordNGrams(routing, of_words),
    'engram': hashed_ngrams.HashedNGrams(engram, compressed),
    'longcat': hashed_ngrams.HashedNGrams(longcat),
    'banks': bank_address.Banks(word_ngrams.WordNGrams(routing, of_words), 3),
    'eos': hashed_ngrams.HashedNGrams(
      longcat, compressed, eos_id=base_vocabulary.EOS_ID
    ),
  }


@pytest.fixture(params=NAMES)
def address(request, addresses):
  return addresses[request.param]


@pytest.fixture
def tokens(tiny, texts):
  rows = [tiny.encode(text)[:LENGTH] for text in texts[:BATCH]]
  # One row ends before the others, and one has two texts.
  rows[0] = [*rows[0][:9], base_vocabulary.EOS_ID]
  rows[1][8] = base_vocabulary.EOS_ID
  found = np.zeros((BATCH, LENGTH), np.int32)
  for row, ids in zip(found, rows, strict=True):
    row[: len(ids)] = ids
  return found


@pytest.mark.parametrize('method', ['encoder_rows', 'decoder_rows'])
def test_rows_are_in_the_table(address, tokens, method):
  rows = getattr(address, method)(tokens)
  assert rows.shape == (BATCH, LENGTH, address.num_slots)
  assert rows.dtype == np.int32
  is_padding = tokens == base_vocabulary.PAD_ID
  assert (rows[is_padding] == -1).all()
  assert (rows[~is_padding] >= 0).all()
  assert rows.max() < address.num_rows


@pytest.mark.parametrize('method', ['encoder_rows', 'decoder_rows'])
def test_jax_gives_the_rows_of_numpy(address, tokens, method):
  segments = np.cumsum(tokens == base_vocabulary.EOS_ID, axis=1, dtype=np.int32)
  function = getattr(address, method)
  found = jax.jit(function)(jnp.asarray(tokens), jnp.asarray(segments))
  np.testing.assert_array_equal(found, function(tokens, segments))


def test_decoder_does_not_look_ahead(address, tokens):
  rows = address.decoder_rows(tokens)
  for place in range(1, LENGTH):
    changed = tokens.copy()
    changed[:, place:] = changed[:, place:][:, ::-1] + 1
    found = address.decoder_rows(changed)
    np.testing.assert_array_equal(found[:, :place], rows[:, :place])


def test_steps_give_the_rows_of_all_tokens(address, tokens):
  # A decoder begins with padding, and goes on with it after the end.
  tokens = np.concatenate([np.zeros_like(tokens[:, :1]), tokens], axis=1)
  expected = address.decoder_rows(tokens)
  step = jax.jit(address.decoder_step)
  state = jnp.asarray(address.initial_state(BATCH))
  kind = state.dtype, state.shape
  for place in range(tokens.shape[1]):
    found, state = step(tokens[:, place : place + 1], state)
    assert (state.dtype, state.shape) == kind
    np.testing.assert_array_equal(found[:, 0], expected[:, place])


@pytest.mark.parametrize('method', ['encoder_rows', 'decoder_rows'])
def test_texts_of_a_packed_row_do_not_meet(address, tokens, method):
  function = getattr(address, method)
  first, second = tokens[1, :8], tokens[2]
  packed = np.concatenate([first, second])[None]
  segments = np.repeat([[1, 2]], [len(first), len(second)], axis=1)
  found = function(packed, segments.astype(np.int32))[0]
  np.testing.assert_array_equal(found[: len(first)], function(first[None])[0])
  np.testing.assert_array_equal(found[len(first) :], function(second[None])[0])


def test_padding_before_a_text_changes_nothing(address, tokens):
  padded = np.pad(tokens, ((0, 0), (4, 0)))
  found = address.decoder_rows(padded)
  np.testing.assert_array_equal(found[:, 4:], address.decoder_rows(tokens))


@pytest.mark.parametrize('length', [1, 2])
def test_texts_shorter_than_an_ngram(address, tokens, length):
  found = address.decoder_rows(tokens[:, :length])
  expected = address.decoder_rows(tokens)[:, :length]
  np.testing.assert_array_equal(found, expected)


def test_floats_of_t5x_are_ids(address, tokens):
  found = address.decoder_rows(tokens.astype(np.float32))
  np.testing.assert_array_equal(found, address.decoder_rows(tokens))


def test_other_shapes_are_refused(address):
  with pytest.raises(ValueError, match=r'shape \[batch, length\]'):
    address.decoder_rows(np.ones(4, np.int32))


def test_an_address_has_a_fingerprint(addresses):
  assert len({one.fingerprint for one in addresses.values()}) == len(NAMES)
  again = dataclasses.replace(addresses['engram'])
  assert again.fingerprint == addresses['engram'].fingerprint


def test_each_constant_is_in_the_fingerprint(addresses, routing):
  engram, of_words = addresses['engram'], addresses['word_ngrams']
  hash_ = engram.hash
  factors = hash_.multipliers
  others = [
    dataclasses.replace(engram, compressed=None),
    dataclasses.replace(engram, compressed=engram.compressed[::-1]),
    dataclasses.replace(engram, start_id=3),
    dataclasses.replace(engram, eos_id=1),
    dataclasses.replace(
      engram, hash=dataclasses.replace(hash_, multipliers=factors[::-1])
    ),
    dataclasses.replace(
      engram, hash=dataclasses.replace(hash_, moduli=hash_.moduli[::-1])
    ),
    dataclasses.replace(of_words, routing=routing.with_experts(5)),
    of_words,
  ]
  found = {one.fingerprint for one in [engram, *others]}
  assert len(found) == len(others) + 1


def test_words_before_are_those_of_the_text(routing, tiny):
  """The rows of a word follow from its entry and those before it."""
  address = word_ngrams.WordNGrams(
    routing,
    ngram_hashes.Polynomial(1000, ((10**6,), (10**9,))),
  )
  ids = np.array([tiny.encode('the old town of Karlsburg')], np.int32)
  words = [tiny.encode(w) for w in 'the old town of Karlsburg'.split()]
  assert sum(words, []) == ids[0].tolist()
  # The entries of each word alone; those of unknown words are of pieces.
  entries = [
    lookup.whole_words(routing.tables, np.array([word], np.int32))[0].tolist()
    for word in words
  ]
  start = routing.num_words + 1
  expected = []
  for i in range(len(words)):
    last = [entry[-1] for entry in entries[:i]]
    first, second = [start, start, *last][-1:-3:-1]
    for now in entries[i]:
      pair = now + 1000 * first
      expected.append([pair, 10**6 + (pair + 10**6 * second) % 10**9])
  assert address.encoder_rows(ids)[0].tolist() == expected


def test_bad_hashes_are_refused():
  with pytest.raises(ValueError, match='a multiplier for each id'):
    ngram_hashes.MultiplyXor((3, 5), ((7,), (11,)))
  with pytest.raises(ValueError, match='at least two tokens'):
    ngram_hashes.MultiplyXor((3,), ())
  with pytest.raises(ValueError, match='at least two tokens'):
    ngram_hashes.engram_hashes(10, [5], 0)
  with pytest.raises(ValueError, match=r'fewer than 2\^31'):
    ngram_hashes.over_encoding_hash(11, 2**30, 2, 2)


def test_other_subword_vocabularies_are_refused(addresses, tiny, t5_vocabulary):
  for name in ('pieces', 'words', 'word_ngrams', 'engram'):
    addresses[name].check_subwords(tiny)
    with pytest.raises(ValueError, match='subword vocabulary'):
      addresses[name].check_subwords(t5_vocabulary)


def test_published_sizes():
  # Engram 27B has two layers with 5.79e9 numbers in all, in rows of 80.
  hashes = ngram_hashes.engram_hashes(99_092, [2_262_400] * 2, 8, (1, 14))
  rows = [ngram_hashes.offsets(one.moduli)[-1] for one in hashes]
  assert round(sum(rows) * 80 / 1e9, 2) == 5.79
  longcat = ngram_hashes.longcat_hash(131_072, 78.0, 4, 4)
  assert longcat.moduli[0][0] == 10_223_617
  over_encoding = ngram_hashes.over_encoding_hash(50_280, 12_800_000, 2, 3)
  assert over_encoding.moduli[1] == (12_800_006, 12_800_008)
