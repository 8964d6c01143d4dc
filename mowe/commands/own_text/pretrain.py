"""`mowe pretrain`: from files of text to a pretrained model, in one command."""

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from mowe.commands import (
  build_routing_vocabulary,
  cache_task,
  show_progress,
  train_vocabulary,
)
from mowe.commands.gin_files import gin_config
from mowe.commands.own_text import made_of, own_run, run_budget, shown_commands
from mowe.data.text import text_files
from mowe.models import model_config
from mowe.words import base_vocabulary, subword_vocabularies

_CACHE = 'text'
_MOST_PIECES = 8_000
_NUM_EXPERTS = 2048
# The macro of models that have word experts.
_WORDS = 'ROUTING_VOCABULARY'
# The macros of a run that this command sets besides those of vocabularies.
_OF_RUN = ('CACHE_DIR', 'MIXTURE_OR_TASK_NAME', 'MODEL_DIR')


@dataclasses.dataclass(frozen=True)
class Vocabularies:
  """The subword vocabulary, and the words that get experts.

  Attributes:
    subwords: a SentencePiece model, a vocabulary of words, or 'bytes'; None
      trains a SentencePiece model on the text.
    size: number of ids of a vocabulary that is trained; None takes 8,000, or
      fewer if the text does not fill them.
    questions: files of questions that it is trained on, too.
    num_experts: number of word experts, of a model that has them; None takes
      2,048.

  Raises:
    ValueError: a vocabulary is given, and size or questions to train one.
  """

  subwords: str | None = None
  size: int | None = None
  questions: Sequence[str] = ()
  num_experts: int | None = None

  def __post_init__(self):
    if self.subwords is not None and (self.size or self.questions):
      raise ValueError(
        'A vocabulary is given or trained, but there are --vocabulary '
        f'{self.subwords} and a size or questions to train one. Leave one of '
        'them out.'
      )


@dataclasses.dataclass(frozen=True)
class _Text:
  """The text, and what reads it.

  Attributes:
    files: paths or globs of the files.
    field: the field of records that holds the text.
    skip: whether records that cannot be read are left out.
    data: the folder of what is made of it.
  """

  files: Sequence[str]
  field: str
  skip: bool
  data: pathlib.Path

  def say(self, verb: str, path: pathlib.Path, *flags: str, **options) -> None:
    """Prints the command that makes one of these things alone."""
    if self.field != 'text':
      options['field'] = self.field
    if self.skip:
      options['on_bad_record'] = 'skip'
    shown_commands.say(verb, path, *self.files, *flags, **options)


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
    field: the field of records that holds the text.
    budget: how long to train; None takes the steps of the recipe.
    gin_files: gin files that are read after the recipe.
    bindings: gin bindings that are read last.
    search_paths: folders in which gin files are looked up first.
    skip_bad_records: whether records that cannot be read are left out.

  Raises:
    ValueError: a file cannot be read, options do not fit together, or `output`
      has a checkpoint of other text or options.
  """
  folder = pathlib.Path(output).expanduser()
  text = _Text(files, field, skip_bad_records, folder / 'data')
  model_file = _model_file(model)
  gin_config.parse([model_file], (), search_paths)
  own_run.check_free(('VOCABULARY_PATH', _WORDS, *_OF_RUN), bindings)
  has_words = _WORDS in gin_config.required_macros()
  if vocabularies.num_experts is not None and not has_words:
    raise ValueError(
      f'--num_experts is for models that have word experts, but {model_file} '
      'has none. Leave it out, or take a model such as mowe_tiny.'
    )
  described = {
    'text': text_files.describe_sources(files),
    'model': model_file,
    'options': {'field': field, 'skip': skip_bad_records},
    'vocabularies': dataclasses.asdict(vocabularies)
    | {'questions': _sources(vocabularies.questions)}
    | _given(vocabularies.subwords),
  }
  if not made_of.is_same(folder, described):
    for name in (_subwords_path(text), _words_path(text)):
      name.unlink(missing_ok=True)
  macros: dict[str, Any] = {'VOCABULARY_PATH': _subwords(text, vocabularies)}
  vocabulary = _vocabulary_of(model_file, macros, search_paths)
  if has_words:
    number = vocabularies.num_experts or _NUM_EXPERTS
    macros[_WORDS] = _words(text, macros['VOCABULARY_PATH'], vocabulary, number)
  gin_config.parse([model_file], own_run.as_bindings(macros), search_paths)
  recipe, kind = _recipe(gin_config.made('MODEL'))
  _cache(text, macros['VOCABULARY_PATH'], vocabulary, kind)
  macros |= dict(
    zip(_OF_RUN, (str(text.data / 'cache'), _CACHE, str(folder)), strict=True)
  )
  own_run.run(
    [model_file, recipe, *gin_files],
    macros,
    bindings,
    search_paths,
    budget,
  )
  print(
    'To finetune it on questions: mowe finetune '
    f'{shlex.quote(output)} questions.jsonl'
  )


def _model_file(model: str) -> str:
  """The path of a model that may be given by its name alone."""
  if model.endswith('.gin'):
    return model
  return f'gin_configs/models/{model}.gin'


def _sources(files: Sequence[str]) -> list[dict[str, Any]]:
  return text_files.describe_sources(files) if files else []


def _given(subwords: str | None) -> dict[str, str]:
  """What a given vocabulary holds, whatever its path."""
  if subwords is None:
    return {}
  return {'subwords': subword_vocabularies.load_subwords(subwords).sha256}


def _recipe(config: model_config.ModelConfig) -> tuple[str, str]:
  """The gin file of the run for a model, and the kind of its token cache."""
  if 'encoder' in config.streams:
    return 'gin_configs/examples/text_pretrain.gin', 'text'
  # A model that remembers earlier batches reads text in its order.
  name = 'text_lm_memory' if config.memory_length else 'text_lm'
  return f'gin_configs/examples/{name}.gin', 'language_model'


def _vocabulary_of(
  model_file, macros, search_paths
) -> base_vocabulary.Vocabulary:
  """The subword vocabulary as the model reads it, with its sentinels."""
  gin_config.parse([model_file], own_run.as_bindings(macros), search_paths)
  return gin_config.made('VOCABULARY')


def _sentinels(
  path: str, vocabulary: base_vocabulary.Vocabulary
) -> dict[str, int]:
  """The option for a model that has other sentinels than the default."""
  if subword_vocabularies.load_subwords(path).extra_ids == vocabulary.extra_ids:
    return {}
  return {'extra_ids': vocabulary.extra_ids}


def _subwords_path(text: _Text) -> pathlib.Path:
  return text.data / 'vocabulary.model'


def _words_path(text: _Text) -> pathlib.Path:
  return text.data / 'words.npz'


def _subwords(text: _Text, wanted: Vocabularies) -> str:
  """The subword vocabulary, which is trained if it is neither given nor there."""
  if wanted.subwords is not None:
    return wanted.subwords
  path = _subwords_path(text)
  if path.exists():
    return str(path)
  options: dict[str, Any] = {'size': wanted.size or _MOST_PIECES}
  if wanted.questions:
    options['questions'] = tuple(wanted.questions)
  at_most = wanted.size is None
  text.say('train-vocabulary', path, *['--at_most'] * at_most, **options)
  trained = train_vocabulary.train_vocabulary(
    path,
    text.files,
    field=text.field,
    at_most=at_most,
    skip_bad_records=text.skip,
    **options,
  )
  print(f'{path}: {trained.size:,} ids with sentinels.')
  return str(path)


def _words(
  text: _Text,
  subwords: str,
  vocabulary: base_vocabulary.Vocabulary,
  num_experts: int,
) -> str:
  """The words that get experts, which are counted if that was not done."""
  path = _words_path(text)
  if path.exists():
    return str(path)
  options: dict[str, Any] = {
    'num_experts': num_experts,
    **_sentinels(subwords, vocabulary),
  }
  text.say('build-routing-vocabulary', path, vocabulary=subwords, **options)
  build_routing_vocabulary.build_routing_vocabulary(
    os.fspath(path),
    text.files,
    subwords,
    field=text.field,
    skip_bad_records=text.skip,
    **options,
  )
  return str(path)


def _cache(
  text: _Text,
  subwords: str,
  vocabulary: base_vocabulary.Vocabulary,
  kind: str,
) -> None:
  """Builds the token cache of the text, or finds that it is built."""
  path = text.data / 'cache' / _CACHE
  sentinels = _sentinels(subwords, vocabulary)
  text.say('cache-task', path, kind=kind, vocabulary=subwords, **sentinels)
  source = cache_task.FILES_OF_KIND[kind]
  with show_progress.counting('records') as progress:
    cache = cache_task.cache_task(
      path,
      subwords,
      source(files=text.files, field=text.field),
      # What it was made of was compared before.
      overwrite=True,
      progress=progress,
      skip_bad_records=text.skip,
      **sentinels,
    )
  print(cache_task.describe(cache, vocabulary))
