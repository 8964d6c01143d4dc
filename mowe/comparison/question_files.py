"""Reads the questions of an experiment, and the answers of its runs."""

import collections
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mowe.commands import data_config
from mowe.commands.gin_files import gin_config
from mowe.comparison import measurements, planned_runs
from mowe.comparison.report import answer_comparison
from mowe.data.caches import token_cache
from mowe.evaluation import text_metrics
from mowe.words import base_vocabulary

_WORD = re.compile(r'\w+')


def questions_of(
  planned: planned_runs.Run,
  tasks: Sequence[str],
  vocabulary: base_vocabulary.Vocabulary,
) -> list[answer_comparison.Question]:
  """Returns the reported questions, in the order in which they were asked.

  Args:
    planned: any run of the experiment, because all runs read the same data.
    tasks: names of the token caches of the questions.
    vocabulary: the subword vocabulary of the caches.
  """
  data = _data_of(planned.reading[-1])
  caches = {task: data.open_cache(task, vocabulary) for task in tasks}
  records = [
    # Records of seqio tasks have no field with the text of the question.
    (task, {'question': vocabulary.decode(cache.tokens('inputs', i))} | record)
    for task, cache in caches.items()
    for i, record in enumerate(cache.records())
  ]
  normalize = {
    task: _normalize(planned.metric or cache.metric)
    for task, cache in caches.items()
  }
  seen = {
    one: _finetuning_answers(data, vocabulary, one)
    for one in set(normalize.values())
  }
  entities = {r['entity'] for _, r in records if r.get('entity')}
  counts = _count(_texts(planned, vocabulary), entities)
  return [
    answer_comparison.Question(
      text=record['question'],
      answers=tuple(record['answers']),
      task=task,
      relation=record.get('relation'),
      entity_count=counts.get(record.get('entity')),
      is_answer_seen=_is_seen(
        record['answers'], normalize[task], seen[normalize[task]]
      ),
    )
    for task, record in records
  ]


def answers_of(
  planned: planned_runs.Run, questions: Sequence[answer_comparison.Question]
) -> answer_comparison.Answers:
  """Returns what a finished run answered.

  Raises:
    ValueError: the run answered other questions.
  """
  folder = pathlib.Path(planned.folder)
  tasks = {question.task for question in questions}
  lines = [
    line for line in measurements.read_answers(folder) if line['task'] in tasks
  ]
  found = [tuple(line['answers']) for line in lines]
  if found != [question.answers for question in questions]:
    path = folder / measurements.QUESTIONS
    raise ValueError(
      f'{path} must hold answers to the {len(questions)} questions of this '
      f'experiment, but holds {len(lines)} others. Remove {folder}/'
      f'{measurements.RESULTS}, and the model is asked again.'
    )
  return answer_comparison.Answers(
    seed=planned.seed,
    predictions=tuple(line['prediction'] for line in lines),
    em=np.array([line['em'] for line in lines]) / 100,
    f1=np.array([line['f1'] for line in lines]) / 100,
  )


def _data_of(stage: planned_runs.PlannedStage) -> data_config.DataConfig:
  gin_config.parse(stage.gin_files, stage.bindings)
  return gin_config.call(data_config.DataConfig)


def _caches(
  data: data_config.DataConfig, vocabulary: base_vocabulary.Vocabulary
) -> list[token_cache.TokenCache]:
  if not data.use_cached_tasks:
    return []
  names = data.mixture_or_task_name
  names = [names] if isinstance(names, str) else names
  return [data.open_cache(name, vocabulary) for name in names]


def _normalize(metric: str):
  if metric == text_metrics.trivia_qa.__name__:
    return text_metrics.normalize_trivia_qa
  return text_metrics.normalize_squad


def _is_seen(answers, normalize, seen) -> bool | None:
  if seen is None:
    return None
  return any(normalize(answer) in seen for answer in answers)


def _finetuning_answers(data, vocabulary, normalize) -> set[str] | None:
  """Returns all accepted answers of finetuning; None if they are not known."""
  caches = _caches(data, vocabulary)
  answers = {
    normalize(answer)
    for cache in caches
    for record in cache.records()
    for answer in record.get('answers', ())
  }
  return answers or None


def _texts(planned, vocabulary) -> Iterable[str]:
  """Yields the text of all stages of pretraining, that of each cache once."""
  caches: dict[str, token_cache.TokenCache] = {}
  for stage in planned.reading[:-1]:
    for cache in _caches(_data_of(stage), vocabulary):
      caches.setdefault(str(cache.path), cache)
  for cache in caches.values():
    for index in range(cache.num_examples):
      yield vocabulary.decode(cache.tokens('targets', index))


def _count(
  texts: Iterable[str], entities: Iterable[str]
) -> Mapping[str | None, int]:
  """Counts how often texts name each entity, as its words in a row.

  Returns:
    The count of each entity; {} if there is no text to count in.
  """
  of_words = {entity: _words(entity) for entity in entities}
  # The lengths of names by their first words. Most words of a text begin no
  # name, and are passed quickly.
  lengths: dict[str, set[int]] = {}
  for words in of_words.values():
    if words:
      lengths.setdefault(words[0], set()).add(len(words))
  if not lengths:
    return {}
  wanted = set(of_words.values())
  counts: collections.Counter[tuple[str, ...]] = collections.Counter()
  has_text = False
  for text in texts:
    has_text = True
    words = _words(text)
    for start, word in enumerate(words):
      for length in lengths.get(word, ()):
        found = words[start : start + length]
        if found in wanted:
          counts[found] += 1
  if not has_text:
    return {}
  return {entity: counts[words] for entity, words in of_words.items()}


def _words(text: str) -> tuple[str, ...]:
  return tuple(_WORD.findall(text.casefold()))
