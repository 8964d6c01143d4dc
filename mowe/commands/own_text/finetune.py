"""`mowe finetune`: from a model and questions to a model that is scored."""

import json
import pathlib
import shlex
from collections.abc import Sequence

import numpy as np

from mowe.commands import cache_task, data_config, evaluate, train
from mowe.commands.own_text import made_of, own_run, question_split, run_budget
from mowe.data.caches import token_cache
from mowe.data.text import bad_records
from mowe.evaluation import task_evaluation
from mowe.model_folders import model_card, model_folder
from mowe.models.families import costs
from mowe.training import checkpointing
from mowe.words import atomic_files, base_vocabulary, json_files

_RECIPE = 'gin_configs/examples/text_finetune_saved.gin'
_FINISHED = 'finished.json'
# The macros of the run that this command sets.
_OF_RUN = (
  *('INITIAL_CHECKPOINT_PATH', 'CACHE_DIR', 'MIXTURE_OR_TASK_NAME'),
  *('EVAL_TASK_NAME', 'MODEL_DIR'),
)
# Lengths are multiples of this, so that few of them make programs of their own.
_GRANULE = 8
# Texts that are longer are cut.
_MOST_TOKENS = {'inputs': 512, 'targets': 128}


def finetune(
  model: str,
  questions: question_split.QuestionFiles,
  output: str | None = None,
  *,
  budget: run_budget.Budget | None = None,
  gin_files: Sequence[str] = (),
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  skip_bad_records: bool = False,
) -> task_evaluation.EvaluationResult:
  """Finetunes a model on questions, chooses its best checkpoint, and scores it.

  The questions for choosing are answered ten times during training. It ends
  early when they are no longer answered better, and the latest checkpoint of
  the output is the one that answered them best. The reported questions are
  answered by this one alone. A command that was stopped goes on.

  Args:
    model: a model folder, or a checkpoint in it.
    questions: the files of questions.
    output: the model folder of the finetuned model; None puts `_finetuned`
      behind the name of the model's folder. Its folder `data` holds what is
      made of the questions, and its folder `reported` the answers and scores.
    budget: how long to train at most; None takes the steps of the recipe.
    gin_files: gin files that are read after the recipe.
    bindings: gin bindings that are read last.
    search_paths: folders in which gin files are looked up first.
    skip_bad_records: whether records that cannot be read are left out.

  Returns:
    The scores on the reported questions.

  Raises:
    ValueError: a file cannot be read, a part of the questions is empty, or
      `output` has a checkpoint of another model or of other questions.
  """
  own_run.check_free(_OF_RUN, bindings)
  source, step = _source(model)
  beside = source.with_name(f'{source.name}_finetuned')
  folder = beside if output is None else pathlib.Path(output).expanduser()
  caches = _prepare(
    folder, f'{source}, step {step}', questions, model, skip_bad_records
  )
  finished = folder / 'data' / _FINISHED
  if finished.exists():
    print(f'{folder} is finetuned. To do it anew, give another --output.')
  else:
    values = (
      str(source / f'checkpoint_{step}'),
      str(folder / 'data' / 'cache'),
      question_split.TRAINING,
      question_split.CHOOSING,
      str(folder),
    )
    lengths = [f'TASK_FEATURE_LENGTHS = {_lengths(caches.values())}']
    training = own_run.run(
      [_RECIPE, *gin_files],
      dict(zip(_OF_RUN, values, strict=True)),
      [*lengths, *bindings],
      search_paths,
      budget,
    )
    _keep_best(folder, training.save, finished)
  best = json_files.read_object(finished, 'Remove it, and finetune again.')
  print(
    f'Step {best["step"]} is the best on the '
    f'{caches[question_split.CHOOSING].num_examples:,} questions for choosing: '
    f'{best["metric"]} {best["value"]:.4g}.'
  )
  result = _report(folder)
  print(f'To ask it: mowe ask {shlex.quote(str(folder))}')
  return result


def _source(model: str) -> tuple[pathlib.Path, int]:
  """The folder and the step of the model that is finetuned."""
  folder, step = model_folder.split_checkpoint_path(model)
  model_folder.load_config(folder)
  model_folder.check_has_checkpoint(model)
  with checkpointing.Checkpoints(folder) as checkpoints:
    step = checkpoints.latest_step() if step is None else step
  return folder.resolve(), step


def _prepare(
  folder: pathlib.Path,
  source: str,
  questions: question_split.QuestionFiles,
  model: str,
  skip_bad_records: bool,
) -> dict[str, token_cache.TokenCache]:
  """Splits the questions, and builds a token cache of each part."""
  bad = bad_records.BadRecords(skip_bad_records)
  parts = question_split.split(questions, bad)
  bad.say()
  digests = {name: question_split.digest(one) for name, one in parts.items()}
  made_of.is_same(folder, {'model': source, 'questions': digests})
  vocabulary = model_folder.saved_vocabulary(model)
  data = folder / 'data'
  return {
    name: _cache(data / 'cache' / name, path, vocabulary)
    for name, path in question_split.write(parts, data).items()
  }


def _report(folder: pathlib.Path) -> task_evaluation.EvaluationResult:
  """Scores the reported questions, and writes them into the model card."""
  result = evaluate.evaluate(
    checkpoint_path=str(folder),
    output_dir=str(folder / 'reported'),
    data=data_config.DataConfig(
      question_split.REPORTED,
      model_folder.trained_lengths(str(folder)),
      batch_size=32,
      cache_dir=str(folder / 'data' / 'cache'),
    ),
  )
  config, _ = model_folder.load_config(folder)
  model_card.write(folder, config, costs.model_costs(config))
  return result


def _cache(
  path: pathlib.Path,
  file: str,
  vocabulary: base_vocabulary.Vocabulary,
) -> token_cache.TokenCache:
  """Builds the token cache of a part, or finds that it is built."""
  building = cache_task.Building(path, vocabulary, overwrite=True)
  cache = cache_task.QuestionFiles(files=[file]).build(building)
  print(cache_task.describe(cache, vocabulary))
  return cache


def _lengths(caches) -> dict[str, int]:
  """The lengths into which all examples fit, unless they are very long."""
  caches = list(caches)
  longest = lambda name: max(int(np.max(one.lengths(name))) for one in caches)
  return {
    name: min(most, -(-longest(name) // _GRANULE) * _GRANULE)
    for name, most in _MOST_TOKENS.items()
  }


def _keep_best(
  folder: pathlib.Path, save: train.SaveConfig, file: pathlib.Path
) -> None:
  """Makes the best checkpoint the latest one, and writes down that it is."""
  with checkpointing.Checkpoints(
    folder, best_metric=save.best_metric, best_mode=save.best_mode
  ) as checkpoints:
    best = checkpoints.best_step()
    value = checkpoints.metrics(best)[save.best_metric]
    checkpoints.go_back(best)
  content = {'step': best, 'metric': save.best_metric, 'value': value}
  atomic_files.write_atomically(file, (json.dumps(content) + '\n').encode())
