"""Tests that the generated world is consistent and reproducible."""

import hashlib
import json

import pytest

from mowe.data.text import generated_world

_SMALL = generated_world.WorldConfig(
  num_people=40, num_values=9, num_extra_mentions=30
)


def test_documents_hold_the_answers_of_all_questions():
  world = generated_world.make_world(_SMALL)
  assert len(world.documents) == 40 * 5 * 3 + 30
  assert len(world.qa_train) == 28 * 5
  assert len(world.qa_validation) == 12 * 5
  known = {}
  for document in world.documents:
    answers = [document['text'][start:end] for start, end in document['spans']]
    assert document['entity'] in document['text']
    for relation, answer in zip(document['relations'], answers, strict=True):
      known.setdefault((document['entity'], relation), set()).add(answer)
  for question in world.qa_train + world.qa_validation:
    fact = known[question['entity'], question['relation']]
    assert fact == set(question['answers'])


def test_people_are_held_out_and_have_names_of_their_own():
  world = generated_world.make_world(generated_world.WorldConfig())
  train = {question['entity'] for question in world.qa_train}
  held_out = {question['entity'] for question in world.qa_validation}
  assert (len(train), len(held_out)) == (700, 300)
  assert not train & held_out
  last_names = {name.split()[1] for name in train | held_out}
  assert len(last_names) == 1000
  for relation in generated_world.RELATIONS[:5]:
    answers = {
      question['answers'][0]
      for question in world.qa_train
      if question['relation'] == relation
    }
    assert 45 <= len(answers) <= 50


def test_questions_are_worded_unlike_the_documents():
  config = generated_world.WorldConfig(
    num_people=30, relations=generated_world.RELATIONS, num_templates=4
  )
  world = generated_world.make_world(config)
  texts = ' '.join(document['text'] for document in world.documents)
  for question in world.qa_train + world.qa_validation:
    before, after = question['question'].split(question['entity'])
    assert before not in texts
    assert question['question'] not in texts and '?' not in texts


def test_same_config_same_bytes(tmp_path):
  first = generated_world.write_world(_SMALL, tmp_path / 'a')
  second = generated_world.write_world(_SMALL, tmp_path / 'b')
  assert list(first) == ['documents', 'qa_train', 'qa_validation']
  for name in first:
    assert first[name].read_bytes() == second[name].read_bytes()
  summary = json.loads((tmp_path / 'a' / 'world.json').read_text())
  digest = hashlib.sha256(first['documents'].read_bytes()).hexdigest()
  assert summary['sha256']['documents'] == digest
  assert summary['config']['num_people'] == 40


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('num_people', 1, 'num_people must be from 2'),
    ('num_values', 51, 'num_values must be from 2 to 50'),
    ('num_templates', 0, 'num_templates must be'),
    ('relations', ('birth_city', 'shoe_size'), 'Choose among these'),
  ],
)
def test_bad_configs_are_refused(field, value, message):
  with pytest.raises(ValueError, match=message):
    generated_world.WorldConfig(**{field: value})
