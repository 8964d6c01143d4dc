"""Tests reading tables as records: CSV, TSV, Parquet, Arrow and data sets."""

import gzip
import json
import sys

import pyarrow
import pytest
from pyarrow import feather, parquet

from mowe.data.caches import lm_cache
from mowe.data.text import bad_records, record_fields, text_files
from mowe.words import byte_vocabulary

_ROWS = [
  {'id': 1, 'text': 'one, "two"\nthree'},
  {'id': 2, 'text': 'Émile'},
  {'id': 3, 'text': ''},
]


def _write_arrow_stream(table, path):
  with pyarrow.ipc.new_stream(path, table.schema) as writer:
    writer.write_table(table)


def _write_arrow_file(table, path):
  with pyarrow.ipc.new_file(path, table.schema) as writer:
    writer.write_table(table)


_WRITERS = {
  'a.parquet': parquet.write_table,
  'a.PARQUET': parquet.write_table,
  'stream.arrow': _write_arrow_stream,
  'file.arrow': _write_arrow_file,
  'a.feather': feather.write_feather,
}


@pytest.mark.parametrize('name', _WRITERS)
def test_rows_of_arrow(tmp_path, name):
  # More rows than are read at once.
  rows = [{'id': i, 'text': f'text {i}', 'more': [i]} for i in range(2500)]
  path = str(tmp_path / name)
  _WRITERS[name](pyarrow.Table.from_pylist(rows), path)
  sources = text_files.describe_sources(path)
  assert list(text_files.read_records(path, sources=sources)) == rows


@pytest.mark.parametrize('separator', [',', '\t'])
@pytest.mark.parametrize('is_packed', [False, True])
def test_rows_of_lines(tmp_path, separator, is_packed):
  lines = [('id', 'text'), (1, '"one, ""two""\nthree"'), (2, 'Émile'), (3, '')]
  content = '\ufeff' + '\r\n'.join(
    separator.join(map(str, cells)) for cells in lines
  )
  name = {',': 'a.csv', '\t': 'a.TSV'}[separator]
  content = content.encode()
  if is_packed:
    name, content = f'{name}.gz', gzip.compress(content)
  (tmp_path / name).write_bytes(content)
  path = str(tmp_path / name)
  sources = text_files.describe_sources(path)
  found = list(text_files.read_records(path, sources=sources))
  assert found == [row | {'id': str(row['id'])} for row in _ROWS]


def test_one_column_may_have_no_name(tmp_path):
  """Libraries write the number of a row into such a column."""
  (tmp_path / 'a.csv').write_text(',text\n0,one\n', 'utf-8')
  (record,) = text_files.read_records(str(tmp_path / 'a.csv'))
  assert record['text'] == 'one'


def test_a_cell_may_be_long(tmp_path):
  text = 'long ' * 100_000
  (tmp_path / 'a.csv').write_text(f'text\n{text}\n', 'utf-8')
  (record,) = text_files.read_records(str(tmp_path / 'a.csv'))
  assert record['text'] == text


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('text,text\none,two\n', r"names, but that of .*a\.csv is \['text', 't"),
    ('text,id\none,1\n\ntwo\n', 'the 2 columns .*a.csv, line 4, has 1. Put'),
    ('text\none, two\n', 'the 1 columns .*line 2, has 2. Put cells'),
    ('text\n"one\ntwo\n', 'line 3, has an error: .* Correct the file'),
    ('text\n"one" two\n', 'line 2, has an error'),
    ('body\none\n', r"field 'text', but .*a.csv, line 2, .*\['body'\]"),
    ('text\n', 'a.csv is empty or blank'),
    ('', 'a.csv is empty or blank'),
  ],
)
def test_damaged_csv_is_named_with_the_line(tmp_path, content, message):
  (tmp_path / 'a.csv').write_text(content, 'utf-8')
  with pytest.raises(ValueError, match=message):
    list(text_files.read_records(str(tmp_path / 'a.csv')))


def test_bad_rows_are_left_out(tmp_path):
  content = b'text,id\none,1\n\xff,2\nthree\nfour,4\n'
  (tmp_path / 'a.csv').write_bytes(content)
  bad = bad_records.BadRecords(skip=True)
  found = list(text_files.read_records(str(tmp_path / 'a.csv'), bad=bad))
  assert [record['id'] for record in found] == ['1', '4']
  assert bad.number == 2


@pytest.mark.parametrize('name', _WRITERS)
def test_broken_off_tables_are_named(tmp_path, name):
  rows = [{'text': f'{i * i:x}' * 9} for i in range(5000)]
  path = tmp_path / name
  _WRITERS[name](pyarrow.Table.from_pylist(rows), str(path))
  content = path.read_bytes()
  for damaged in (content[: len(content) // 2], content[:20], b''):
    path.write_bytes(damaged)
    with pytest.raises(
      ValueError, match=f'{name} breaks off after row .*again'
    ):
      list(text_files.read_records(str(path)))


def test_texts_that_are_not_utf_8_are_named(tmp_path):
  path = str(tmp_path / 'a.parquet')
  texts = pyarrow.array([b'one', b'\xff']).view(pyarrow.string())
  parquet.write_table(pyarrow.table({'text': texts}), path)
  with pytest.raises(ValueError, match='UTF-8, but .*a.parquet breaks off'):
    list(text_files.read_records(path))


def test_a_table_that_changes_is_named(tmp_path):
  path = str(tmp_path / 'a.parquet')
  parquet.write_table(pyarrow.Table.from_pylist(_ROWS), path)
  sources = text_files.describe_sources(path)
  parquet.write_table(pyarrow.Table.from_pylist(_ROWS[:2]), path)
  with pytest.raises(ValueError, match='stay as it is .*a.parquet was changed'):
    list(text_files.read_records(path, sources=sources))


def test_a_field_of_a_row_is_named_by_its_row(tmp_path):
  path = str(tmp_path / 'a.parquet')
  table = pyarrow.Table.from_pylist([{'text': 'one'}, {'text': None}])
  parquet.write_table(table, path)
  with pytest.raises(ValueError, match='a.parquet, row 2, it is null'):
    list(text_files.read_records(path))


def test_questions_as_hugging_face_has_them(tmp_path):
  path = str(tmp_path / 'a.parquet')
  answers = {'text': ['Oslo', 'Christiania'], 'answer_start': [1, 2]}
  rows = [{'question': 'Where?', 'answers': answers}]
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  (found,) = text_files.read_records(path, record_fields.QUESTIONS)
  assert found['answers'] == answers['text']


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / 'a.parquet').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ModuleNotFoundError, match=r'a.parquet .*mowe\[parquet\]'):
    list(text_files.read_records(str(tmp_path / 'a.parquet')))


def _save_dataset(folder):
  """Writes what `datasets.Dataset.save_to_disk` writes, in two files."""
  folder.mkdir(parents=True)
  names = [f'data-0000{i}-of-00002.arrow' for i in range(2)]
  for name, rows in zip(names, (_ROWS[:1], _ROWS[1:]), strict=True):
    table = pyarrow.Table.from_pylist(rows)
    _write_arrow_stream(table, str(folder / name))
  state = {'_data_files': [{'filename': name} for name in names]}
  (folder / 'state.json').write_text(json.dumps(state), 'utf-8')


def test_a_folder_of_datasets(tmp_path):
  _save_dataset(tmp_path / 'saved' / 'train')
  train = str(tmp_path / 'saved' / 'train')
  assert list(text_files.read_records(train)) == _ROWS
  splits = tmp_path / 'saved' / 'dataset_dict.json'
  splits.write_text('{"splits": ["train", "test"]}', 'utf-8')
  with pytest.raises(ValueError, match=r"\['train', 'test'\]. Give .*/train"):
    text_files.read_records(str(tmp_path / 'saved'))
  with pytest.raises(ValueError, match=r'without state.json. Name .*\*.jsonl'):
    text_files.read_records(str(tmp_path))


def test_running_text_may_be_a_table(tmp_path):
  path = str(tmp_path / 'a.parquet')
  parquet.write_table(pyarrow.Table.from_pylist(_ROWS[1:2]), path)
  vocabulary = byte_vocabulary.ByteVocabulary()
  cache = lm_cache.cache_texts([path], tmp_path / 'cache', vocabulary)
  assert cache.num_examples == 1
