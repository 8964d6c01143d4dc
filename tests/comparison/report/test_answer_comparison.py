"""Tests groups of questions, the scores of models, and what is refused."""

import dataclasses

import made_up_answers
import numpy as np
import pytest

from mowe.comparison.report import answer_comparison


def _named(counts):
  return [
    answer_comparison.Question('?', ('a',), 'task', entity_count=count)
    for count in counts
  ]


def _sizes(breakdown):
  return {group.name: int(group.members.sum()) for group in breakdown.groups}


def test_scores_are_means_over_seeds_and_questions():
  dense, _ = made_up_answers.results()
  # Of 24 questions the runs answer 3 and 5 right; both answer questions 2 and
  # 3.
  assert dense.em_by_seed() == pytest.approx([100 * 3 / 24, 100 * 5 / 24])
  score = dense.score()
  assert score.em == pytest.approx(100 * 8 / 48)
  assert score.num_questions == 24
  np.testing.assert_array_equal(dense.em_scores[:6], [0, 0.5, 1, 1, 0, 0.5])
  low, high = score.em_interval
  assert 0 < low < score.em < high < 100
  # In these results a wrong answer has an F1 of 0.25.
  assert score.f1 == pytest.approx(100 * (8 + 40 * 0.25) / 48)


def test_relations():
  breakdown = answer_comparison.by_relation(made_up_answers.questions())
  assert _sizes(breakdown) == {'birth_date': 12, 'capital of': 12}
  dense, _ = made_up_answers.results()
  of_dates = breakdown.groups[0].score(dense)
  # The group has the even numbers; of them 2 is right twice, and 8 once.
  assert of_dates.em == pytest.approx(100 * 3 / 24)
  assert of_dates.num_questions == 12


def test_quantiles_of_frequency():
  found = answer_comparison.by_frequency(
    _named([3, 1, 4, 1, 5, 9, 2, 6, None]), 4
  )
  assert _sizes(found) == {'1': 2, '2 to 3': 2, '4 to 5': 2, '6 to 9': 2}
  assert found.num_without == 1
  # Questions of equal frequency must not be split between groups.
  found = answer_comparison.by_frequency(_named([0] * 5 + [1, 1200]), 4)
  assert _sizes(found) == {'0': 5, '1': 1, '1,200': 1}
  assert _sizes(answer_comparison.by_frequency(_named([7] * 9), 4)) == {'7': 9}
  # A frequency that most questions have must not take in the smaller ones.
  found = answer_comparison.by_frequency(
    _named([1] * 7 + [2] * 28 + [3, 5, 5, 6]), 3
  )
  assert _sizes(found) == {'1': 7, '2': 28, '3 to 6': 4}
  # A few questions are too few for a group of their own.
  found = answer_comparison.by_frequency(
    _named([0] + [1] * 7 + [2] * 28 + [3, 5]), 3
  )
  assert _sizes(found) == {'0 to 1': 8, '2 to 5': 30}


@pytest.mark.parametrize('seed', range(5))
def test_every_question_is_in_one_group(seed):
  rng = np.random.default_rng(seed)
  counts = rng.geometric(0.2, size=37).tolist()
  groups = answer_comparison.by_frequency(_named(counts), 4).groups
  assert 1 <= len(groups) <= 4
  assert np.sum([group.members for group in groups], axis=0).tolist() == (
    [1] * len(counts)
  )


def test_an_empty_relation_is_one():
  questions = [
    dataclasses.replace(one, relation=relation)
    for one, relation in zip(_named([1] * 3), ('', None, 'a'), strict=True)
  ]
  found = answer_comparison.by_relation(questions)
  assert _sizes(found) == {'': 1, 'a': 1} and found.num_without == 1


def test_models_are_paired_with_those_before_them():
  dense, sparse = made_up_answers.results()
  first, second = answer_comparison.as_json(
    [dense, sparse], made_up_answers.questions()
  )
  assert first['paired'] == {} and list(second['paired']) == [dense.name]
  difference = second['paired'][dense.name]['difference']
  assert 100 * difference == pytest.approx(
    second['score']['em'] - first['score']['em']
  )


def test_what_questions_do_not_say_is_not_made_up():
  questions = _named([None, None])
  for breakdown in answer_comparison.breakdowns(questions):
    assert not breakdown.groups and breakdown.num_without == 2
  assert not answer_comparison.by_frequency(questions).groups
  assert not answer_comparison.by_relation(questions).groups


def test_a_group_without_questions_has_no_score():
  questions = [
    dataclasses.replace(question, is_answer_seen=True)
    for question in made_up_answers.questions()
  ]
  seen, unseen = answer_comparison.by_seen_answer(questions).groups
  dense, _ = made_up_answers.results()
  assert seen.score(dense).num_questions == 24
  assert unseen.score(dense) is None


def test_sets_of_questions_are_told_apart_where_there_are_several():
  questions = made_up_answers.questions()
  titles = [one.title for one in answer_comparison.breakdowns(questions)]
  assert 'set of questions' not in titles
  questions[5:] = [
    dataclasses.replace(question, task='other') for question in questions[5:]
  ]
  first = answer_comparison.breakdowns(questions)[0]
  assert _sizes(first) == {'other': 19, 'qa_validation': 5}


def test_examples_are_where_models_differ():
  results = made_up_answers.results()
  questions = made_up_answers.questions()
  found = answer_comparison.differing_questions(results, questions, 6)
  # Only the first run of each model counts. Question 3 is known to both models,
  # 1 and 2 only to the dense one, and 4 to 18 only to the other one.
  assert len(found) == 6 and {1, 2} < set(found) <= {1, 2, *range(4, 19)}
  # They are not the first ones, and have both relations, of odd and even
  # numbers, alike.
  assert found != [1, 2, 4, 5, 6, 7]
  assert sum(number % 2 for number in found) == 3
  assert answer_comparison.differing_questions(results[:1], questions) == []


def test_loads():
  load = answer_comparison.Load('encoder, block 2', (0.5, 0.25, 0.25, 0.0))
  assert load.max_over_mean == 2 and load.num_unused == 1


def test_what_cannot_be_compared():
  dense, sparse = made_up_answers.results()
  questions = made_up_answers.questions()
  answer_comparison.check_same_questions([dense, sparse], questions)
  with pytest.raises(ValueError, match='name each once'):
    answer_comparison.check_same_questions([dense, dense], questions)
  with pytest.raises(ValueError, match='at least one model'):
    answer_comparison.check_same_questions([], questions)
  with pytest.raises(ValueError, match=r'all 23 questions.*\[24\] answers'):
    answer_comparison.check_same_questions([dense], questions[1:])
  with pytest.raises(ValueError, match='Leave out models'):
    dataclasses.replace(dense, answers=[])
