"""Tests text metrics by hand, and against the numbers of three references."""

import gzip
import json
import pathlib

import numpy as np
import pytest

from mowe.evaluation import text_metrics

_CASES = (
  pathlib.Path(__file__).parents[3] / 'shared' / 'data' / 'qa_metric_cases'
)
needs_cases = pytest.mark.skipif(
  not (_CASES / 'cases.jsonl').exists(),
  reason='needs the folder data/qa_metric_cases in ../shared',
)
_SQUAD = text_metrics.normalize_squad
_TRIVIA_QA = text_metrics.normalize_trivia_qa


@pytest.mark.parametrize(
  'text, squad, trivia_qa',
  [
    # Articles are removed, but not inside words. Blanks of any kind become one.
    ('The  theatre\tof a Man', 'theatre of man', 'theatre of man'),
    ('New-York', 'newyork', 'new york'),
    ('1,000', '1000', '1 000'),
    # Only for TriviaQA the "a" of U.S.A. becomes a word, and so an article.
    ('U.S.A.', 'usa', 'u s'),
    ('O’Brien', 'o’brien', 'o brien'),
    ('“quoted”', '“quoted”', '“quoted”'),
    ('São Paulo', 'são paulo', 'são paulo'),
    ('The', '', ''),
  ],
)
def test_normalisation(text, squad, trivia_qa):
  assert _SQUAD(text) == squad
  assert _TRIVIA_QA(text) == trivia_qa


def test_f1_counts_each_common_word_once():
  # One "yes" and one "no" are common: precision and recall are both 2/3.
  assert text_metrics.f1('yes yes no', ['yes no no']) == pytest.approx(2 / 3)
  # For 'cat' precision is 1/2 and recall is 1. The best of the answers counts.
  assert text_metrics.f1('cat dog', ['fish', 'cat']) == pytest.approx(2 / 3)


def test_both_empty_is_zero_in_t5_and_one_in_the_squad_script():
  assert text_metrics.exact_match('the', ['a']) == 1.0
  assert text_metrics.f1('the', ['a']) == 0.0
  assert text_metrics.f1('the', ['a'], both_empty=1.0) == 1.0
  assert text_metrics.f1('', ['word'], both_empty=1.0) == 0.0


def test_percentages_over_questions():
  targets = [['New York'], ['Mark Twain', 'Samuel Clemens']]
  predictions = ['New-York', 'Samuel']
  # In SQuAD neither answer is exact, and the second has an F1 of 2/3. In
  # TriviaQA the first one is exact.
  squad = text_metrics.squad(targets, predictions)
  assert squad == pytest.approx({'em': 0.0, 'f1': 100 / 3})
  trivia_qa = text_metrics.trivia_qa(targets, predictions)
  assert trivia_qa == pytest.approx({'em': 50.0, 'f1': 250 / 3})


def test_errors_say_what_to_do():
  with pytest.raises(ValueError, match='empty text for a question without'):
    text_metrics.squad([['a'], ['b']], ['a'])
  with pytest.raises(ValueError, match='Put a single answer in a list'):
    text_metrics.exact_match('a', 'a')
  with pytest.raises(ValueError, match='leave out questions'):
    text_metrics.f1('a', [])


@needs_cases
def test_each_case_of_the_references():
  lines = (_CASES / 'cases.jsonl').read_text(encoding='utf-8').splitlines()
  assert len(lines) == 51
  for line in lines:
    case = json.loads(line)
    text, answers = case['prediction'], case['answers']
    assert _SQUAD(text) == case['normalized_squad_script'], text
    assert _SQUAD(text) == case['normalized_t5_squad'], text
    assert _TRIVIA_QA(text) == case['normalized_t5_trivia_qa'], text
    script = case['squad_script']
    em = text_metrics.exact_match(text, answers)
    assert em == script['exact_match'], text
    f1 = text_metrics.f1(text, answers, both_empty=1.0)
    assert f1 == pytest.approx(script['f1'], rel=1e-12), text
    for name, metric in (
      ('t5_squad', text_metrics.squad),
      ('t5_trivia_qa', text_metrics.trivia_qa),
    ):
      actual = metric([answers], [text])
      assert actual == pytest.approx(case[name], rel=1e-12), (name, text)


@needs_cases
def test_totals_of_the_references():
  lines = (_CASES / 'cases.jsonl').read_text(encoding='utf-8').splitlines()
  cases = [json.loads(line) for line in lines]
  targets = [case['answers'] for case in cases]
  predictions = [case['prediction'] for case in cases]
  totals = json.loads((_CASES / 'totals.json').read_text())
  script = text_metrics.squad_script(targets, predictions)
  expected = [totals['squad_script']['exact'], totals['squad_script']['f1']]
  np.testing.assert_allclose([script['em'], script['f1']], expected, rtol=1e-12)
  squad = text_metrics.squad(targets, predictions)
  assert squad == pytest.approx(totals['t5_squad'], rel=1e-12)
  trivia_qa = text_metrics.trivia_qa(targets, predictions)
  assert trivia_qa == pytest.approx(totals['t5_trivia_qa'], rel=1e-12)


@needs_cases
@pytest.mark.parametrize('system', ['logistic_regression', 'bert_ensemble'])
def test_published_systems_on_squad(system):
  with gzip.open(_CASES / f'squad_dev_{system}.jsonl.gz', 'rt') as lines:
    cases = [json.loads(line) for line in lines]
  expected = json.loads((_CASES / 'squad_dev_expected.json').read_text())
  expected = expected[system]['without_heldout']
  assert len(cases) == expected['n']
  targets = [case['answers'] for case in cases]
  predictions = [case['prediction'] for case in cases]
  for name, metric in (
    ('t5_squad', text_metrics.squad),
    ('squad_script', text_metrics.squad_script),
  ):
    actual = metric(targets, predictions)
    assert actual['em'] == pytest.approx(expected[f'{name}_em'], rel=1e-12)
    assert actual['f1'] == pytest.approx(expected[f'{name}_f1'], rel=1e-12)
