"""Tests reading .json files that are one value: lists, SQuAD and TriviaQA."""

import json

import pytest

from mowe.data.text import record_fields, text_files

_QUESTIONS = [
  {'question': 'Where?', 'answers': ['Oslo', 'Christiania']},
  {'question': 'When?', 'answers': ['1912']},
]
_SQUAD = {
  'version': '1.1',
  'data': [
    {
      'title': 'Norway',
      'paragraphs': [
        {
          'context': 'Oslo, then Christiania, 1912.',
          'qas': [
            {
              'id': str(number),
              'question': one['question'],
              'answers': [
                {'text': text, 'answer_start': 0} for text in one['answers']
              ],
            }
            for number, one in enumerate(_QUESTIONS)
          ],
        }
      ],
    }
  ],
}
_TRIVIA_QA = {
  'Version': 1.0,
  'Data': [
    {
      'Question': one['question'],
      'QuestionId': str(number),
      'Answer': {'Value': one['answers'][0], 'Aliases': one['answers']},
    }
    for number, one in enumerate(_QUESTIONS)
  ],
}


@pytest.mark.parametrize('indent', [None, 2])
@pytest.mark.parametrize('value', [_QUESTIONS, _SQUAD, _TRIVIA_QA])
def test_questions_of_one_value(tmp_path, value, indent):
  path = tmp_path / 'a.json'
  path.write_text('\n' + json.dumps(value, indent=indent), 'utf-8')
  found = text_files.read_records(str(path), record_fields.QUESTIONS)
  assert [{k: one[k] for k in _QUESTIONS[0]} for one in found] == _QUESTIONS


def test_one_object_per_line_is_read_as_before(tmp_path):
  path = tmp_path / 'a.json'
  records = [{'text': 'one', 'data': [1]}, {'text': 'two', 'data': []}]
  path.write_text('\n'.join(map(json.dumps, records)), 'utf-8')
  assert list(text_files.read_records(str(path))) == records


def test_records_of_a_list_stay_as_they_are(tmp_path):
  records = [{'text': 'one', 'paragraphs': ['a']}, {'text': 'b', 'Question': 1}]
  (tmp_path / 'a.json').write_text(json.dumps(records), 'utf-8')
  assert list(text_files.read_records(str(tmp_path / 'a.json'))) == records


def test_half_a_character_is_a_question_mark(tmp_path):
  (tmp_path / 'a.json').write_text(r'[{"text": "a \ud83d b"}]', 'utf-8')
  (record,) = text_files.read_records(str(tmp_path / 'a.json'))
  assert record == {'text': 'a ? b'}


def test_unanswerable_questions_are_named(tmp_path):
  value = json.loads(json.dumps(_SQUAD))
  value['data'][0]['paragraphs'][0]['qas'][1]['answers'] = []
  (tmp_path / 'a.json').write_text(json.dumps(value), 'utf-8')
  with pytest.raises(ValueError, match='a.json, record 2, it is '):
    list(
      text_files.read_records(str(tmp_path / 'a.json'), record_fields.QUESTIONS)
    )


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('[{"text": "one"},\n', 'a.json is not: .* one object per line'),
    ('[1, 2]', 'Write a list of objects'),
    ('{\n"text": "one"\n}', 'Write a list of objects'),
    ('{"text"', 'line 1, is not JSON'),
    ('[]', 'a.json is empty'),
    (
      '{"data": [{"paragraphs": [{"qas": 1}]}]}',
      'SQuAD, but record 1 of .*a.json',
    ),
    (
      '{"data": [{"paragraphs": [{"qas": [{"answers": [1]}]}]}]}',
      'not subscriptable',
    ),
  ],
)
def test_damaged_values_are_named(tmp_path, content, message):
  (tmp_path / 'a.json').write_text(content, 'utf-8')
  with pytest.raises(ValueError, match=message):
    list(text_files.read_records(str(tmp_path / 'a.json')))
