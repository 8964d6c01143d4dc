"""Tests that questions are split by what they are about, and stay there."""

import json
import pathlib

import pytest
import small_runs

from mowe.commands.own_text import question_split
from mowe.data.text import bad_records

_FILES = question_split.QuestionFiles


def _split(files, folder):
  parts = question_split.split(files, bad_records.BadRecords(False))
  paths = question_split.write(parts, folder)
  return {
    name: [
      json.loads(line) for line in pathlib.Path(path).read_text().splitlines()
    ]
    for name, path in paths.items()
  }


def _questions(number):
  return [
    {'question': f'{what} {i}?', 'answers': [f'{i}'], 'entity': f'number {i}'}
    for i in range(number)
    for what in ('Who is', 'Where is')
  ]


def test_all_questions_about_one_thing_are_in_one_part(tmp_path):
  small_runs.write_lines(tmp_path / 'q.jsonl', _questions(200))
  parts = _split(_FILES([str(tmp_path / 'q.jsonl')]), tmp_path / 'out')
  about = {
    name: {record['entity'] for record in records}
    for name, records in parts.items()
  }
  assert sum(map(len, about.values())) == 200
  assert sum(map(len, parts.values())) == 400
  for name in ('choosing', 'reported'):
    assert 8 < len(about[name]) < 36
  # More questions leave the others where they are.
  small_runs.write_lines(tmp_path / 'q.jsonl', _questions(260))
  more = _split(_FILES([str(tmp_path / 'q.jsonl')]), tmp_path / 'out')
  for name, records in parts.items():
    assert [one for one in more[name] if one in records] == records


def test_parts_may_have_files_of_their_own(tmp_path, capsys):
  small_runs.write_lines(tmp_path / 'q.jsonl', _questions(200))
  small_runs.write_lines(tmp_path / 'r.jsonl', _questions(3))
  files = [str(tmp_path / 'q.jsonl')], [], [str(tmp_path / 'r.jsonl')]
  parts = _split(_FILES(*files), tmp_path)
  assert parts['reported'] == _questions(3)
  # Those that would have been reported are trained on.
  assert len(parts['training']) + len(parts['choosing']) == 400
  # All but those of a number that chooses are about numbers that are trained.
  about = {record['entity'] for record in parts['training']}
  known = sum(record['entity'] in about for record in parts['reported'])
  assert known > 0
  said = f'{known} of those to be reported are about something that questions'
  assert said in capsys.readouterr().out


def test_a_part_without_questions_is_refused(tmp_path):
  small_runs.write_lines(tmp_path / 'q.jsonl', _questions(1))
  with pytest.raises(
    ValueError, match='none is choosing: a tenth .* --choosing'
  ):
    _split(_FILES([str(tmp_path / 'q.jsonl')]), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
