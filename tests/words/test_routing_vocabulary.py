"""Tests files of routing vocabularies: the same bits, or a named damage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.words import (
  byte_vocabulary,
  routing_vocabulary,
  subword_vocabularies,
  vocabulary_builder,
)


def test_round_trip(routing, tmp_path):
  path = tmp_path / 'deep' / 'words.npz'
  routing.save(path)
  copy = routing_vocabulary.load(path)
  assert copy.sha256 == routing.sha256
  for field in dataclasses.fields(routing):
    np.testing.assert_array_equal(
      getattr(copy, field.name), getattr(routing, field.name), strict=True
    )
  again = tmp_path / 'again.npz'
  copy.save(again)
  assert again.read_bytes() == path.read_bytes()
  assert [file.name for file in path.parent.iterdir()] == ['words.npz']


@pytest.mark.parametrize('share', [0.02, 0.2, 0.4, 0.6, 0.8, 0.95, 0.999])
def test_a_flipped_bit_is_noticed(routing, tmp_path, share):
  path = tmp_path / 'words.npz'
  routing.save(path)
  content = bytearray(path.read_bytes())
  content[int(share * len(content))] ^= 4
  path.write_bytes(content)
  try:
    loaded = routing_vocabulary.load(path)
  except ValueError as error:
    assert 'damaged' in str(error)
    assert 'build_routing_vocabulary' in str(error)
  else:
    # Only padding or a date of the zip has changed, so the content is whole.
    assert loaded.sha256 == routing.sha256


def test_a_cut_file_is_noticed(routing, tmp_path):
  path = tmp_path / 'words.npz'
  routing.save(path)
  content = path.read_bytes()
  for length in (0, 10, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:length])
    with pytest.raises(ValueError, match='damaged or is not one.*Copy the'):
      routing_vocabulary.load(path)


def test_a_changed_array_is_noticed(routing, tmp_path):
  path = tmp_path / 'words.npz'
  routing.save(path)
  with np.load(path) as file:
    arrays = dict(file)
  arrays['experts'][3] += 1
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match='damaged: its content has sha256'):
    routing_vocabulary.load(path)


def test_other_files(tmp_path):
  with pytest.raises(FileNotFoundError, match='no file at .*Give another'):
    routing_vocabulary.load(tmp_path / 'absent.npz')
  path = tmp_path / 'other.npz'
  np.savez(path, weights=np.zeros(3))
  with pytest.raises(ValueError, match='is not one: .*header'):
    routing_vocabulary.load(path)
  header = np.frombuffer(b'{"format": "x"}', np.uint8)
  np.savez(path, header=header)
  with pytest.raises(ValueError, match='header names another format'):
    routing_vocabulary.load(path)
  header = b'{"format": "mowe routing vocabulary", "version": 99}'
  np.savez(path, header=np.frombuffer(header, np.uint8))
  with pytest.raises(ValueError, match='version 1, but .* of version 99'):
    routing_vocabulary.load(path)


def test_other_subwords_and_experts_are_refused(routing, tiny, model_path):
  routing.check_subwords(tiny)
  routing.check_num_experts(7)
  other = byte_vocabulary.ByteVocabulary()
  with pytest.raises(ValueError) as error:
    routing.check_subwords(other)
  assert tiny.sha256 in str(error.value)
  assert other.sha256 in str(error.value)
  assert 'build the routing vocabulary again' in str(error.value)
  fewer = subword_vocabularies.load_subwords(model_path, extra_ids=9)
  with pytest.raises(ValueError, match='100 ids, .* with 99 ids is in use'):
    routing.check_subwords(fewer)
  with pytest.raises(ValueError, match=r'7, but has 8.*with_experts\(8\)'):
    routing.check_num_experts(8)


def test_entries_are_in_order(routing):
  assert (np.diff(routing.counts) <= 0).all()
  words = [
    routing.word(i) for i in range(routing.num_words) if not routing.is_piece[i]
  ]
  assert len(words) == 20
  assert {'the', 'zorblat', 'karlsburg', 'dog'} <= set(words)
  # Each piece has an entry, except for the 12 special ones: 2 and 10 sentinels.
  assert routing.is_piece.sum() == 100 - 12
  assert (routing.piece_word_ids == routing.num_words).sum() == 12
  with pytest.raises(ValueError, match='A word id must be in'):
    routing.word(routing.num_words)


def test_spellings_share_an_entry(routing, tiny):
  found = set()
  for text in ('zorblat', 'Zorblat', 'ZORBLAT', '(Zorblat).', '"Zorblat!"'):
    rows = routing.explain(text, tiny)
    found |= {row.word_id for row in rows if row.word == 'zorblat'}
  assert len(found) == 1
  assert routing.word(found.pop()) == 'zorblat'


def test_encoder_decoder_and_steps_agree(routing, tiny):
  text = 'The (Zorblat) met a zorblatter.'
  ids = [0, *tiny.encode(text), 1, tiny.sentinel_id(0), 0, 0]
  tokens = np.array([ids, ids[::-1]], np.int32)
  encoder = routing.encoder_ids(tokens)
  decoder = routing.decoder_ids(tokens)
  assert encoder.shape == decoder.shape == tokens.shape
  assert ((encoder == -1) == (tokens == 0)).all()
  assert (encoder[tokens >= 90] == 7).all()
  np.testing.assert_array_equal(
    jax.jit(routing.encoder_ids)(jnp.asarray(tokens)), encoder
  )
  np.testing.assert_array_equal(
    jax.jit(routing.decoder_ids)(jnp.asarray(tokens)), decoder
  )
  state = routing.initial_state(2)
  for i in range(tokens.shape[1]):
    step, state = routing.decoder_step(tokens[:, i : i + 1], state)
    np.testing.assert_array_equal(step, decoder[:, i : i + 1])


def test_loads_are_those_of_the_counted_text(routing, tiny, texts):
  text_ids = [tiny.encode(text) for text in texts]
  counted = np.zeros(8, np.int64)
  for ids in text_ids:
    routed = routing.encoder_ids(np.array([ids]))[0]
    counted += np.bincount(routed, minlength=8)
  loads = routing.loads()
  shares = counted / counted.sum()
  np.testing.assert_allclose(loads.shares, shares[:7])
  np.testing.assert_allclose(loads.without_expert, shares[7])
  np.testing.assert_allclose(
    loads.max_over_mean, shares[:7].max() / shares[:7].mean()
  )


def test_assignments_by_hand():
  loads = np.array([9, 6, 5, 4, 3, 0])
  skipped = np.array([True, False, False, False, False, False])
  by_hash = routing_vocabulary.assign_by_hash(loads, 2, skipped)
  assert by_hash.tolist() == [2, 1, 0, 1, 0, 1]
  # The loads 6, 5, 4 and 3 go to experts 0, 1, 1 and 0, which makes 9 for each.
  # The entry that never occurs goes to the first expert.
  balanced = routing_vocabulary.assign_balanced(loads, 2, skipped)
  assert balanced.tolist() == [2, 0, 1, 1, 0, 0]
  assert balanced.dtype == by_hash.dtype == np.int32


def test_unseen_entries_are_spread_out():
  loads = np.array([5] + [0] * 999)
  experts = routing_vocabulary.assign_balanced(loads, 10, loads < 0)
  assert np.bincount(experts).tolist() == [1] + [111] * 9


def test_with_experts(routing):
  balanced = routing.with_experts(
    5, assign=routing_vocabulary.assign_balanced, num_skipped=0
  )
  assert balanced.num_experts == 5
  assert balanced.tables.num_experts == 5
  assert balanced.sha256 != routing.sha256
  assert (balanced.experts[:-1] < 5).all()
  hashed = routing.with_experts(5, num_skipped=0)
  assert balanced.loads().max_over_mean < hashed.loads().max_over_mean
  assert routing.with_experts(7).sha256 == routing.sha256
  with pytest.raises(ValueError, match='num_skipped from 0 to .* 9999'):
    routing.with_experts(5, num_skipped=9999)


def test_explain(routing, tiny):
  rows = routing.explain('The dog, unheard!', tiny)
  assert ''.join(row.piece for row in rows) == '▁The▁dog,▁unheard!'
  by_word = {row.word: row for row in rows}
  skipped = 'whole word, one of the 3 most frequent: skipped'
  assert by_word['the'].reason == skipped
  assert by_word['the'].expert is None
  assert by_word['dog'].reason == 'whole word'
  assert by_word['dog'].expert == by_word['dog'].word_id % 7
  assert by_word['unheard'].reason.startswith('backed off to the piece')
  assert by_word['!'].reason == 'punctuation or symbol'
  table = routing_vocabulary.format_explanation(rows).splitlines()
  assert len(table) == 1 + len(rows)
  assert table[0].split() == ['piece', 'word', 'id', 'count', 'expert', 'how']
  assert 'skipped' in table[1]
  assert routing.explain('', tiny) == []


def test_bytes_work_the_same(texts):
  vocabulary = byte_vocabulary.ByteVocabulary(extra_ids=10)
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    texts, vocabulary, num_words=50, num_experts=7
  )
  rows = routing.explain('the café', vocabulary)
  assert [row.word for row in rows] == ['the'] * 3 + [' '] + ['café'] * 5
  assert routing.word(rows[-1].word_id) == 'café'
