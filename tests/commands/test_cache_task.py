"""Tests `mowe cache-task` on files.

Also tests `claims`.
"""

import gzip
import json

import pytest

from mowe.commands import cache_task
from mowe.words import byte_vocabulary


def _write(path, records):
  lines = ''.join(json.dumps(record) + '\n' for record in records)
  path.write_bytes(gzip.compress(lines.encode()))
  return str(path)


def test_text_and_questions_from_files(tmp_path):
  text = _write(tmp_path / 't.jsonl.gz', [{'text': 'the city of Paris'}])
  questions = _write(
    tmp_path / 'q.jsonl.gz', [{'claim': 'it is', 'label': 'SUPPORTS'}]
  )
  built = cache_task.cache_task(
    tmp_path / 'a', 'bytes', cache_task.TextFiles([text])
  )
  assert built.kind == 'text' and built.spans(0).tolist() == [[12, 17]]
  built = cache_task.cache_task(
    tmp_path / 'b',
    'bytes',
    cache_task.QuestionFiles(
      [questions], prompt='fever claim: {claim}', answers_field='label'
    ),
  )
  assert built.record(0)['answers'] == ['SUPPORTS']
  assert built.summary['recipe']['sources'][0]['name'] == 'q.jsonl.gz'


def test_claims_from_files(tmp_path):
  claims = _write(
    tmp_path / 'c.jsonl.gz',
    [{'claim': 'it is', 'label': 'NOT ENOUGH INFO', 'evidence': ['e']}],
  )
  built = cache_task.cache_task(
    tmp_path / 'a', 'bytes', cache_task.ClaimFiles([claims])
  )
  text = byte_vocabulary.ByteVocabulary().decode
  assert text(built.tokens('inputs', 0)) == 'fever claim: it is'
  assert text(built.tokens('targets', 0)) == 'not enough info'
  assert built.kind == 'questions' and built.record(0) == {
    'claim': 'it is',
    'label': 'NOT ENOUGH INFO',
    'evidence': ['e'],
    'question': 'it is',
    'answers': ['not enough info'],
  }
  bad = _write(tmp_path / 'b.jsonl.gz', [{'claim': 'it is', 'label': 'TRUE'}])
  with pytest.raises(ValueError, match="must be one of .* 'TRUE' in 'it is'"):
    cache_task.cache_task(tmp_path / 'b', 'bytes', cache_task.ClaimFiles([bad]))
