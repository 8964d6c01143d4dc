"""Scores what a model generates: answers to questions, and masked spans."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mowe.data.caches import token_cache
from mowe.evaluation import classification_metrics, inference, text_metrics
from mowe.words import atomic_files, base_vocabulary

# Takes lists of accepted answers and predictions; returns 'em' and 'f1', each
# from 0 to 100.
Metric = text_metrics.Metric

_PREDICTIONS = 'predictions.jsonl'
_RESULTS = 'results.json'


@dataclasses.dataclass(frozen=True)
class RelationResult:
  """Scores of the questions about one relation, from 0 to 100.

  They are None if an answer is not public.
  """

  em: float | None
  f1: float | None
  num_questions: int


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
  """Scores of all questions.

  Attributes:
    em: exact match, 0 to 100; None if the answers are not public, like those of
      GLUE's test splits.
    f1: F1 of words, 0 to 100; None if the answers are not public.
    num_questions: number of questions asked, all of which count.
    num_trimmed: number of questions that were too long for the generator and
      lost their end.
    num_unfinished: number of predictions that were cut off before EOS.
    metric: name of the metric.
    per_relation: scores by relation, for records with a 'relation'.
    scores: the metrics of a task of GLUE, SuperGLUE or FEVER by name, as
      `classification_metrics` computes them; empty for other caches.
  """

  em: float | None
  f1: float | None
  num_questions: int
  num_trimmed: int
  num_unfinished: int
  metric: str
  per_relation: dict[str, RelationResult]
  scores: dict[str, float] = dataclasses.field(default_factory=dict)


def evaluate_questions(
  generator: inference.Generator,
  cache: token_cache.TokenCache,
  subwords: base_vocabulary.Vocabulary,
  *,
  metric: Metric | None = None,
  output_dir: str | os.PathLike | None = None,
  progress: inference.Progress | None = None,
) -> EvaluationResult:
  """Asks every question once, and compares each answer with all accepted ones.

  Args:
    generator: generates the answers of the model. Its lengths apply, and not
      those of a task.
    cache: a token cache of questions.
    subwords: the vocabulary of the model and of the cache.
    metric: `text_metrics.squad`, `text_metrics.trivia_qa`, or a function like
      them; None: the metric that the cache names.
    output_dir: folder for predictions.jsonl, with a line for each question, and
      results.json; None: nothing is written.
    progress: called with the number of questions done so far.

  Raises:
    ValueError: there are no questions, records have no answers, or the cache
      was made with another vocabulary.
  """
  metric = metric or text_metrics.of_name(cache.metric)
  records = read_records(cache, subwords)
  inputs = [cache.tokens('inputs', index) for index in range(len(records))]
  generations = generator(inputs, progress)
  predictions = [subwords.decode(tokens) for tokens in generations.tokens]
  total = _score(metric, records, predictions)
  result = EvaluationResult(
    em=total.em,
    f1=total.f1,
    num_questions=len(records),
    num_trimmed=generations.num_trimmed,
    num_unfinished=generations.num_unfinished,
    metric=getattr(metric, '__name__', str(metric)),
    per_relation=_score_relations(metric, records, predictions),
    scores=_score_task(cache, records, predictions),
  )
  if output_dir is not None:
    lines = [
      _prediction_line(metric, record, prediction, score, tokens, subwords)
      for record, prediction, score, tokens in zip(
        records, predictions, generations.scores.tolist(), inputs, strict=True
      )
    ]
    folder = pathlib.Path(output_dir)
    _write_text(folder / _PREDICTIONS, ''.join(lines))
    summary = json.dumps(
      dataclasses.asdict(result), indent=2, ensure_ascii=False
    )
    # The results are written last: if they exist, the predictions are complete.
    _write_text(folder / _RESULTS, summary + '\n')
  return result


def read_records(
  cache: token_cache.TokenCache, subwords: base_vocabulary.Vocabulary
) -> list[dict[str, Any]]:
  """Returns the records of all questions, each with its 'answers'.

  Raises:
    ValueError: there are no questions, records have no answers, or the cache
      was made with another vocabulary.
  """
  cache.check_vocabulary(subwords)
  records = list(cache.records())
  if not records:
    raise ValueError(
      f'An evaluation needs at least one question, but {cache.path} has none. '
      'Build the cache from a file with questions.'
    )
  without = [i for i, record in enumerate(records) if not record.get('answers')]
  if without:
    raise ValueError(
      "Every record must have a list 'answers', but "
      f'{len(without)} of {len(records)} in {cache.path} have none (the first '
      f'is number {without[0]}). Build the cache with cache_questions from '
      'questions with answers.'
    )
  return records


def are_public(records: Sequence[dict[str, Any]]) -> bool:
  """Whether all answers are public; those of test splits often are not."""
  unknown = [classification_metrics.UNKNOWN]
  return all(list(record['answers']) != unknown for record in records)


def _score(metric, records, predictions) -> RelationResult:
  if not are_public(records):
    return RelationResult(None, None, len(records))
  scores = metric([record['answers'] for record in records], predictions)
  return RelationResult(scores['em'], scores['f1'], len(records))


def _score_relations(metric, records, predictions):
  """Scores by relation, in the order of the relations' names."""
  groups: dict[str, list[int]] = {}
  for index, record in enumerate(records):
    if 'relation' in record:
      groups.setdefault(str(record['relation']), []).append(index)
  return {
    name: _score(
      metric, [records[i] for i in group], [predictions[i] for i in group]
    )
    for name, group in sorted(groups.items())
  }


def _score_task(cache, records, predictions) -> dict[str, float]:
  """The metrics of a cache's seqio task; {} if it has none or no answers."""
  (source, *_) = cache.summary['recipe']['sources']
  metric = classification_metrics.of_task(source.get('seqio_task', ''))
  if metric is None or not are_public(records):
    return {}
  return metric(records, predictions)


def _prediction_line(metric, record, prediction, score, tokens, subwords):
  scores = _score(metric, [record], [prediction])
  line = {
    # Records of a task with a prompt of its own may lack the question.
    'question': record.get('question', subwords.decode(tokens)),
    'prediction': prediction,
    'answers': record['answers'],
    **({'relation': record['relation']} if 'relation' in record else {}),
    'em': scores.em,
    'f1': scores.f1,
    'score': score,
  }
  return json.dumps(line, ensure_ascii=False) + '\n'


def _write_text(path: pathlib.Path, text: str) -> None:
  # A prediction may hold a lone surrogate, which UTF-8 cannot encode.
  atomic_files.write_atomically(path, text.encode('utf-8', 'replace'))


@dataclasses.dataclass(frozen=True)
class SpanRecall:
  """How many masked spans were generated exactly.

  Attributes:
    recall: num_right / num_spans, from 0 to 1.
    num_right: number of spans that were generated token for token.
    num_spans: number of spans that count.
    num_examples: number of examples that were looked at.
  """

  recall: float
  num_right: int
  num_spans: int
  num_examples: int


class NoSpanError(ValueError):
  """Error of a recall without any span: none was masked, or none counts."""


def span_recall(
  generator: inference.Generator,
  batches: Iterable[dict[str, np.ndarray]],
  subwords: base_vocabulary.Vocabulary,
  *,
  counts: Callable[[str], bool] | None = None,
  progress: inference.Progress | None = None,
) -> SpanRecall:
  """Measures the recall of masked spans, without teacher forcing.

  A span is right if the generated tokens after its sentinel, up to the next
  sentinel or EOS, are those of the target. The generator should be greedy.

  Args:
    generator: generates the spans.
    batches: batches of salient or random span corruption that are not packed,
      such as `Batches.eval_batches()`. Rows of padding are left out.
    subwords: the vocabulary of the model and of the batches.
    counts: tells from the text of a span whether it counts, so that for example
      only whole dates do; None: all spans count.
    progress: called with the number of examples done so far.

  Raises:
    NoSpanError: no span counts.
    ValueError: the batches are packed, or targets are longer than the
      generator's outputs can be.
  """
  inputs, targets = _read_examples(batches)
  longest = max(map(len, targets), default=0)
  if longest > generator.max_target_length:
    raise ValueError(
      'The generator must be able to reach the end of every target, but they '
      f'have up to {longest} tokens and max_target_length is '
      f'{generator.max_target_length}. Make it larger.'
    )
  sentinels = subwords.sentinels
  wanted = [split_spans(tokens, sentinels) for tokens in targets]
  if counts is not None:
    wanted = [
      {
        mark: span
        for mark, span in spans.items()
        if counts(_text(span, subwords))
      }
      for spans in wanted
    ]
  num_spans = sum(map(len, wanted))
  if not num_spans:
    raise NoSpanError(
      f'At least one masked span must count, but none of {len(targets)} '
      'examples has one. Give batches of span corruption, and check `counts`.'
    )
  num_right = 0
  for spans, tokens in zip(
    wanted, generator(inputs, progress).tokens, strict=True
  ):
    generated = split_spans(tokens, sentinels)
    num_right += sum(
      generated.get(mark) == span for mark, span in spans.items()
    )
  return SpanRecall(num_right / num_spans, num_right, num_spans, len(targets))


def split_spans(
  tokens: np.ndarray, sentinels: range
) -> dict[int, tuple[int, ...]]:
  """Splits tokens into spans: those after a sentinel, up to the next or EOS.

  Args:
    tokens: <int32>[length], targets or what was generated for them.
    sentinels: the ids of all sentinels.

  Returns:
    The tokens of each span by its sentinel. If a sentinel comes twice, only its
    first span is kept. Tokens before the first sentinel are left out.
  """
  spans: dict[int, list[int]] = {}
  current: list[int] = []
  for token in tokens.tolist():
    if token == base_vocabulary.EOS_ID:
      break
    if token in sentinels:
      current = []
      spans.setdefault(token, current)
    elif token != base_vocabulary.PAD_ID:
      current.append(token)
  return {mark: tuple(span) for mark, span in spans.items()}


def _read_examples(batches):
  """Inputs and targets of all real rows, without padding."""
  inputs, targets = [], []
  for batch in batches:
    if 'encoder_segment_ids' in batch:
      raise ValueError(
        'The batches of span_recall must have one example in a row, but they '
        'are packed. Use Batches.eval_batches().'
      )
    for source, target in zip(
      batch['encoder_input_tokens'],
      batch['decoder_target_tokens'],
      strict=True,
    ):
      if target.any():
        inputs.append(source[source != base_vocabulary.PAD_ID])
        targets.append(target[target != base_vocabulary.PAD_ID])
  return inputs, targets


def _text(span, subwords):
  return subwords.decode(span).strip()
