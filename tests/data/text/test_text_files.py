"""Tests reading records: formats, globs, and the errors of damaged files."""

import gzip
import json

import pytest

from mowe.data.text import text_files


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


def test_json_with_unicode_is_read_as_it_was_written(tmp_path):
  record = {'text': 'Émile Zola — \U0001f600'}
  path = _write(tmp_path / 'a.jsonl', json.dumps(record, ensure_ascii=False))
  assert list(text_files.read_records(path)) == [record]
