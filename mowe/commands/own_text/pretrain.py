"""`mowe pretrain`: from files of text to a pretrained model, in one command."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from mowe.commands import (
  build_routing_vocabulary,
  cache_task,
  show_progress,
  train_vocabulary,
)
from mowe.commands.gin_files import gin_config
from mowe.commands.own_text import own_run, run_budget, shown_commands
from mowe.words import routing_vocabulary, subword_vocabularies

_CACHE = 'text'
_MOST_PIECES = 8_000
# The macro of models that have word experts.
_WORDS = 'ROUTING_VOCABULARY'
# The recipe and the kind of its token cache: for models with an encoder, and
# for those without.
_WITH_ENCODER = 'gin_configs/examples/text_pretrain.gin', 'text'
_ONE_STACK = 'gin_configs/examples/text_lm.gin', 'language_model'


@dataclasses.dataclass(frozen=True)
class Vocabularies:
  """The subword vocabulary, and the words that get experts.

  Attributes:
    subwords: a SentencePiece model, a vocabulary of words, or 'bytes'; None
      trains a SentencePiece model on the text.
    size: number of ids of a vocabulary that is trained; None takes 8,000, or
      fewer if the text does not fill them.
    questions: files of questions that it is trained on, too.
    num_experts: number of word experts, of a model that has them.
  """

  subwords: str | None = None
  size: int | None = None
  questions: Sequence[str] = ()
  num_experts: int = 2048


def pretrain(
  files: Sequence[str],
  output: str,
  *,
  model: str = 'mowe_tiny',
  vocabularies: Vocabularies = Vocabularies(),
  field: str = 'text',
  budget: run_budget.Budget | None = None,
  gin_files: Sequence[str] = (),
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  skip_bad_records: bool = False,
) -> None:
  """Makes vocabularies and a token cache of text, and pretrains a model on it.

  What is there already is not made again: a command that was stopped goes on.

  Args:
    files: paths or globs of the text.
    output: the model folder. Its folder `data` holds what is made of the text.
    model: a file of gin_configs/models/ without .gin, or a gin file of one's
      own.
    vocabularies: the subword vocabulary, and the words that get experts.
    field: the field of .jsonl records that holds the text.
    budget: how long to train; None takes the steps of the recipe.
    gin_files: gin files that are read after the recipe.
    bindings: gin bindings that are read last.
    search_paths: folders in which gin files are looked up first.
    skip_bad_records: whether records that cannot be read are left out.

  Raises:
    ValueError: a file cannot be read, or `output` holds another model.
  """
  folder = pathlib.Path(output).expanduser()
  data = folder / 'data'
  model_file = _model_file(model)
  gin_config.parse([model_file], (), search_paths)
  needs_words = _WORDS in gin_config.required_macros()
  subwords = _subwords(files, vocabularies, data, field, skip_bad_records)
  macros: dict[str, Any] = {'VOCABULARY_PATH': subwords}
  if needs_words:
    macros[_WORDS] = _routing_vocabulary(
      files, subwords, vocabularies.num_experts, data, field, skip_bad_records
    )
  gin_config.parse([model_file], _as_bindings(macros), search_paths)
  has_encoder = 'encoder' in gin_config.made('MODEL').streams
  recipe, kind = _WITH_ENCODER if has_encoder else _ONE_STACK
  _cache(files, subwords, kind, data, field, skip_bad_records)
  macros |= {
    'CACHE_DIR': str(data / 'cache'),
    'MIXTURE_OR_TASK_NAME': _CACHE,
    'MODEL_DIR': str(folder),
  }
  own_run.run(
    [model_file, recipe, *gin_files],
    [*_as_bindings(macros), *bindings],
    search_paths,
    budget,
    data,
  )
  print(f'To finetune it on questions: mowe finetune {output} questions.jsonl')


def _model_file(model: str) -> str:
  """The path of a model that may be given by its name alone."""
  if model.endswith('.gin'):
    return model
  return f'gin_configs/models/{model}.gin'


def _as_bindings(macros: dict[str, Any]) -> list[str]:
  return [f'{name} = {value!r}' for name, value in macros.items()]


def _subwords(files, wanted, data, field, skip_bad_records) -> str:
  """The subword vocabulary, which is trained if it is neither given nor there."""
  if wanted.subwords is not None:
    return wanted.subwords
  path = data / 'vocabulary.model'
  if path.exists():
    return str(path)
  options: dict[str, Any] = {'size': wanted.size or _MOST_PIECES}
  if field != 'text':
    options['field'] = field
  if wanted.questions:
    options['questions'] = tuple(wanted.questions)
  at_most = wanted.size is None
  flags = ['--at_most'] if at_most else []
  shown_commands.say('train-vocabulary', path, *files, *flags, **options)
  trained = train_vocabulary.train_vocabulary(
    path,
    files,
    **options,
    at_most=at_most,
    skip_bad_records=skip_bad_records,
  )
  print(f'{path}: {trained.size:,} ids with sentinels.')
  return str(path)


def _routing_vocabulary(
  files, subwords, num_experts, data, field, skip_bad_records
) -> str:
  """The words that get experts, which are counted if that was not done."""
  path = data / 'words.npz'
  if path.exists():
    found = routing_vocabulary.load(path).num_experts
    if found != num_experts:
      raise ValueError(
        f'The words of an output must share as many experts as before, but '
        f'{path} has {found:,} and {num_experts:,} are asked for. Restore '
        '--num_experts, or give another --output.'
      )
    return str(path)
  options: dict[str, Any] = {'vocabulary': subwords, 'num_experts': num_experts}
  if field != 'text':
    options['field'] = field
  shown_commands.say('build-routing-vocabulary', path, *files, **options)
  build_routing_vocabulary.build_routing_vocabulary(
    os.fspath(path), files, **options, skip_bad_records=skip_bad_records
  )
  return str(path)


def _cache(files, subwords, kind, data, field, skip_bad_records) -> None:
  """Builds the token cache of the text, or finds that it is built."""
  path = data / 'cache' / _CACHE
  options = {'field': field} if field != 'text' else {}
  shown_commands.say(
    'cache-task', path, *files, kind=kind, vocabulary=subwords, **options
  )
  with show_progress.counting('records') as progress:
    cache = cache_task.cache_task(
      path,
      subwords,
      cache_task.FILES_OF_KIND[kind](files=files, field=field),
      # If the text has changed, a run that has begun refuses to go on.
      overwrite=True,
      progress=progress,
      skip_bad_records=skip_bad_records,
    )
  vocabulary = subword_vocabularies.load_subwords(subwords)
  print(cache_task.describe(cache, vocabulary))
