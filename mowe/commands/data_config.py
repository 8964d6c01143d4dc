"""Which examples a run reads: token caches, or any seqio mixture."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import linen as nn

from mowe.data import batch_source, lm_batches, text_tasks
from mowe.data.caches import token_cache
from mowe.evaluation import inference
from mowe.models import model_config

# What a folder with a token cache holds.
_CACHE_FILE = 'cache.json'

# Kinds of a cache that hold finished inputs and targets.
_TEXT_TO_TEXT = ('questions', 'text_to_text')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Examples and how they become batches.

  Attributes:
    mixture_or_task_name: folder of a token cache below `cache_dir`, several
      with their rates ({'a': 0.7, 'b': 0.3}), or a seqio mixture or task.
    task_feature_lengths: tokens of 'inputs' and 'targets', EOS included. A
      model with one stack has both in a row, and language models no inputs.
    batch_size: rows of a batch.
    cache_dir: folder of token caches.
    use_cached_tasks: read token caches; otherwise stream with seqio.
    objective: makes a task of a cache of text: `tasks.SpanCorruptionTask`,
      `tasks.SalientSpanTask`, or for language models one of `lm_tasks`.
    pack: several examples in a row.
    split: the split of a seqio mixture that is read.
    seed: the seed for the order of examples and for masking.
    trial_steps: batches looked at before a run, to size the expert plan.
    registered_tasks: not read. A gin file calls here what registers its seqio
      tasks, such as `(@pretraining.register_tfds_tasks(),)`.
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

  def open(self, vocabulary: Any, model: model_config.ModelConfig) -> Any:
    """The batches that a model reads.

    Raises:
      ValueError: a cache was made with another subword vocabulary, or the task
        does not fit the model.
    """
    is_one_stack = 'encoder' not in model.streams
    if not self.use_cached_tasks:
      _check_memory(model, False)
      # Only here: seqio and TensorFlow take seconds to load.
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
      task for task, _ in pairs if getattr(task, 'is_contiguous', False)
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
      of_rows=lm_batches.make_batch if is_one_stack else None,
    )

  def _check_contiguous(self, pairs, is_one_stack):
    if len(pairs) > 1 or self.pack or not is_one_stack:
      raise ValueError(
        'Text in its order must be that of one task, not packed, for a model '
        f'with one stack, but there are {len(pairs)} tasks, pack is '
        f'{self.pack}, and the model has {"one" if is_one_stack else "two"}. '
        'Set OBJECTIVE = @lm_tasks.LanguageModelTask for text in any order.'
      )

  def open_cache(self, name: str, vocabulary: Any) -> token_cache.TokenCache:
    """The token cache of one task."""
    path = pathlib.Path(self.cache_dir or '.') / name
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

  def make_generator(
    self, model: nn.Module, params: Any, **options: Any
  ) -> inference.Generator:
    """A Generator in the sizes of these examples; `options`: its others."""
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
    """What must stay the same when a run is resumed."""
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
  if model.memory_length and not is_contiguous:
    raise ValueError(
      'A model with a memory must read text in its order, but memory_length is '
      f'{model.memory_length} and the task draws its rows from anywhere. Set '
      'OBJECTIVE = @lm_tasks.ContiguousText, or memory_length = 0.'
    )


def _settings(task: text_tasks.Task) -> dict[str, Any]:
  """Class and numbers of a task, such as its noise density."""
  return {'class': type(task).__name__} | {
    field.name: getattr(task, field.name)
    for field in dataclasses.fields(task)
    if field.name not in ('cache', 'feature_lengths', 'name')
  }


def batch_maker(batches: Any, first_step: int) -> Callable[[int], Any]:
  """`step -> batch` for a prefetcher that asks for the steps in order."""
  if callable(batches):
    return batches
  stream: Iterator[Any] = batches.from_step(first_step)
  return lambda step: next(stream)
