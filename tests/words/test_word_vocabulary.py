"""Tests vocabularies of whole words."""

import pickle

import numpy as np
import pytest

from mowe.data.caches import lm_cache
from mowe.words import base_vocabulary, subword_vocabularies, word_vocabulary

TEXTS = [' the dog <unk> \n', 'the fox , the dog', 'a <unk>']


@pytest.fixture
def vocabulary(tmp_path):
  return word_vocabulary.build_word_vocabulary(
    TEXTS, tmp_path / 'words.txt', extra_ids=2
  )


def test_frequent_words_come_first(vocabulary):
  # `the` occurs 3 times and dog twice. Then `,`, a and fox follow in the order
  # of their characters.
  assert vocabulary.encode('the dog , a fox') == [3, 4, 5, 6, 7]
  assert vocabulary.size == 3 + 5 + 2
  assert vocabulary.sentinel_id(0) == 9


def test_what_is_not_there_is_unknown(vocabulary):
  assert vocabulary.encode('the <unk> cat') == [3, 2, 2]
  assert vocabulary.decode([3, 2, 4, 1, 3]) == 'the <unk> dog'
  assert vocabulary.decode([9, 3, 0]) == '<extra_id_0> the'


def test_words_keep_their_places(vocabulary):
  text = '  the  dog the'
  ids, starts, ends = vocabulary.encode_with_offsets(text)
  assert ids == [3, 4, 3]
  spans = zip(starts, ends, strict=True)
  assert [text[a:b] for a, b in spans] == ['the', 'dog', 'the']


def test_a_file_is_found_to_hold_words(vocabulary):
  again = subword_vocabularies.load_subwords(vocabulary.path, extra_ids=2)
  assert isinstance(again, word_vocabulary.WordVocabulary)
  assert (again.size, again.sha256) == (vocabulary.size, vocabulary.sha256)
  same = pickle.loads(pickle.dumps(again))
  assert same.encode('the fox') == again.encode('the fox')


def test_a_smaller_one_has_the_most_frequent(tmp_path):
  small = word_vocabulary.build_word_vocabulary(TEXTS, tmp_path / 'w', size=5)
  assert small.encode('the dog fox') == [3, 4, 2]
  assert small.size == 5 + 100


def test_kinds(vocabulary):
  special, alone, starts = (
    base_vocabulary.SPECIAL,
    base_vocabulary.ALONE,
    base_vocabulary.STARTS,
  )
  np.testing.assert_array_equal(
    vocabulary.piece_kinds(),
    [special, special, alone, *[starts] * 5, special, special],
  )


def test_errors(tmp_path):
  with pytest.raises(ValueError, match='a size above 3'):
    word_vocabulary.build_word_vocabulary(['<unk>'], tmp_path / 'w')
  (tmp_path / 'other').write_text('the\ndog\n')
  with pytest.raises(ValueError, match='train-vocabulary --words'):
    word_vocabulary.WordVocabulary(tmp_path / 'other')


def test_wikitext_has_the_published_counts(shared_data, tmp_path):
  """Each line end counts as a word, as in the perplexities of papers."""
  folder = shared_data / 'wikitext2_eval'
  for name, tokens in (('validation', 217_646), ('test', 245_569)):
    file = str(folder / f'{name}.txt.gz')
    lines = lm_cache.text_files.read_lines(file)
    vocabulary = word_vocabulary.build_word_vocabulary(lines, tmp_path / name)
    cache = lm_cache.cache_texts([file], tmp_path / f'{name}_cache', vocabulary)
    assert len(cache.flat('targets')) == tokens
    assert cache.totals['words'] == tokens
