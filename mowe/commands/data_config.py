"""The examples that a run reads: token caches, or any seqio mixture."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from mowe.data import batch_source, lm_batches, lm_tasks, text_tasks
from mowe.data.caches import token_cache
from mowe.evaluation import inference
from mowe.models import model_config

# A folder that holds this file is a token cache.
_CACHE_FILE = 'cache.json'

# Kinds of token caches that hold finished inputs and targets.
_TEXT_TO_TEXT = ('questions', 'text_to_text')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Examples, and how they are made into batches.

  Attributes:
    mixture_or_task_name: the folder of a token cache below `cache_dir`;
      several folders with their rates, such as {'a': 0.7, 'b': 0.3}; or the
      name of a seqio mixture or task.
    task_feature_lengths: maximum number of tokens of 'inputs' and of
      'targets', EOS included. A model with one stack reads both in one row. A
      task of language modeling has only 'targets'.
    batch_size: number of rows of a batch.
    cache_dir: the folder of the token caches; None: the working folder.
    use_cached_tasks: whether to read token caches; if not, seqio streams the
      task.
    objective: makes a task from a token cache of text, such as
      `text_tasks.SpanCorruptionTask`, `text_tasks.SalientSpanTask`, or for
      language models one of `lm_tasks`.
    pack: whether a row holds several examples.
    split: the split of a seqio mixture to read.
    seed: the seed for the order of examples and for masking.
    trial_steps: number of trial batches, which are looked at before a run to
      size the expert plan.
    registered_tasks: not read. A gin file calls here the functions that
      register its seqio tasks, such as `(@pretraining.register_tfds_tasks(),)`.
  """

  mixture_or_task_name: str | Mapping[str, float]
  task_feature_lengths: Mapping[str, int]
  batch_size: int
  cache_dir: str | None = None
  use_cached_tasks: bool = True
  objective: Callable[..., text_tasks.Task] = text_tasks.SpanCorruptionTask
  pack: bool = False
  split: str = 'train'
  seed: int = 0
  trial_steps: int = 20
  registered_tasks: Any = None

  def __post_init__(self):
    lengths = self.task_feature_lengths
    if 'targets' not in lengths or not set(lengths) <= {'inputs', 'targets'}:
      raise ValueError(
        'task_feature_lengths, the macro TASK_FEATURE_LENGTHS, must have the '
        "names 'inputs' and 'targets', or 'targets' alone for language models, "
        f'but is {dict(lengths)}. Correct the names.'
      )

  def check_streams(self, model: model_config.ModelConfig) -> None:
    """Raises ValueError unless all streams of a model have a length."""
    if 'encoder' in model.streams and 'inputs' not in self.task_feature_lengths:
      raise ValueError(
        'A model with an encoder must have a length of its inputs, but '
        'task_feature_lengths, the macro TASK_FEATURE_LENGTHS, is '
        f"{dict(self.task_feature_lengths)}. Add 'inputs'."
      )

  def open(
    self, vocabulary: Any, model: model_config.ModelConfig
  ) -> batch_source.BatchSource:
    """Opens the batches that a model reads.

    Args:
      vocabulary: the subword vocabulary of the model.
      model: the config of the model.

    Raises:
      FileNotFoundError: there is no such token cache.
      ValueError: a cache was made with another subword vocabulary, or the task
        does not fit the model.
    """
    is_one_stack = 'encoder' not in model.streams
    if not self.use_cached_tasks:
      _check_memory(model, False)
      # Imported only here: seqio and TensorFlow take seconds to load.
      from mowe.data import seqio_stream

      return seqio_stream.SeqioBatches(
        self.mixture_or_task_name,
        self.batch_size,
        self.task_feature_lengths,
        split=self.split,
        seed=self.seed,
        pack=self.pack,
        is_one_stack=is_one_stack,
      )
    pairs = [
      (self._task(cache, name), rate)
      for name, rate in self._rates().items()
      for cache in [self.open_cache(name, vocabulary)]
    ]
    contiguous = [
      task for task, _ in pairs if isinstance(task, lm_tasks.ContiguousText)
    ]
    _check_memory(model, bool(contiguous))
    if contiguous:
      self._check_contiguous(pairs, is_one_stack)
      return lm_batches.ContiguousBatches(contiguous[0], self.batch_size)
    return batch_source.Batches(
      pairs,
      self.batch_size,
      self.task_feature_lengths,
      seed=self.seed,
      pack=self.pack,
      make_batch_of=lm_batches.make_batch if is_one_stack else None,
    )

  def _check_contiguous(self, pairs, is_one_stack):
    """Raises ValueError unless contiguous text can be read as it is set up."""
    if len(pairs) > 1 or self.pack or not is_one_stack:
      raise ValueError(
        'Contiguous text must come from one task, without packing, for a model '
        f'with one stack, but there are {len(pairs)} tasks, pack is '
        f'{self.pack}, and the model has {"one" if is_one_stack else "two"}. '
        'Set OBJECTIVE = @lm_tasks.LanguageModelTask for text in any order.'
      )

  def open_cache(self, name: str, vocabulary: Any) -> token_cache.TokenCache:
    """Opens the token cache of one task.

    Raises:
      FileNotFoundError: there is no such token cache.
      ValueError: the cache was made with another subword vocabulary.
    """
    path = pathlib.Path(self.cache_dir or '.').expanduser() / name
    if not path.is_dir():
      folder = path.parent
      found = sorted(
        str(summary.parent.relative_to(folder))
        for summary in folder.glob(f'*/{_CACHE_FILE}')
      )
      raise FileNotFoundError(
        f'A task must have a token cache at {path}, but the caches in '
        f'{folder} are {found}. Build it with `mowe cache-task`, or set '
        'USE_CACHED_TASKS = False to stream it with seqio.'
      )
    return token_cache.TokenCache.open(path, vocabulary)

  def open_verified(self, name: str, vocabulary: Any) -> token_cache.TokenCache:
    """Opens a token cache, and compares its files with their digests.

    Raises:
      FileNotFoundError: see `open_cache`.
      ValueError: see `open_cache`, or a file has changed.
    """
    cache = self.open_cache(name, vocabulary)
    cache.verify()
    return cache

  def caches(self, vocabulary: Any) -> list[token_cache.TokenCache]:
    """Opens all token caches that training reads; none of seqio tasks."""
    if not self.use_cached_tasks:
      return []
    return [self.open_cache(name, vocabulary) for name in self._rates()]

  def make_generator(
    self, model: nn.Module, params: Any, **options: Any
  ) -> inference.Generator:
    """Makes a Generator whose batch size and lengths are those of the data.

    Args:
      model: the Linen module.
      params: its parameters, expert tables included.
      **options: other fields of the Generator, such as `strategy`.
    """
    lengths = self.task_feature_lengths
    return inference.Generator(
      model,
      params,
      batch_size=self.batch_size,
      max_target_length=lengths['targets'],
      input_lengths=(lengths.get('inputs', 0),),
      **options,
    )

  def describe(self, vocabulary: Any) -> dict[str, Any]:
    """Describes everything that must not change when a run is resumed."""
    described = {
      'batch_size': self.batch_size,
      'task_feature_lengths': dict(self.task_feature_lengths),
      'pack': self.pack,
      'seed': self.seed,
    }
    if not self.use_cached_tasks:
      return described | {'task': self.mixture_or_task_name}
    described |= {'rates': self._rates(), 'fingerprints': {}, 'tasks': {}}
    for name in self._rates():
      cache = self.open_cache(name, vocabulary)
      described['fingerprints'][name] = cache.fingerprint
      described['tasks'][name] = _settings(self._task(cache, name))
    return described

  def _rates(self) -> dict[str, float]:
    if isinstance(self.mixture_or_task_name, str):
      return {self.mixture_or_task_name: 1.0}
    return dict(self.mixture_or_task_name)

  def _task(self, cache: token_cache.TokenCache, name: str) -> text_tasks.Task:
    make = self.objective
    if cache.kind in _TEXT_TO_TEXT:
      make = text_tasks.TextToTextTask
    return make(cache, self.task_feature_lengths, name=name)


def _check_memory(model: model_config.ModelConfig, is_contiguous: bool) -> None:
  """Raises ValueError if a model with a memory reads rows in any order."""
  if model.memory_length and not is_contiguous:
    raise ValueError(
      'A model with a memory must read contiguous text, but memory_length is '
      f'{model.memory_length} and the task draws its rows from anywhere. Set '
      'OBJECTIVE = @lm_tasks.ContiguousText, or memory_length = 0.'
    )


def _settings(task: text_tasks.Task) -> dict[str, Any]:
  """The class of a task, and its settings, such as the noise density."""
  return {'class': type(task).__name__} | {
    field.name: getattr(task, field.name)
    for field in dataclasses.fields(task)
    if field.name not in ('cache', 'feature_lengths', 'name')
  }
