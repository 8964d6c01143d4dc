"""Tests subword vocabularies: texts, ids, sentinels, and damaged files.

Also tests `base_vocabulary`, `byte_vocabulary`, and `sentencepiece_vocabulary`.
"""

import pickle

import numpy as np
import pytest

from mowe.words import (
  base_vocabulary,
  byte_vocabulary,
  sentencepiece_vocabulary,
  subword_vocabularies,
)


def kinds_of(vocabulary, text):
  kinds = vocabulary.piece_kinds()
  return [(vocabulary.piece(i), int(kinds[i])) for i in vocabulary.encode(text)]


def test_ids_are_those_of_t5(tiny):
  assert tiny.size == 90 + 10
  assert (tiny.pad_id, tiny.eos_id, tiny.unk_id) == (0, 1, 2)
  assert [tiny.piece(i) for i in range(3)] == ['<pad>', '</s>', '<unk>']
  assert tiny.sentinel_id(0) == 99
  assert tiny.sentinel_id(9) == 90
  assert tiny.piece(90) == '<extra_id_9>'
  with pytest.raises(ValueError, match=r'in 0\.\.9, but is 10.*extra_ids'):
    tiny.sentinel_id(10)


def test_kinds_of_the_t5_vocabulary(t5_vocabulary):
  assert t5_vocabulary.size == 32100
  # The kinds come from the model file. '▁(' and ').' have no letters. 'Z'
  # continues after '(', as its piece says; that '(' ends a word is known only
  # to the look-up.
  assert kinds_of(t5_vocabulary, 'lead (Zorblat). é 3') == [
    ('▁lead', base_vocabulary.STARTS),
    ('▁(', base_vocabulary.ALONE),
    ('Z', base_vocabulary.CONTINUES),
    ('or', base_vocabulary.CONTINUES),
    ('bla', base_vocabulary.CONTINUES),
    ('t', base_vocabulary.CONTINUES),
    (').', base_vocabulary.ALONE),
    ('▁', base_vocabulary.STARTS),
    ('é', base_vocabulary.CONTINUES),
    ('▁3', base_vocabulary.STARTS),
  ]
  kinds = t5_vocabulary.piece_kinds()
  assert kinds.dtype == np.uint8
  assert kinds[:3].tolist() == [
    base_vocabulary.SPECIAL,
    base_vocabulary.SPECIAL,
    base_vocabulary.ALONE,
  ]
  assert (kinds[32000:] == base_vocabulary.SPECIAL).all()
  assert t5_vocabulary.decode(t5_vocabulary.encode('The fox.')) == 'The fox.'


def test_offsets_are_characters_of_the_given_text(t5_vocabulary):
  # The text has double spaces and full-width letters.
  text = 'Café  crème  ＡＢＣ the'
  ids, starts, ends = t5_vocabulary.encode_with_offsets(text)
  assert ids == t5_vocabulary.encode(text)
  spans = [text[a:b] for a, b in zip(starts, ends, strict=True)]
  assert spans == ['Café', 'crème', 'ＡＢＣ', 'the']
  # A combining accent makes two characters, which become one piece.
  text = 'e\u0301a ﬁne x'
  _, starts, ends = t5_vocabulary.encode_with_offsets(text)
  spans = [text[a:b] for a, b in zip(starts, ends, strict=True)]
  # A bare mark of a word start covers no character.
  assert spans == ['', 'e\u0301', 'a', 'ﬁne', '', 'x']


@pytest.mark.parametrize('text', ['', ' ', 'Zorblat  met\n(Quimby)', 'xé日'])
def test_offsets_of_the_tiny_vocabulary(tiny, text):
  ids, starts, ends = tiny.encode_with_offsets(text)
  assert ids == tiny.encode(text) == tiny.encode_batch([text])[0]
  covered = ''.join(text[a:b] for a, b in zip(starts, ends, strict=True))
  assert covered == ''.join(text.split())


def test_decode_stops_at_eos_and_names_sentinels(tiny):
  ids = tiny.encode('the old town')
  sentinel = tiny.sentinel_id(0)
  assert tiny.decode([0, sentinel, *ids, 0, 1, *ids]) == (
    '<extra_id_0> the old town'
  )
  assert tiny.decode(np.array(ids, np.int32)) == 'the old town'
  assert tiny.decode([tiny.size + 5]) == ''


def test_a_text_with_lone_surrogates_is_encoded(tiny):
  assert tiny.encode('dog \ud800') == tiny.encode('dog ?')
  assert tiny.encode_batch(['dog \ud800']) == [tiny.encode('dog ?')]


def test_a_vocabulary_travels_to_other_processes(tiny):
  copy = pickle.loads(pickle.dumps(tiny))
  assert (copy.sha256, copy.size) == (tiny.sha256, tiny.size)
  assert copy.encode('the dog') == tiny.encode('the dog')


def test_bytes():
  vocabulary = subword_vocabularies.load_subwords('bytes')
  assert vocabulary.size == 359
  # 'a' is byte 97 and 'é' is the bytes 195 and 169; each id is 3 larger.
  assert vocabulary.encode('a é') == [100, 35, 198, 172]
  assert kinds_of(vocabulary, 'a é.') == [
    ('a', base_vocabulary.CONTINUES),
    ('<0x20>', base_vocabulary.ALONE),
    ('<0xC3>', base_vocabulary.CONTINUES),
    ('<0xA9>', base_vocabulary.CONTINUES),
    ('.', base_vocabulary.ALONE),
  ]
  ids, starts, ends = vocabulary.encode_with_offsets('aéb')
  assert (starts, ends) == ([0, 1, 1, 2], [1, 2, 2, 3])
  assert ids == vocabulary.encode('aéb')
  sentinel = vocabulary.sentinel_id(0)
  assert sentinel == 358
  assert vocabulary.decode([*ids, sentinel, 1, 100]) == 'aéb<extra_id_0>'
  assert (
    vocabulary.sha256 != byte_vocabulary.ByteVocabulary(extra_ids=99).sha256
  )


def test_training_is_deterministic(tmp_path, model_path, texts):
  again = tmp_path / 'sub' / 'again.model'
  trained = sentencepiece_vocabulary.train_sentencepiece(iter(texts), again, 90)
  assert again.read_bytes() == model_path.read_bytes()
  assert [path.name for path in again.parent.iterdir()] == ['again.model']
  assert trained.size == 190


def test_training_reads_all_of_a_long_line(tmp_path):
  text = ' '.join(f'word{i}' for i in range(2000)) + ' ' + 'ж' * 5000
  lines = list(sentencepiece_vocabulary._lines([text], 1000))
  assert max(map(len, lines)) <= 2002
  assert ''.join(''.join(lines).split()) == ''.join(text.split())


@pytest.mark.parametrize(
  ('num_texts', 'size', 'message'),
  [
    (5, 5000, r'must not exceed .* is 5000\. Set vocab_size='),
    (5, 8, r'every character .* is 8\. Set vocab_size='),
    (0, 20, 'at least one line, but all were empty'),
  ],
)
def test_training_problems(tmp_path, texts, num_texts, size, message):
  path = tmp_path / 'x.model'
  with pytest.raises(ValueError, match=message):
    sentencepiece_vocabulary.train_sentencepiece(texts[:num_texts], path, size)
  assert not list(tmp_path.iterdir())


def test_files_that_are_no_vocabulary(tmp_path, model_path):
  with pytest.raises(FileNotFoundError, match='no file at .*train-vocabulary'):
    subword_vocabularies.load_subwords(tmp_path / 'absent.model')
  for name, content in {
    'text': b'hello, world',
    'empty': b'',
    'half': model_path.read_bytes()[:2000],
  }.items():
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match='cannot be read as one. Copy'):
      subword_vocabularies.load_subwords(path)


def test_long_lines_of_several_bytes_a_character_are_read(tmp_path):
  rng = np.random.default_rng(0)
  letters = [chr(0x4E00 + i) for i in range(30)]
  line = ''.join(rng.choice(letters, 3000))
  trained = sentencepiece_vocabulary.train_sentencepiece(
    [line, 'some words of another script'], tmp_path / 'v.model', 50
  )
  ids = trained.encode(line[:50])
  assert trained.unk_id not in ids and trained.decode(ids) == line[:50]


def test_errors_of_the_texts_stay_what_they_are(tmp_path):
  def texts():
    yield 'one'
    raise ValueError('In a.jsonl, line 2.')

  with pytest.raises(ValueError, match=r'^In a\.jsonl, line 2\.$'):
    sentencepiece_vocabulary.train_sentencepiece(texts(), tmp_path / 'v', 60)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['<extra_id_{}>', '\u2581<extra_id_{}>'])
def test_sentinels_of_the_vocabulary_itself(trained, name):
  symbols = [name.format(i) for i in reversed(range(4))]
  path = trained(user_defined_symbols=symbols)
  vocabulary = subword_vocabularies.load_subwords(path, extra_ids=0)
  assert vocabulary.sentinels == range(6, 2, -1)
  assert vocabulary.piece(vocabulary.sentinel_id(0)) == name.format(0)
  kinds = vocabulary.piece_kinds()
  assert set(kinds[3:7]) == {base_vocabulary.SPECIAL}
  with pytest.raises(ValueError, match=r'in 0\.\.3, but is 4'):
    vocabulary.sentinel_id(4)
  assert subword_vocabularies.load_subwords(path).size == vocabulary.size
  # Added sentinels come first.
  more = subword_vocabularies.load_subwords(path, extra_ids=5)
  assert more.sentinel_id(0) == more.size - 1


def test_own_sentinels_in_another_order_are_none(trained):
  names = [f'<extra_id_{i}>' for i in range(3)]
  rising = subword_vocabularies.load_subwords(
    trained(user_defined_symbols=names)
  )
  assert rising.sentinels == range(3, 6)
  path = trained(user_defined_symbols=[names[i] for i in (1, 0, 2)])
  assert not subword_vocabularies.load_subwords(path, extra_ids=0).sentinels
  added = subword_vocabularies.load_subwords(path)
  assert added.extra_ids == 100 and added.sentinel_id(0) == added.size - 1


def test_bytes_have_sentinels_of_their_own():
  vocabulary = byte_vocabulary.ByteVocabulary(extra_ids=0)
  assert vocabulary.sentinels[:2] == range(258, 256, -1)
  first = vocabulary.sentinel_id(0)
  assert vocabulary.piece(first) == '<extra_id_0>'
  masked = [*vocabulary.encode('the '), first, *vocabulary.encode(' home')]
  assert vocabulary.decode(masked) == 'the <extra_id_0> home'
  assert vocabulary.piece_kinds()[first] == base_vocabulary.SPECIAL
  # No text has one of them.
  every = ''.join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 97)]))
  assert not set(vocabulary.encode(every)) & set(vocabulary.sentinels)
