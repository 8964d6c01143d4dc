"""Reads a seqio task or mixture as batches, or writes it to a token cache.

TensorFlow and seqio are imported inside of functions, so that importing this
module costs nothing, and training from a token cache never loads them.
TensorFlow is kept off the accelerators, which belong to JAX.
"""

import dataclasses
import os
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mowe.data import batch_source
from mowe.data.caches import cache_builders, token_cache
from mowe.words import (
  base_vocabulary,
  byte_vocabulary,
  sentencepiece_vocabulary,
)

Batch = batch_source.Batch


def import_seqio() -> tuple[types.ModuleType, types.ModuleType]:
  """Returns the modules tensorflow, without its accelerators, and seqio.

  Raises:
    ModuleNotFoundError: one of them is not installed.
  """
  try:
    import seqio
    import tensorflow as tf
  except ImportError as error:
    raise ModuleNotFoundError(
      'A seqio task needs the packages tensorflow, tensorflow-datasets and '
      f"seqio, but {error}. Install them with `pip install 'mowe[tasks]'` (in "
      "a checkout `pip install -e '.[tasks]'`), or read your own files into a "
      'token cache, which needs none of them: `mowe cache-task --help`.'
    ) from error
  try:
    tf.config.set_visible_devices([], 'GPU')
    tf.config.set_visible_devices([], 'TPU')
  except RuntimeError:
    # TensorFlow was used before and has already taken its devices.
    pass
  return tf, seqio


def seqio_vocabulary(subwords: base_vocabulary.Vocabulary) -> Any:
  """Returns the seqio vocabulary with the same ids as `subwords`."""
  _, seqio = import_seqio()
  if isinstance(subwords, byte_vocabulary.ByteVocabulary):
    return seqio.ByteVocabulary(extra_ids=subwords.extra_ids)
  if not isinstance(subwords, sentencepiece_vocabulary.SentencePieceVocabulary):
    raise ValueError(
      'A seqio task needs a SentencePiece or byte vocabulary, but got a '
      f'{type(subwords).__name__}. Cache the text with `mowe cache-task` '
      'instead.'
    )
  return seqio.SentencePieceVocabulary(
    subwords.path, extra_ids=subwords.extra_ids
  )


@dataclasses.dataclass(frozen=True)
class SeqioBatches(batch_source.BatchSource):
  """Batches of a seqio task or mixture, read as a stream.

  A stream has no random access: to start at a step, all batches before it are
  read and dropped. A token cache can start anywhere at once.

  Attributes:
    name: name of a registered task or mixture.
    batch_size: number of rows of a batch.
    feature_lengths: number of tokens of 'inputs' and 'targets' in a row, EOS
      included.
    split: name of the split to read.
    seed: seed of shuffling and of random preprocessing.
    pack: puts several examples into a row.
    is_one_stack: makes batches for a model with one stack, with inputs, if the
      task has some, and targets in one row.
    shuffle: reads examples in a random order.
    use_cached: reads seqio's own offline cache.

  Raises:
    ValueError: no task or mixture has this name, or it has no such split.
  """

  name: str
  batch_size: int
  feature_lengths: Mapping[str, int]
  split: str = 'train'
  seed: int = 0
  pack: bool = False
  is_one_stack: bool = False
  shuffle: bool = True
  use_cached: bool = False

  def __post_init__(self):
    _find(self.name, self.split)

  def from_step(self, first_step: int = 0) -> Iterator[Batch]:
    """Yields the batches from `first_step` on, without end.

    Raises:
      ValueError: the stream holds no example.
    """
    dataset = self._dataset(num_epochs=None, shuffle=self.shuffle)
    dataset = dataset.batch(self.batch_size, drop_remainder=True)
    found = False
    for batch in dataset.skip(first_step).as_numpy_iterator():
      found = True
      yield _as_batch(batch)
    if not found:
      raise ValueError(
        f'The split {self.split!r} of {self.name!r} must hold at least one '
        'example, but holds none after its preprocessing. Check its files and '
        'the feature lengths.'
      )

  def eval_batches(self) -> Iterator[Batch]:
    """Yields batches with every example once, in order.

    The last batch is filled up with padding.
    """
    dataset = self._dataset(num_epochs=1, shuffle=False)
    for batch in dataset.batch(self.batch_size).as_numpy_iterator():
      batch = _as_batch(batch)
      missing = self.batch_size - len(batch['decoder_target_tokens'])
      yield {
        key: np.pad(array, ((0, missing), (0, 0)))
        for key, array in batch.items()
      }

  def _converter(self, seqio: types.ModuleType) -> Any:
    if not self.is_one_stack:
      return seqio.EncDecFeatureConverter(pack=self.pack)
    if 'inputs' in self.feature_lengths:
      return seqio.PrefixLMFeatureConverter(pack=self.pack)
    return seqio.LMFeatureConverter(pack=self.pack)

  def _dataset(self, num_epochs: int | None, shuffle: bool) -> Any:
    tf, seqio = import_seqio()
    dataset = seqio.get_dataset(
      self.name,
      task_feature_lengths=dict(self.feature_lengths),
      feature_converter=self._converter(seqio),
      dataset_split=self.split,
      use_cached=self.use_cached,
      shuffle=shuffle,
      num_epochs=num_epochs,
      seed=self.seed,
      verbose=False,
    )
    options = tf.data.Options()
    options.deterministic = True
    return dataset.with_options(options)


def cache_seqio_task(
  name: str,
  path: str | os.PathLike,
  subwords: base_vocabulary.Vocabulary,
  *,
  split: str = 'train',
  seed: int = 0,
  overwrite: bool = False,
  progress: cache_builders.Progress | None = None,
) -> token_cache.TokenCache:
  """Writes the token cache of a seqio task.

  The cache holds the features at the task's CacheDatasetPlaceholder, before any
  noise; if the task has no placeholder, the finished and untrimmed features.
  EOS is added where it is missing. Other fields, such as 'answers', are kept as
  records. A seqio source has no digest, so that the fingerprint names its task
  and split alone.

  Args:
    name: name of a registered task. A mixture is cached task by task.
    path: the folder to write.
    subwords: the vocabulary of the task.
    split: name of the split to read.
    seed: seed of random preprocessing before the placeholder, if there is any.
    overwrite: replaces a cache at `path` that was made from other things.
    progress: called with the number of examples done so far; None reports
      nothing.

  Returns:
    The cache, opened. An existing cache is opened if it was made from the same
    things.

  Raises:
    ValueError: there is no such task or split, the task has another vocabulary,
      or it has no example.
  """
  _, seqio = import_seqio()
  task = _find(name, split)
  if not isinstance(task, seqio.Task):
    raise ValueError(
      f'Only a task can be cached, but {name!r} is a mixture of '
      f'{[part.name for part in task.tasks]}. Cache each of these tasks.'
    )
  _check_same_vocabulary(task, subwords)
  source = {'seqio_task': name, 'split': split, 'seed': seed}
  recipe = _recipe(task, source, subwords)
  finished = token_cache.find_finished(path, recipe, overwrite)
  if finished is not None:
    return finished
  done = 0
  with token_cache.build_cache(path, recipe) as writer:
    names = None
    for group in _groups(_precache_examples(task, split, seed)):
      names = names or _cached_features(task, group[0])
      examples = [_split_example(names, one, subwords) for one in group]
      writer.add(
        {
          feature: cache_builders.flatten([one[feature] for one, _ in examples])
          for feature in examples[0][0]
        },
        [record for _, record in examples],
      )
      done += len(group)
      if progress is not None:
        progress(done)
  return token_cache.TokenCache.open(path)


def _recipe(
  task: Any, source: dict[str, Any], subwords: base_vocabulary.Vocabulary
) -> dict[str, Any]:
  recipe = {
    'format_version': token_cache.FORMAT_VERSION,
    'kind': 'seqio',
    'vocabulary': token_cache.describe_vocabulary(subwords),
    'sources': [source],
    'fields': sorted(task.output_features),
  }
  # A metric of another task may be an object that is no function.
  functions = [
    metric
    for metric in task.metric_fns
    if isinstance(metric, types.FunctionType)
  ]
  if any(function.__name__ == 'trivia_qa' for function in functions):
    recipe['metric'] = 'trivia_qa'
  return recipe


def _find(name: str, split: str) -> Any:
  _, seqio = import_seqio()
  try:
    found = seqio.get_mixture_or_task(name)
  except ValueError as error:
    names = sorted(
      [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    )
    raise ValueError(
      f'A seqio task or mixture must be registered before it is used, but '
      f'{name!r} is not; registered are {names[:20]}. Import the module that '
      'registers it, or call its register function.'
    ) from error
  if split not in found.splits:
    raise ValueError(
      f'{name!r} must have the split {split!r}, but has '
      f'{sorted(found.splits)}. Choose one of these.'
    )
  return found


def _as_batch(batch: Mapping[str, np.ndarray]) -> Batch:
  return {
    key: array.astype(np.float32 if key.endswith('_weights') else np.int32)
    for key, array in batch.items()
  }


def _check_same_vocabulary(
  task: Any, subwords: base_vocabulary.Vocabulary
) -> None:
  tf, seqio = import_seqio()
  for feature in task.output_features.values():
    vocabulary = feature.vocabulary
    model = None
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
      # The digest is that of the file and not of sp_model, because seqio adds
      # the sentinels to what it loads.
      path = vocabulary.sentencepiece_model_file
      model = tf.io.gfile.GFile(path, 'rb').read()
    same = vocabulary.vocab_size == subwords.size and (
      model is None or token_cache.digest_of(model) == subwords.sha256
    )
    if not same:
      raise ValueError(
        f'The vocabulary must be that of the task {task.name!r}, '
        f'{vocabulary} of {vocabulary.vocab_size} ids, but has '
        f'{subwords.size} ids and sha256 {subwords.sha256[:12]}. Give the '
        'vocabulary that the task was registered with.'
      )


def _precache_examples(task: Any, split: str, seed: int) -> Iterator[dict]:
  if task.supports_caching:
    dataset = task.source.get_dataset(split=split, shuffle=False, seed=seed)
    dataset = task.preprocess_precache(dataset, seed=seed)
  else:
    dataset = task.get_dataset(
      sequence_length=None, split=split, shuffle=False, seed=seed
    )
  return dataset.as_numpy_iterator()


def _groups(examples: Iterator[dict], size: int = 512) -> Iterator[list[dict]]:
  group = []
  for example in examples:
    group.append(example)
    if len(group) == size:
      yield group
      group = []
  if group:
    yield group


def _cached_features(task: Any, example: Mapping[str, Any]) -> list[str]:
  """Returns the names of the features to be cached.

  A pretraining task has no inputs before its noise, or empty ones (as in T5).
  """
  return [
    name
    for name in task.output_features
    if name in example and (name == 'targets' or len(example[name]))
  ]


def _split_example(
  names: list[str],
  example: Mapping[str, Any],
  subwords: base_vocabulary.Vocabulary,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns the features with EOS, and the other fields as JSON values."""
  features = {}
  for name in names:
    tokens = np.asarray(example[name], np.int32)
    if not len(tokens) or tokens[-1] != subwords.eos_id:
      tokens = np.append(tokens, np.int32(subwords.eos_id))
    features[name] = tokens
  if 'inputs' in names:
    others = example.keys() - features.keys()
    return features, {name: as_json(example[name]) for name in sorted(others)}
  if 'spans' in example:
    features['spans'] = np.asarray(example['spans'], np.int32).reshape(-1)
  return features, {}  # The text itself is in the tokens.


def as_json(value: Any) -> Any:
  """Returns a field of an example as a value of JSON: texts, numbers, lists."""
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if isinstance(value, np.ndarray | np.generic):
    return as_json(value.tolist())
  if isinstance(value, list):
    return [as_json(item) for item in value]
  if isinstance(value, dict):
    return {key: as_json(item) for key, item in value.items()}
  return value
