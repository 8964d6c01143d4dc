"""`mowe evaluate`: scores a model's answers, or its prediction of a text."""

import json
import pathlib
from collections.abc import Callable

from mowe.commands import data_config, show_progress
from mowe.evaluation import language_modeling, task_evaluation
from mowe.model_folders import model_folder
from mowe.models import decoding
from mowe.stores import expert_stores
from mowe.words import atomic_files


def evaluate(
  *,
  checkpoint_path: str,
  output_dir: str,
  data: data_config.DataConfig,
  store: expert_stores.Store | None = None,
  strategy: decoding.Strategy = decoding.Greedy(),
  metric: Callable[..., dict[str, float]] | None = None,
  reading: language_modeling.ReadingConfig = language_modeling.ReadingConfig(),
) -> task_evaluation.EvaluationResult | language_modeling.TextScore:
  """Answers every question of a token cache and scores the answers.

  A token cache of text has no questions. A decoder-only model then predicts
  each token of the text, and the probabilities are scored.

  Args:
    checkpoint_path: a model folder (its latest checkpoint), or one checkpoint.
    output_dir: folder for results.json and, for questions, predictions.jsonl.
    data: the questions, or the text.
    store: where the word experts lie. None: on the device, or on disk if they
      are larger than 4 GiB.
    strategy: how the tokens of an answer are chosen.
    metric: `text_metrics.squad` or `text_metrics.trivia_qa`; None: the metric
      that the token cache of questions names.
    reading: how a text is cut into windows.

  Returns:
    The scores of the answers, or of the text.
  """
  loaded = model_folder.load(checkpoint_path, store)
  cache = data.open_verified(data.mixture_or_task_name, loaded.vocabulary)
  if 'inputs' not in cache.features:
    return _score_text(loaded, cache, data, reading, pathlib.Path(output_dir))
  generator = data.make_generator(
    loaded.model, loaded.params, strategy=strategy
  )
  with show_progress.counting('questions') as progress:
    result = task_evaluation.evaluate_questions(
      generator,
      cache,
      loaded.vocabulary,
      metric=metric,
      output_dir=output_dir,
      progress=progress,
    )
  scores = result.scores or {'EM': result.em, 'F1': result.f1}
  if result.em is None:
    numbers = 'the answers are not public, so there are only predictions'
  else:
    numbers = '  '.join(f'{name} {score:.1f}' for name, score in scores.items())
  print(
    f'{data.mixture_or_task_name}: {numbers}  '
    f'({result.num_questions:,} questions, step {loaded.step})'
  )
  for name, relation in result.per_relation.items():
    if relation.em is None:
      continue
    print(
      f'  {name:20} EM {relation.em:5.1f}  F1 {relation.f1:5.1f}  '
      f'({relation.num_questions:,})'
    )
  return result


def _score_text(loaded, cache, data, reading, folder):
  with show_progress.counting('tokens') as progress:
    score = language_modeling.score_text(
      loaded.model,
      loaded.params,
      cache,
      batch_size=data.batch_size,
      length=data.task_feature_lengths['targets'],
      reading=reading,
      progress=progress,
    )
  content = json.dumps(language_modeling.as_json(score), indent=2) + '\n'
  atomic_files.write_atomically(folder / 'results.json', content.encode())
  print(
    f'{data.mixture_or_task_name}: {language_modeling.describe(score)}  '
    f'step {loaded.step}'
  )
  return score
