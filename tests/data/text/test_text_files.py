"""Tests reading records: formats, globs, and the errors of damaged files.

Also tests `file_formats` and `record_fields`. Tables and whole JSON values have
files of their own.
"""

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest

from mowe.data.text import file_formats, record_fields, text_files


def _write(path, content):
  data = content if isinstance(content, bytes) else content.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return str(path)


def test_reads_every_format_in_the_order_of_names(tmp_path):
  _write(tmp_path / 'a.jsonl', '{"text": "one", "id": 7}\n\n{"text": "two"}\n')
  _write(tmp_path / 'b.jsonl.gz', '{"text": "three"}\n')
  _write(tmp_path / 'c.txt', '\ufefffour\n\n  five \n')
  _write(tmp_path / 'd.gz', 'six')
  records = list(text_files.read_records(str(tmp_path / '*')))
  texts = [record['text'] for record in records]
  assert texts == ['one', 'two', 'three', 'four', 'five', 'six']
  assert records[0] == {'text': 'one', 'id': 7}


def test_paragraphs_are_lines_up_to_a_blank_line(tmp_path):
  path = _write(tmp_path / 'a.txt', '\none\ntwo\n\n\nthree\n')
  records = text_files.read_records(path, unit='paragraph')
  assert [record['text'] for record in records] == ['one two', 'three']


def test_a_name_with_brackets_is_taken_as_it_is(tmp_path):
  path = _write(tmp_path / 'a[1].txt', 'one')
  assert text_files.match_files([path, path]) == [path]


def test_sources_have_size_and_digest(tmp_path):
  path = _write(tmp_path / 'a.txt', 'one')
  (source,) = text_files.describe_sources(path)
  assert source['name'] == 'a.txt' and source['bytes'] == 3
  assert source['sha256'].startswith('7692c3ad3540bb803c020b3aee66cd88')


_GZIP = gzip.compress(b'{"text": "a long enough line"}\n' * 999, mtime=0)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.jsonl', b'', r'a\.jsonl is empty or blank'),
    ('a.txt', b'\n \n', r'a\.txt is empty or blank'),
    ('a.txt', b'one\n\xff\xfe\n', r'a\.txt, line 2, is not.*iconv'),
    ('a.jsonl', b'{"text": "one"}\n{"text": \n', r'line 2, is not JSON'),
    ('a.jsonl', b'["one"]\n', r'line 1, is a list'),
    (
      'a.jsonl',
      b'{"text": "one"}\n\n{"body": "two"}\n',
      r"line 3, .*\['body'\]",
    ),
  ],
)
def test_damaged_files_are_named_with_the_line(
  tmp_path, name, content, message
):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(text_files.read_records(str(tmp_path / name)))


_PACKED = {
  '': bz2.compress,
  '.bz2': bz2.compress,
  '.xz': lzma.compress,
  '.gz': gzip.compress,
  '.ZST': file_formats.zstd.compress,
}


@pytest.mark.parametrize('ending', _PACKED)
def test_packed_files_are_told_by_their_content(tmp_path, ending):
  lines = b'{"text": "one"}\n' * 3
  (tmp_path / f'x.JSONL{ending}').write_bytes(_PACKED[ending](lines))
  records = text_files.read_records(str(tmp_path / '*'))
  assert list(records) == [{'text': 'one'}] * 3


@pytest.mark.parametrize('ending', [one for one in _PACKED if one])
def test_packed_files_that_are_not_whole_are_named(tmp_path, ending):
  rng = np.random.default_rng(0)
  lines = rng.integers(97, 122, 10_000, np.uint8).tobytes()
  content = _PACKED[ending](lines)
  path = tmp_path / f'x.txt{ending}'
  # Cut off, and with other bytes from the middle on.
  half = len(content) // 2
  for damaged in (content[:half], content[:half] + bytes(half)):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match='breaks off after line 0: .* again'):
      list(text_files.read_records(str(path)))


@pytest.mark.parametrize('content', [_GZIP[:-20], b'no gzip at all', _GZIP[:5]])
def test_a_truncated_gzip_file_is_named(tmp_path, content):
  (tmp_path / 'a.jsonl.gz').write_bytes(content)
  with pytest.raises(ValueError, match=r'a\.jsonl\.gz breaks off.*again'):
    list(text_files.read_records(str(tmp_path / 'a.jsonl.gz')))


def test_a_pattern_without_files_is_reported_at_the_call(tmp_path):
  with pytest.raises(ValueError, match='matches none.*Check the path'):
    text_files.read_records(str(tmp_path / '*.jsonl'))
  with pytest.raises(ValueError, match='list is empty'):
    text_files.read_records([])
  with pytest.raises(ValueError, match="is 'page'"):
    text_files.read_records(str(tmp_path), unit='page')


def test_the_home_folder_and_places_that_are_not_local(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  path = _write(tmp_path / 'a.txt', 'one')
  assert text_files.match_files('~/*.txt') == [path]
  with pytest.raises(
    ValueError, match="'gs://b/a.txt' names another place. Co"
  ):
    text_files.match_files('gs://b/a.txt')


def test_folders_of_any_depth(tmp_path):
  for number, folder in enumerate(('', 'a', 'a/b')):
    (tmp_path / folder).mkdir(exist_ok=True)
    _write(tmp_path / folder / 'c.ndjson', f'{{"text": "{number}"}}')
  records = text_files.read_records(str(tmp_path / '**' / '*.ndjson'))
  assert sorted(record['text'] for record in records) == ['0', '1', '2']


@pytest.mark.parametrize('name', ['a.zip', 'a.PARQUET.gz', 'a.npz', 'a.xlsx'])
def test_other_formats_are_refused_by_name(tmp_path, name):
  (tmp_path / name).write_bytes(b'text\none\n')
  with pytest.raises(
    ValueError, match=f'{name} is .* one JSON object per line'
  ):
    text_files.read_records(str(tmp_path / name))


@pytest.mark.parametrize(
  ('check', 'value', 'message'),
  [
    (record_fields.text, 'null', 'must be a text in quotes, but in .*, line 2'),
    (record_fields.text, '["one"]', r'it is \["one"\]. Correct the line'),
    (record_fields.text_or_number, 'true', 'must be a text or a number'),
    (record_fields.text_or_number, 'null', 'it is null'),
    (record_fields.answers, '[]', 'must be an answer, or a list of answers'),
    (record_fields.answers, '["one", null]', 'of which none is empty'),
    (record_fields.answers, '{"start": [1]}', 'must be an answer'),
    (record_fields.answers, '1.5', 'it is 1.5'),
    (record_fields.answers, '" "', 'must be an answer'),
  ],
)
def test_fields_of_another_shape_are_named_with_the_line(
  tmp_path, check, value, message
):
  path = _write(tmp_path / 'a.jsonl', '\n{"x": ' + value + '}\n')
  with pytest.raises(ValueError, match=message):
    list(text_files.read_records(path, {'x': check}))


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    ('"one"', ['one']),
    ('["one", "two"]', ['one', 'two']),
    ('1969', ['1969']),
    ('{"text": ["one", "two"], "answer_start": [3, 9]}', ['one', 'two']),
    ('{"value": "one", "aliases": ["two", "one"]}', ['one', 'two']),
  ],
)
def test_answers_in_every_shape(tmp_path, value, expected):
  path = _write(tmp_path / 'a.jsonl', '{"x": ' + value + '}\n')
  (record,) = text_files.read_records(path, {'x': record_fields.answers})
  assert record['x'] == expected


@pytest.mark.parametrize(
  'content', ['[' * 100_000, '{"text": ' + '1' * 10_000 + '}', '{"text": NaN}']
)
def test_json_of_any_depth_and_length_has_a_sentence(tmp_path, content):
  path = _write(tmp_path / 'a.jsonl', '{"text": "one"}\n' + content + '\n')
  with pytest.raises(ValueError, match='line 2'):
    list(text_files.read_records(path))


def test_half_a_character_is_a_question_mark(tmp_path):
  line = r'{"text": "a \ud83d b", "more": ["\uDE00"], "whole": "\ud83d\ude00"}'
  path = _write(tmp_path / 'a.jsonl', line)
  (record,) = text_files.read_records(path)
  assert record == {'text': 'a ? b', 'more': ['?'], 'whole': '\U0001f600'}


def test_json_with_unicode_is_read_as_it_was_written(tmp_path):
  record = {'text': 'Émile Zola — \U0001f600'}
  path = _write(tmp_path / 'a.jsonl', json.dumps(record, ensure_ascii=False))
  assert list(text_files.read_records(path)) == [record]


def test_errors_of_the_system_stay_what_they_are(tmp_path):
  with pytest.raises(FileNotFoundError):
    list(text_files.read_lines(str(tmp_path / 'absent.txt')))
