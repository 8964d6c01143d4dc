"""Tests scores, files and recall, with a generator of prepared outputs.

Also tests `ask`, `evaluate`, and `infer`.
"""

import json
import types

import numpy as np
import pytest

from mowe.data.caches import cache_builders
from mowe.evaluation import inference, task_evaluation, text_metrics
from mowe.words import byte_vocabulary

BYTES = byte_vocabulary.ByteVocabulary(extra_ids=4)
RECORDS = [
  {'question': 'Who?', 'answers': ['Ann Lee', 'A. Lee'], 'relation': 'name'},
  {'question': 'When?', 'answers': ['1 May'], 'relation': 'date'},
  {'question': 'Where?', 'answers': ['New-York'], 'relation': 'name'},
  {'question': 'Why?', 'answers': 'Rain'},
]
ANSWERS = {
  'question: Who?': 'a. lee',
  'question: When?': '2 May',
  'question: Where?': 'new york',
  'question: Why?': 'rain',
}


class Parrot:
  """A generator that gives for each input the tokens prepared for it."""

  max_target_length = 12

  def __init__(self, outputs):
    self.outputs = outputs

  def __call__(self, inputs, progress=None):
    tokens = [
      np.array(self.outputs[tuple(map(int, row))], np.int32) for row in inputs
    ]
    if progress is not None:
      progress(len(tokens))
    scores = -np.arange(len(tokens), dtype=np.float32)
    return inference.Generations(tokens, scores, 1, 2)


def with_eos(text):
  return [*BYTES.encode(text), 1]


def make_parrot():
  return Parrot({tuple(with_eos(q)): with_eos(a) for q, a in ANSWERS.items()})


def make_cache(path, records=RECORDS, **options):
  return cache_builders.cache_questions(records, path, BYTES, **options)


def test_scores_by_relation_and_in_total(tmp_path):
  seen = []
  result = task_evaluation.evaluate_questions(
    make_parrot(), make_cache(tmp_path / 'cache'), BYTES, progress=seen.append
  )
  assert seen == [4]
  # 'A. Lee' and 'Rain' are exact matches. SQuAD reads New-York as the one word
  # newyork. The F1 of '2 May' with '1 May' is 1/2.
  assert (result.em, result.f1, result.num_questions) == (50.0, 62.5, 4)
  assert result.per_relation == {
    'date': task_evaluation.RelationResult(0.0, 50.0, 1),
    'name': task_evaluation.RelationResult(50.0, 50.0, 2),
  }
  assert (result.num_trimmed, result.num_unfinished) == (1, 2)
  assert result.metric == 'squad'


def test_files_and_another_metric(tmp_path):
  cache = make_cache(tmp_path / 'cache')
  folder = tmp_path / 'new' / 'folder'
  result = task_evaluation.evaluate_questions(
    make_parrot(),
    cache,
    BYTES,
    metric=text_metrics.trivia_qa,
    output_dir=folder,
  )
  # TriviaQA reads New-York as two words, so it matches.
  assert result.em == 75.0
  assert json.loads((folder / 'results.json').read_text()) == {
    'em': 75.0,
    'f1': 87.5,
    'num_questions': 4,
    'num_trimmed': 1,
    'num_unfinished': 2,
    'metric': 'trivia_qa',
    'per_relation': {
      'date': {'em': 0.0, 'f1': 50.0, 'num_questions': 1},
      'name': {'em': 100.0, 'f1': 100.0, 'num_questions': 2},
    },
    'scores': {},
  }
  lines = (folder / 'predictions.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert rows[1] == {
    'question': 'When?',
    'prediction': '2 May',
    'answers': ['1 May'],
    'relation': 'date',
    'em': 0.0,
    'f1': 50.0,
    'score': -1.0,
  }
  assert 'relation' not in rows[3] and len(rows) == 4
  names = sorted(path.name for path in folder.iterdir())
  assert names == ['predictions.jsonl', 'results.json']


@pytest.mark.parametrize(
  ('label', 'scores', 'em'),
  # One of two answers is right. Answers that are not public have no scores.
  [('choice2', {'accuracy': 50.0}, 50.0), ('<unk>', {}, None)],
)
def test_a_cache_of_a_task_has_its_scores(tmp_path, label, scores, em):
  records = [
    {'question': 'Who?', 'answers': ['choice1']},
    {'question': 'When?', 'answers': [label]},
  ]
  cache = make_cache(
    tmp_path / 'cache',
    records,
    sources=[{'seqio_task': 'super_glue_copa_v102', 'split': 'test'}],
  )
  outputs = {
    tuple(with_eos(f'question: {one["question"]}')): with_eos('choice1')
    for one in records
  }
  result = task_evaluation.evaluate_questions(
    Parrot(outputs), cache, BYTES, output_dir=tmp_path
  )
  assert (result.scores, result.em) == (scores, em)
  written = json.loads((tmp_path / 'results.json').read_text())
  assert (written['scores'], written['em'], written['f1']) == (scores, em, em)


def test_a_record_without_question_is_written_as_it_was_asked(tmp_path):
  cache = make_cache(
    tmp_path / 'cache', [{'of': 'Who?', 'answers': ['x']}], prompt='ask {of}'
  )
  parrot = Parrot({tuple(with_eos('ask Who?')): with_eos('x')})
  task_evaluation.evaluate_questions(parrot, cache, BYTES, output_dir=tmp_path)
  (line,) = (tmp_path / 'predictions.jsonl').read_text().splitlines()
  assert json.loads(line)['question'] == 'ask Who?'


def test_the_metric_comes_with_the_cache(tmp_path):
  record = {'question': 'Who?', 'answers': ['Jean-Luc Picard']}
  ask = tuple([*BYTES.encode('question: Who?'), BYTES.eos_id])
  parrot = Parrot({ask: with_eos('Jean Luc Picard')})
  for metric, em in (('squad', 0), ('trivia_qa', 100)):
    cache = cache_builders.cache_questions(
      [record], tmp_path / metric, BYTES, metric=metric
    )
    result = task_evaluation.evaluate_questions(parrot, cache, BYTES)
    assert (result.metric, result.em) == (metric, em)
    # A metric that is asked for is used instead of the one of the cache.
    result = task_evaluation.evaluate_questions(
      parrot, cache, BYTES, metric=text_metrics.squad
    )
    assert (result.metric, result.em) == ('squad', 0)
  # A cache with another metric is another cache.
  with pytest.raises(ValueError, match='metric'):
    cache_builders.cache_questions([record], tmp_path / 'trivia_qa', BYTES)


def test_caches_that_ask_nothing_are_refused(tmp_path):
  texts = cache_builders.cache_text([{'text': 'a b'}], tmp_path / 't', BYTES)
  with pytest.raises(ValueError, match='1 of 1 in .* have none'):
    task_evaluation.evaluate_questions(make_parrot(), texts, BYTES)
  with pytest.raises(ValueError, match='Give the other vocabulary'):
    task_evaluation.evaluate_questions(
      make_parrot(), texts, byte_vocabulary.ByteVocabulary(extra_ids=5)
    )
  empty = types.SimpleNamespace(
    path='empty',
    metric='squad',
    records=lambda: iter(()),
    check_vocabulary=lambda _: None,
  )
  with pytest.raises(ValueError, match='at least one question'):
    task_evaluation.evaluate_questions(make_parrot(), empty, BYTES)


def test_spans_are_split_at_sentinels_and_eos():
  # The sentinels are 90 to 99. The second 99 does not count, nor do the 7
  # before the first sentinel and the 8 after EOS.
  tokens = np.array([7, 99, 3, 4, 98, 97, 5, 0, 6, 99, 3, 1, 96, 8])
  assert task_evaluation.split_spans(tokens, range(90, 100)) == {
    99: (3, 4),
    98: (),
    97: (5, 6),
  }


MARKS = [BYTES.sentinel_id(i) for i in range(3)]


def make_span_case():
  """Two examples with 2 and 1 spans, a row of padding, and generated outputs.

  'ab' and '1987' are right; 'cd' is generated with one token too many.
  """
  targets = [
    [MARKS[0], *BYTES.encode('ab'), MARKS[1], *BYTES.encode('cd'), 1],
    [MARKS[0], *BYTES.encode('1987'), 1],
    [],
  ]
  inputs = [[10, MARKS[0], 11, MARKS[1], 1], [12, MARKS[0], 1], []]
  generated = [
    [MARKS[0], *BYTES.encode('ab'), MARKS[1], *BYTES.encode('cde'), 1],
    # This output has no EOS, but another sentinel ends its span.
    [MARKS[0], *BYTES.encode('1987'), MARKS[2], 50],
  ]
  pad = lambda rows, length: np.stack(
    [np.pad(np.array(row, np.int32), (0, length - len(row))) for row in rows]
  )
  batch = {
    'encoder_input_tokens': pad(inputs, 7),
    'decoder_target_tokens': pad(targets, 9),
  }
  pairs = zip(inputs, generated, strict=False)
  return batch, Parrot({tuple(row): tokens for row, tokens in pairs})


def test_recall_counts_spans_that_are_right_token_for_token():
  batch, parrot = make_span_case()
  recall = task_evaluation.span_recall(parrot, [batch, batch], BYTES)
  assert recall == task_evaluation.SpanRecall(4 / 6, 4, 6, 4)
  years = task_evaluation.span_recall(
    parrot, [batch], BYTES, counts=str.isdigit
  )
  assert years == task_evaluation.SpanRecall(1.0, 1, 1, 2)


def test_recall_refuses_what_it_cannot_measure():
  batch, parrot = make_span_case()
  with pytest.raises(ValueError, match='max_target_length is 12'):
    long = np.full((3, 13), 5, np.int32)
    task_evaluation.span_recall(
      parrot, [{**batch, 'decoder_target_tokens': long}], BYTES
    )
  with pytest.raises(ValueError, match='check `counts`'):
    task_evaluation.span_recall(
      parrot, [batch], BYTES, counts=lambda text: False
    )
  with pytest.raises(ValueError, match='At least one masked span'):
    task_evaluation.span_recall(parrot, [], BYTES)
  with pytest.raises(ValueError, match='eval_batches'):
    task_evaluation.span_recall(
      parrot, [{**batch, 'encoder_segment_ids': None}], BYTES
    )
