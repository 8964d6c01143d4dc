"""Tests the metrics of GLUE, SuperGLUE and FEVER by hand."""

import math

import numpy as np
import pytest

from mowe.evaluation import classification_metrics


def _records(answers):
  return [{'answers': [answer]} for answer in answers]


def _scores(task, answers, predictions):
  return classification_metrics.of_task(task)(_records(answers), predictions)


def test_accuracy_of_labels():
  scores = _scores(
    'super_glue_copa_v102',
    ['choice1', 'choice2', 'choice2', 'choice1'],
    # A prediction that is no label is wrong.
    ['choice1', 'choice2', 'choice', ''],
  )
  assert scores == {'accuracy': 50.0}


def test_f1_counts_no_label_as_the_wrong_one():
  yes, no = 'equivalent', 'not_equivalent'
  scores = _scores(
    'glue_mrpc_v002',
    [yes, yes, yes, no, no, no, no],
    # Two of three equivalent pairs are found. The last pair is not equivalent,
    # and 'what' counts there as the wrong label.
    [yes, yes, 'what', no, no, yes, 'what'],
  )
  # The precision is 2/4 and the recall 2/3.
  assert scores == {
    'f1': pytest.approx(100 * 4 / 7),
    'accuracy': pytest.approx(100 * 4 / 7),
  }
  assert _scores('glue_qqp_v002', ['not_duplicate'], ['not_duplicate']) == {
    'f1': 0.0,
    'accuracy': 100.0,
  }


def test_matthews_correlation_of_two_classes():
  yes, no = 'acceptable', 'unacceptable'
  # There are 3 true and 1 false positives, 1 false and 2 true negatives: (3 * 2
  # - 1) / sqrt(4 * 4 * 3 * 3) = 5/12.
  scores = _scores(
    'glue_cola_v002',
    [yes] * 4 + [no] * 3,
    [yes, yes, yes, no, yes, no, no],
  )
  assert scores == {'matthews_corrcoef': pytest.approx(100 * 5 / 12)}
  constant = _scores('glue_cola_v002', [yes, no], [yes, yes])
  assert constant == {'matthews_corrcoef': 0.0}


def test_matthews_correlation_has_a_third_class_for_other_texts():
  yes, no = 'acceptable', 'unacceptable'
  answers = [yes, yes, yes, no, no]
  predictions = [yes, yes, 'a', no, 'b']
  # By Gorodkin, c = 3 of s = 5 are right, the answers have t = (3, 2, 0) and
  # the predictions p = (2, 1, 2) of each class: (c s - t.p) / sqrt((s^2 -
  # p.p)(s^2 - t.t)).
  expected = (15 - 8) / math.sqrt((25 - 9) * (25 - 13))
  scores = _scores('glue_cola_v002', answers, predictions)
  assert scores == {'matthews_corrcoef': pytest.approx(100 * expected)}


def test_mean_f1_of_three_classes():
  scores = _scores(
    'super_glue_cb_v102',
    ['entailment', 'entailment', 'contradiction', 'neutral', 'neutral'],
    ['entailment', 'contradiction', 'contradiction', 'neutral', 'no'],
  )
  # The F1 of the classes are 2 * 1 / (2 + 1), 2 * 1 / (1 + 2) and 2 * 1 / (2 +
  # 1).
  assert scores == {
    'mean_3class_f1': pytest.approx(100 * 2 / 3),
    'accuracy': pytest.approx(60.0),
  }
  # A class that neither an answer nor a prediction has counts as 0.
  scores = _scores('super_glue_cb_v102', ['entailment'], ['entailment'])
  assert scores['mean_3class_f1'] == pytest.approx(100 / 3)


def test_correlations_of_similarities():
  scores = _scores(
    'glue_stsb_v002', ['1.0', '2.0', '3.0', '5.0'], ['0', '2', '2', '4']
  )
  # Pearson: the deviations are (-7, -3, 1, 9) / 4 and (-2, 0, 0, 2), which
  # gives 8 / sqrt(8.75 * 8). Spearman: the ranks are (1, 2, 3, 4) and (1, 2.5,
  # 2.5, 4), which gives 4.5 / sqrt(5 * 4.5).
  assert scores == {
    'pearson_corrcoef': pytest.approx(100 * 8 / math.sqrt(70)),
    'spearman_corrcoef': pytest.approx(100 * 4.5 / math.sqrt(22.5)),
  }


@pytest.mark.parametrize('text', ['', 'same', 'nan', 'inf', '-1.0'])
def test_a_similarity_that_is_no_number_is_minus_one(text):
  # If the text counts as -1, the points (1, 2, 3) and (-1, 2, 5) are on a line.
  scores = _scores('glue_stsb_v002', ['1.0', '2.0', '3.0'], [text, '2', '5'])
  assert scores['pearson_corrcoef'] == pytest.approx(100)


def test_constant_similarities_correlate_with_nothing():
  scores = _scores('glue_stsb_v002', ['1.0', '2.0'], ['3', '3'])
  assert scores == {'pearson_corrcoef': 0.0, 'spearman_corrcoef': 0.0}


def test_multirc_groups_the_answers_of_a_question():
  def one(paragraph, question, answer):
    return {
      'idx/paragraph': paragraph,
      'idx/question': question,
      'answers': [answer],
    }

  # There are three questions; the first and the last have the same number in
  # different paragraphs.
  records = [
    one(0, 0, 'True'),
    one(0, 0, 'False'),
    one(0, 1, 'True'),
    one(0, 1, 'True'),
    one(4, 0, 'False'),
  ]
  predictions = ['True', 'False', 'True', 'False', 'maybe']
  scores = classification_metrics.of_task('super_glue_multirc_v102')(
    records, predictions
  )
  # There are 2 true positives and 1 false negative, and 'maybe' counts as a
  # false positive.
  assert scores == {
    'f1': pytest.approx(100 * 4 / 6),
    'exact_match': pytest.approx(100 / 3),
  }
  # The answers of a question need not be neighbors.
  order = [3, 0, 4, 2, 1]
  assert scores == classification_metrics.multirc(
    [records[i] for i in order], [predictions[i] for i in order]
  )


def test_record_takes_the_best_answer_and_counts_a_query_once():
  def one(passage, query, *answers):
    return {'idx/passage': passage, 'idx/query': query, 'answers': [*answers]}

  records = [
    one(0, 0, 'New York', 'York'),
    one(0, 0, 'New York', 'York'),
    one(0, 1, 'Bo Li'),
    one(1, 0, 'Oslo'),
  ]
  scores = classification_metrics.of_task('super_glue_record_v102')(
    records, ['york', 'not asked', 'Li', 'Oslo']
  )
  # The EM are 1, 0, 1 and the F1 are 1, 2/3, 1.
  assert scores == {
    'em': pytest.approx(200 / 3),
    'f1': pytest.approx(100 * (8 / 3) / 3),
  }


@pytest.mark.parametrize(
  ('prediction', 'referent', 'expected'),
  [
    ('turnip', 'turnip', 1),
    ('potato', 'turnip', 0),
    ('the cat', 'Cat', 1),
    ('fuzzy bunny', 'my fuzzy hungry bunny', 1),
    ('fuzzy grey bunny', 'bunny', 1),
    ("Bob's hat", 'Bob', 0),
    ("Bob's hat", "Bob's hat", 1),
    ('', 'cat', classification_metrics.INVALID),
    ('a this', 'cat', classification_metrics.INVALID),
  ],
)
def test_what_a_text_means(prediction, referent, expected):
  assert classification_metrics.means(prediction, referent) == expected


def test_wsc_asks_whether_the_pronoun_means_the_noun():
  records = [
    {'answers': ['the dog'], 'label': label} for label in (1, 1, 0, 0, 0)
  ]
  predictions = ['dog', 'cat', 'cat', 'a dog', '']
  # The first and the third are right. An empty prediction does not mean "no".
  scores = classification_metrics.of_task('super_glue_wsc_v102_simple_eval')(
    records, predictions
  )
  assert scores == {'accuracy': pytest.approx(40.0)}


def test_definite_pronouns_and_claims():
  assert _scores('dpr_v001_simple', ['Tom', 'Bo'], ['Tom', 'bo']) == {
    'accuracy': 50.0
  }
  assert _scores('fever', ['supports', 'refutes'], ['refutes', 'refutes']) == {
    'accuracy': 50.0
  }


def test_scores_are_plain_numbers():
  for task, answer in (('glue_stsb_v002', '1.0'), ('fever', 'supports')):
    for score in _scores(task, [answer], [answer]).values():
      assert type(score) is float


def test_other_tasks_have_no_metrics():
  for name in ('glue_ax_v002', 'super_glue_axb_v102', 'trivia_qa_open', ''):
    assert classification_metrics.of_task(name) is None


def test_what_cannot_be_scored_is_refused():
  with pytest.raises(
    ValueError, match="'<unk>'.*split whose labels are public"
  ):
    _scores('glue_sst2_v002', ['<unk>'], ['positive'])
  for task in ('glue_sst2_v002', 'glue_stsb_v002', 'super_glue_record_v102'):
    with pytest.raises(ValueError, match='1 records and 0 predictions'):
      _scores(task, ['1.0'], [])
    with pytest.raises(ValueError, match='Each example needs a record'):
      _scores(task, [], [])


@pytest.mark.parametrize('seed', range(3))
def test_correlations_are_those_of_numpy(seed):
  rng = np.random.default_rng(seed)
  targets, predictions = rng.integers(0, 4, (2, 19)).astype(float)
  expected = np.corrcoef(targets, predictions)[0, 1]
  assert classification_metrics.pearson(targets, predictions) == pytest.approx(
    expected
  )
  # For two classes Matthews' correlation equals Pearson's.
  targets, predictions = targets % 2, predictions % 2
  assert classification_metrics.matthews_correlation(
    targets, predictions
  ) == pytest.approx(classification_metrics.pearson(targets, predictions))
