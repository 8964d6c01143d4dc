"""Tests the words that are counted and chosen, by hand.

Also tests `author_symbols`.
"""

import numpy as np
import pytest

from mowe.words import (
  base_vocabulary,
  lookup,
  subword_vocabularies,
  vocabulary_builder,
)


def test_counts_by_hand(tiny):
  texts = ['Dog dog (dog) zzz', 'dOg fox, fox']
  routing, report = vocabulary_builder.build_routing_vocabulary(
    texts, tiny, num_words=1, num_experts=4, num_skipped=0
  )
  words = {
    routing.word(i): int(routing.counts[i])
    for i in range(routing.num_words)
    if not routing.is_piece[i]
  }
  # Tokens are counted: dog has four spellings, each with its number of pieces.
  assert [tiny.piece(i) for i in tiny.encode('(dog)')[:2]] == ['▁', '(']
  num_pieces = len(tiny.encode('(dog)')) - len('▁()')
  num_pieces += sum(len(tiny.encode(text)) for text in ('Dog', 'dog', 'dOg'))
  assert words == {'dog': num_pieces}
  num_tokens = sum(len(tiny.encode(text)) for text in texts)
  assert routing.counts.sum() == num_tokens
  assert report.num_texts == 2
  # The chunks are Dog, dog, (dog), zzz, dOg, 'fox,' and fox.
  assert report.num_chunks == 7
  assert report.num_kept_words == 1
  assert report.known_share == pytest.approx(num_pieces / num_tokens)


def test_the_number_of_workers_and_lists_change_nothing(tiny, texts):
  arguments = dict(num_words=30, num_experts=5)
  phases = []
  routing, report = vocabulary_builder.build_routing_vocabulary(
    texts,
    tiny,
    progress=lambda phase, done: phases.append((phase, done)),
    **arguments,
  )
  lists = [texts[:3], texts[3:9], texts[9:]]
  parallel, parallel_report = vocabulary_builder.build_routing_vocabulary(
    iter(lists), tiny, num_workers=2, **arguments
  )
  assert parallel.sha256 == routing.sha256
  assert parallel_report == report
  assert ('count', len(texts)) in phases
  assert phases[-1] == ('done', routing.num_words)


def test_names_choose_words(tiny, texts):
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    texts,
    tiny,
    num_words=100,
    num_experts=5,
    names=['Old Karlsburg-Zorblat', 'Nowhere'],
  )
  words = {
    routing.word(i) for i in range(routing.num_words) if not routing.is_piece[i]
  }
  assert words == {'old', 'karlsburg', 'zorblat'}


def test_memory_is_bounded_and_what_was_forgotten_is_said(tiny):
  texts = [['dog dog dog'], ['a1 a2 a3 a4 a5 a6'], ['dog fox']]
  _, report = vocabulary_builder.build_routing_vocabulary(
    texts, tiny, num_words=10, num_experts=5, max_chunks=6
  )
  # After the second list 7 chunks are held, and the six that were seen once are
  # dropped.
  assert report.num_pruned_chunks == 6
  assert report.num_pruned_occurrences == 6
  assert report.num_chunks == 2


def test_the_more_frequent_word_keeps_a_key(tiny, monkeypatch):
  # With hashes of few bits there are many collisions.
  monkeypatch.setattr(
    lookup, 'hash_words', lambda mixes, pieces, offsets: few_bits(offsets)
  )

  def few_bits(offsets):
    return (np.arange(len(offsets) - 1) % 2).astype(np.uint32)

  # The hashes of the four spellings are 0, 1, 0 and 1. Words 0 and 1 keep these
  # keys, because they are more frequent than word 2.
  spellings = [[b'\x05\0\0\0'], [b'\x06\0\0\0'], [b'\x07\0\0\0', b'\x08\0\0\0']]
  keys, words, collisions = vocabulary_builder._keys(spellings, tiny)
  assert keys.tolist() == [0, 1]
  assert words.tolist() == [0, 1]
  assert collisions.tolist() == [[0, 2], [1, 2]]


def test_punctuation_never_finds_a_word(tiny, monkeypatch):
  period = tiny.encode('dog.')[-1]
  assert tiny.piece_kinds()[period] == base_vocabulary.ALONE
  collision = lookup.hash_pieces(tiny.size)[[period]]
  monkeypatch.setattr(lookup, 'hash_words', lambda *_: collision)
  keys, _, _ = vocabulary_builder._keys([[b'\x05\0\0\0']], tiny)
  assert len(keys) == 0


def test_cutting_equals_the_look_up(routing, tiny):
  texts = ['(Zorblat).', '', "don't", 'a,b', '1987-2024', 'é日']
  encoded = tiny.encode_batch(texts)
  cut = [[] for _ in texts]
  for sequence, row in vocabulary_builder.cut_words(
    encoded, tiny.piece_kinds()
  ):
    cut[row].append(np.frombuffer(sequence, np.int32).tolist())
  for ids, words in zip(encoded, cut, strict=True):
    assert sum(words, []) == ids
    if ids:
      starts = lookup.word_starts(routing.tables, np.array([ids]))[0]
      lengths = np.diff(np.append(np.flatnonzero(starts), len(ids)))
      assert [len(word) for word in words] == lengths.tolist()


def test_real_vocabulary(t5_vocabulary, texts):
  routing, report = vocabulary_builder.build_routing_vocabulary(
    texts, t5_vocabulary, num_words=40, num_experts=64, num_skipped=0
  )
  assert report.num_collisions == 0
  rows = routing.explain('(Zorblat). zorblat', t5_vocabulary)
  zorblat = [row for row in rows if row.word == 'zorblat']
  assert len({row.word_id for row in zorblat}) == 1
  assert {row.reason for row in zorblat} == {'whole word'}


def test_problems(tiny):
  with pytest.raises(ValueError, match='at least one word, but all were empty'):
    vocabulary_builder.build_routing_vocabulary(
      ['', ' '], tiny, num_words=5, num_experts=2
    )
  with pytest.raises(ValueError, match='num_words must be at least 0'):
    vocabulary_builder.build_routing_vocabulary(
      ['a'], tiny, num_words=-1, num_experts=2
    )
  with pytest.raises(ValueError, match='num_experts must be at least 1'):
    vocabulary_builder.build_routing_vocabulary(
      ['a'], tiny, num_words=1, num_experts=0
    )


def _words_of(routing, vocabulary, text):
  """The words of a text, each with whether it is known, without repeats."""
  rows = routing.explain(text, vocabulary)
  return list(dict.fromkeys((row.word, row.reason) for row in rows))


def test_words_are_counted_as_they_stand_after_a_space(trained, texts):
  path = trained(add_dummy_prefix=False)
  vocabulary = subword_vocabularies.load_subwords(path)
  alone, after = (
    vocabulary.encode('dog'),
    vocabulary.encode_after_space(['dog']),
  )
  assert alone != after[0] == vocabulary.encode('fox dog')[-len(after[0]) :]
  routing, report = vocabulary_builder.build_routing_vocabulary(
    texts, vocabulary, num_words=100, num_experts=5, num_skipped=0
  )
  # The share that is said is that of running text, but for the first words.
  found = vocabulary_builder._known_share(
    vocabulary.encode_batch(texts), routing.keys, vocabulary
  )
  assert found > report.known_share - 0.03 > 0.8
  # The first word of a text is known as well, where it was not met elsewhere.
  assert _words_of(routing, vocabulary, 'Quimby met') == [
    ('quimby', 'whole word'),
    ('met', 'whole word'),
  ]


@pytest.mark.parametrize(
  'settings',
  [
    {'treat_whitespace_as_suffix': True},
    # The pieces are whole sentences.
    {'split_by_whitespace': False, 'vocab_size': 200, 'model_type': 'bpe'},
  ],
)
def test_words_that_differ_in_running_text_are_refused(
  trained, texts, settings
):
  vocabulary = subword_vocabularies.load_subwords(trained(**settings))
  with pytest.raises(ValueError, match='in a text as it writes it alone'):
    vocabulary_builder.build_routing_vocabulary(
      texts, vocabulary, num_words=100, num_experts=5
    )


def test_symbols_of_the_vocabulary_are_words(trained, texts):
  path = trained(user_defined_symbols=['<sep>', '<hl>', 'town'])
  vocabulary = subword_vocabularies.load_subwords(path)
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    texts, vocabulary, num_words=100, num_experts=5, num_skipped=0
  )
  words = _words_of(routing, vocabulary, 'The dog<sep>Karlsburg')
  assert [word for word, _ in words] == ['the', 'dog', '<sep>', 'karlsburg']
  assert ('<sep>', 'punctuation or symbol') in words
  # A symbol that is a word is a part of longer ones.
  assert _words_of(routing, vocabulary, 'towns') == [('towns', 'whole word')]


def test_lines_that_begin_anew_are_no_reason_to_refuse(trained, texts):
  path = trained(user_defined_symbols=['\n'])
  vocabulary = subword_vocabularies.load_subwords(path)
  lines = ['\n'.join(text.split()) for text in texts]
  vocabulary_builder.build_routing_vocabulary(
    lines, vocabulary, num_words=100, num_experts=5
  )
