"""`mowe evaluate`: questions of a task answered by a trained model."""

from collections.abc import Callable

from mowe.commands import data_config, model_folder, show_progress
from mowe.evaluation import evaluate as evaluate_lib
from mowe.evaluation import text_metrics
from mowe.models import decoding
from mowe.stores import expert_stores


def evaluate(
  *,
  checkpoint_path: str,
  output_dir: str,
  data: data_config.DataConfig,
  store: expert_stores.Store | None = None,
  strategy: decoding.Strategy = decoding.Greedy(),
  metric: Callable[..., dict[str, float]] = text_metrics.squad,
) -> evaluate_lib.EvaluationResult:
  """Answers every question of a token cache and scores the answers.

  Args:
    checkpoint_path: a model folder (its latest checkpoint), or one checkpoint.
    output_dir: gets predictions.jsonl and results.json.
    data: the questions.
    store: where word experts lie; None: on the device, or on disk if their
      tables are large.
    strategy: how answers are generated.
    metric: `text_metrics.squad` or `text_metrics.trivia_qa`.
  """
  loaded = model_folder.load(checkpoint_path, store)
  cache = data.open_cache(data.mixture_or_task_name, loaded.vocabulary)
  generator = data.make_generator(
    loaded.model, loaded.params, strategy=strategy
  )
  with show_progress.counting('questions') as progress:
    result = evaluate_lib.evaluate_questions(
      generator,
      cache,
      loaded.vocabulary,
      metric=metric,
      output_dir=output_dir,
      progress=progress,
    )
  print(
    f'{data.mixture_or_task_name}: EM {result.em:.1f}  F1 {result.f1:.1f}  '
    f'({result.num_questions:,} questions, step {loaded.step})'
  )
  for name, relation in result.per_relation.items():
    print(
      f'  {name:20} EM {relation.em:5.1f}  F1 {relation.f1:5.1f}  '
      f'({relation.num_questions:,})'
    )
  return result
