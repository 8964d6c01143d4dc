"""Tests token caches: round trips, spans, fingerprints, unfinished builds.

Also tests `cache_builders`.
"""

import json

import numpy as np
import pytest

from mowe.data.caches import cache_builders, token_cache
from mowe.data.text import text_files
from mowe.words import byte_vocabulary

_BYTES = byte_vocabulary.ByteVocabulary()
_TEXTS = [
  {'text': 'the city of Paris'},
  {'text': ''},  # A text without tokens is left out.
  {'text': 'è in 1981', 'spans': [[0, 1], [5, 9]]},
]
_QUESTIONS = [
  {'question': 'who?', 'answers': ['Ada', 'Ada L.'], 'relation': 'name'},
  {'question': 'où?', 'answers': 'Oslo'},
]


def _ids(text):
  return [byte + 3 for byte in text.encode()] + [1]


def test_text_cache_by_hand(tmp_path):
  built = cache_builders.cache_text(_TEXTS, tmp_path / 'c', _BYTES)
  assert built.kind == 'text' and built.num_examples == 2
  assert built.features == ('targets', 'spans')
  assert built.tokens('targets', 0).tolist() == _ids('the city of Paris')
  assert built.spans(0).tolist() == [[12, 17]]
  # The letter è has two bytes, so '1981' at characters 5 to 9 is at bytes 6 to
  # 10.
  assert built.spans(1).tolist() == [[0, 2], [6, 10]]
  # The flat array joins all texts, each with an EOS at its end.
  stream = _ids('the city of Paris') + _ids('è in 1981')
  assert built.flat('targets').tolist() == stream
  assert built.flat('targets').dtype == np.uint16
  assert built.lengths('targets').tolist() == [18, 11]
  assert built.sentinels == _BYTES.sentinels
  assert built.record(0) == {}
  assert list(built.records()) == [{}, {}]


def test_question_cache_keeps_the_records(tmp_path):
  built = cache_builders.cache_questions(
    _QUESTIONS, tmp_path / 'c', _BYTES, prompt='q: {question}'
  )
  assert built.tokens('inputs', 1).tolist() == _ids('q: où?')
  assert built.tokens('targets', 0).tolist() == _ids('Ada')
  assert built.record(0) == _QUESTIONS[0]
  assert built.record(1) == {'question': 'où?', 'answers': ['Oslo']}
  assert list(built.records()) == [built.record(0), built.record(1)]


def test_workers_change_nothing(tmp_path):
  texts = [{'text': f'the text of Number {i}'} for i in range(1100)]
  done = []
  one = cache_builders.cache_text(texts, tmp_path / 'a', _BYTES)
  two = cache_builders.cache_text(
    texts, tmp_path / 'b', _BYTES, num_workers=2, progress=done.append
  )
  assert one.summary == two.summary
  assert done == [512, 1024, 1100]


def test_an_equal_cache_is_used_again(tmp_path):
  def fails():
    raise AssertionError('The records must not be read.')
    yield

  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "one"}')
  sources = text_files.describe_sources(str(path))
  first = cache_builders.cache_text(
    text_files.read_records(str(path)),
    tmp_path / 'c',
    _BYTES,
    sources=sources,
  )
  again = cache_builders.cache_text(
    fails(), tmp_path / 'c', _BYTES, sources=sources
  )
  assert again.summary == first.summary


def test_another_fingerprint_is_an_error_or_overwritten(tmp_path):
  cache_builders.cache_questions(_QUESTIONS, tmp_path / 'c', _BYTES)
  other = {'prompt': 'nq: {question}'}
  with pytest.raises(
    ValueError, match=r'prompt was question.* now nq.*old .*new .*--overwrite'
  ):
    cache_builders.cache_questions(_QUESTIONS, tmp_path / 'c', _BYTES, **other)
  built = cache_builders.cache_questions(
    _QUESTIONS, tmp_path / 'c', _BYTES, overwrite=True, **other
  )
  assert built.tokens('inputs', 0).tolist() == _ids('nq: who?')
  assert [path.name for path in tmp_path.iterdir()] == ['c']


def test_a_crashed_build_leaves_nothing(tmp_path):
  def records():
    yield from ({'text': 'one'} for _ in range(600))
    raise RuntimeError('power cut')

  sources = [{'name': 'a', 'sha256': '0'}]
  with pytest.raises(RuntimeError, match='power cut'):
    cache_builders.cache_text(
      records(), tmp_path / 'c', _BYTES, sources=sources
    )
  assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match='its build was interrupted'):
    token_cache.TokenCache.open(tmp_path / 'c')


def test_an_unfinished_folder_cannot_be_opened(tmp_path):
  built = cache_builders.cache_text(_TEXTS, tmp_path / 'c', _BYTES)
  (built.path / 'cache.json').unlink()
  with pytest.raises(ValueError, match='its build was interrupted'):
    token_cache.TokenCache.open(tmp_path / 'c')
  # A folder with other files is never replaced either.
  with pytest.raises(ValueError, match='is no token cache'):
    cache_builders.cache_text(_TEXTS, tmp_path / 'c', _BYTES, overwrite=True)


def test_damage_is_found(tmp_path):
  built = cache_builders.cache_text(_TEXTS, tmp_path / 'c', _BYTES)
  tokens = built.path / 'targets.tokens.bin'
  content = tokens.read_bytes()
  tokens.write_bytes(content[:-2])
  with pytest.raises(
    ValueError, match=f'must have {len(content)} bytes, but h'
  ):
    token_cache.TokenCache.open(built.path)
  tokens.write_bytes(b'\x09' + content[1:])
  token_cache.TokenCache.open(built.path)
  with pytest.raises(ValueError, match='the file has changed'):
    token_cache.TokenCache.open(built.path).verify()
  tokens.unlink()
  with pytest.raises(ValueError, match='is missing'):
    token_cache.TokenCache.open(built.path)


def test_another_format_is_refused(tmp_path):
  built = cache_builders.cache_text(_TEXTS, tmp_path / 'c', _BYTES)
  summary = json.loads((built.path / 'cache.json').read_text())
  summary['recipe']['format_version'] = 99
  (built.path / 'cache.json').write_text(json.dumps(summary))
  with pytest.raises(ValueError, match='must be version 3.*has version 99'):
    token_cache.TokenCache.open(built.path)


def test_another_vocabulary_is_refused(tmp_path):
  built = cache_builders.cache_text(_TEXTS, tmp_path / 'c', _BYTES)
  token_cache.TokenCache.open(built.path, _BYTES).verify()
  with pytest.raises(ValueError, match='vocabulary it was made with'):
    token_cache.TokenCache.open(built.path, byte_vocabulary.ByteVocabulary(20))


def test_a_missing_feature_is_named(tmp_path):
  built = cache_builders.cache_text(_TEXTS, tmp_path / 'c', _BYTES)
  with pytest.raises(ValueError, match="needs the feature 'inputs'"):
    built.tokens('inputs', 0)


@pytest.mark.parametrize(
  ('records', 'message'),
  [
    ([], 'at least one example'),
    ([{'question': 'who?', 'answers': []}], r'at least one answer.*has \[\]'),
    ([{'question': 'who?', 'answers': ['  ']}], 'at least one answer'),
    ([{'question': 'who?'}], "must have the field 'answers'"),
    ([{'answers': ['Ada']}], "must have the field 'question'"),
  ],
)
def test_bad_questions_are_refused(tmp_path, records, message):
  with pytest.raises(ValueError, match=message):
    cache_builders.cache_questions(records, tmp_path / 'c', _BYTES)
  assert not list(tmp_path.iterdir())


def test_a_prompt_without_field_and_lazy_records_are_refused(tmp_path):
  with pytest.raises(ValueError, match='must name a field'):
    cache_builders.cache_questions([], tmp_path, _BYTES, prompt='question:')
  with pytest.raises(ValueError, match='Pass sources='):
    cache_builders.cache_text(iter(_TEXTS), tmp_path, _BYTES)


class _Pieces:
  """A vocabulary that splits ' 1981' into a bare word start and '1981'."""

  def encode(self, text):
    return [5, 6] if text == '1981' else [7]


def test_a_bare_word_start_belongs_to_the_span_of_its_answer():
  # The pieces of 'in 1981.' are: in, a bare word start, 1981, and a period. The
  # bare word start covers no character.
  args = 'in 1981.', [(3, 7)], [7, 5, 6, 8], [0, 3, 3, 7], [2, 3, 7, 8]
  spans = cache_builders.token_spans(*args, _Pieces())
  assert spans.tolist() == [[1, 3]]


def test_spans_that_share_a_token_become_one():
  # The second piece covers characters 2 to 6, so it touches both spans.
  args = 'abcdefgh', [(0, 3), (4, 8)], [7, 7, 7], [0, 2, 6], [2, 6, 8]
  spans = cache_builders.token_spans(*args, _Pieces())
  assert spans.tolist() == [[0, 3]]
