"""seqio pretraining tasks: span corruption, salient spans, language modeling.

`register_text_task` registers tasks over local text or JSON-lines files, and
`register_tfds_tasks` tasks over TFDS: C4, and Wikipedia sentences with tagged
entities. The noise is that of `mowe.data.text.span_corruption`, so that a
stream and a token cache give the same kind of examples. Importing this module
registers nothing and reads no file. The T5 vocabulary is not part of mowe and
is given by its path.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mowe.data import seqio_stream
from mowe.data.caches import cache_builders
from mowe.data.text import (
  record_fields,
  salient_spans,
  span_corruption,
  text_files,
)
from mowe.words import base_vocabulary, subword_vocabularies

tf, seqio = seqio_stream.import_seqio()

OBJECTIVES = ('span_corruption', 'salient_spans', 'language_model')
_TEXTS_PER_STREAM = 128  # Number of texts joined before they are cut, as in T5.

Files = str | Sequence[str] | Mapping[str, str | Sequence[str]]
Vocabulary = str | os.PathLike | base_vocabulary.Vocabulary


def register_text_task(
  name: str,
  files: Files,
  vocabulary: Vocabulary,
  objective: str = 'span_corruption',
  field: str = 'text',
  noise_density: float = span_corruption.NOISE_DENSITY,
) -> Any:
  """Registers pretraining on local files.

  Args:
    name: name of the new task.
    files: patterns of the files of the split 'train', as in
      `text_files.read_records`, or a mapping from splits to patterns.
    vocabulary: a SentencePiece file, 'bytes', or a loaded vocabulary.
    objective: 'span_corruption', 'salient_spans', or 'language_model', which is
      running text without inputs, for models with one stack.
    field: name of the field that holds the text. A field 'spans' replaces the
      spans that the rule finds.
    noise_density: fraction of the tokens that is masked.

  Returns:
    The task.

  Raises:
    ValueError: the objective is unknown, no file matches, or the name is in
      use.
  """
  if not isinstance(files, Mapping):
    files = {'train': files}
  for patterns in files.values():
    text_files.match_files(patterns)

  def records(split):
    fields = record_fields.all_texts([field])
    for record in text_files.read_records(files[split], fields):
      spans = np.asarray(record.get('spans') or [], np.int32).reshape(-1)
      own = record.get('spans') is not None
      yield {'text': record[field], 'char_spans': spans, 'has_spans': own}

  def read(split, shuffle_files=False, seed=None):
    del shuffle_files, seed  # seqio.Task shuffles examples, not files.
    return tf.data.Dataset.from_generator(
      functools.partial(records, split),
      output_signature={
        'text': tf.TensorSpec([], tf.string),
        'char_spans': tf.TensorSpec([None], tf.int32),
        'has_spans': tf.TensorSpec([], tf.bool),
      },
    )

  source = seqio.FunctionDataSource(read, splits=tuple(files))
  return _register(name, source, [], vocabulary, objective, noise_density)


def register_tfds_tasks(
  vocabulary: Vocabulary, c4_version: str = '3.1.0'
) -> list[str]:
  """Registers the TFDS tasks, unless they are registered already.

  The tasks c4_span_corruption and c4_salient_spans read c4/en with its splits
  train and validation; a rule finds the salient spans. The task
  wikipedia_salient_spans reads salient_span_wikipedia/sentences (Guu et al.
  2020) with its split train, whose spans are from a trained tagger.

  Returns:
    The names of the tasks.
  """
  # Splits are named here, because TFDS does not know them before it has
  # prepared the data.
  c4 = seqio.TfdsDataSource(
    tfds_name=f'c4/en:{c4_version}', splits=('train', 'validation')
  )
  wikipedia = seqio.TfdsDataSource(
    tfds_name='salient_span_wikipedia/sentences:1.0.0', splits=('train',)
  )
  tasks = {
    'c4_span_corruption': (c4, [_text_alone], 'span_corruption'),
    'c4_salient_spans': (c4, [_text_alone], 'salient_spans'),
    'wikipedia_salient_spans': (wikipedia, [_tagged_spans], 'salient_spans'),
  }
  for name, (source, preprocessors, objective) in tasks.items():
    if name not in seqio.TaskRegistry.names():
      _register(name, source, preprocessors, vocabulary, objective)
  return list(tasks)


def _register(
  name: str,
  source: Any,
  preprocessors: Sequence[Any],
  vocabulary: Vocabulary,
  objective: str,
  noise_density: float = span_corruption.NOISE_DENSITY,
) -> Any:
  if objective not in OBJECTIVES:
    raise ValueError(
      f'objective must be one of {OBJECTIVES}, but is {objective!r}. '
      'Choose one of these.'
    )
  if isinstance(vocabulary, str | os.PathLike):
    vocabulary = subword_vocabularies.load_subwords(vocabulary)
  salient = objective == 'salient_spans'
  names = ('inputs', 'targets')
  noise = functools.partial(
    _mask_salient if salient else _corrupt_spans,
    subwords=vocabulary,
    noise_density=noise_density,
  )
  last = [seqio.preprocessors.append_eos_after_trim]
  if objective == 'language_model':
    # An EOS stands after each text, not after each row.
    names, last = ('targets',), []
    noise = functools.partial(_cut_rows, subwords=vocabulary)
  features = {
    feature: seqio.Feature(
      seqio_stream.seqio_vocabulary(vocabulary), add_eos=bool(last)
    )
    for feature in names
  }
  return seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[
      *preprocessors,
      functools.partial(_encode, subwords=vocabulary, with_spans=salient),
      seqio.CacheDatasetPlaceholder(),
      noise,
      *last,
    ],
    output_features=features,
  )


@seqio.map_over_dataset
def _text_alone(example):
  empty = tf.zeros([0], tf.int32)
  return {'text': example['text'], 'char_spans': empty, 'has_spans': False}


@seqio.map_over_dataset
def _tagged_spans(example):
  def to_characters(text, starts, limits):
    # The tagger counted bytes, and spans here count characters.
    bounds = np.stack([starts, limits], axis=1).reshape(-1).tolist()
    places = [len(text[:place].decode('utf-8', 'ignore')) for place in bounds]
    return np.asarray(places, np.int32)

  spans = example['spans']
  found = tf.numpy_function(
    to_characters, [example['text'], spans['start'], spans['limit']], tf.int32
  )
  found = tf.ensure_shape(found, [None])
  return {'text': example['text'], 'char_spans': found, 'has_spans': True}


def _encode(
  dataset: Any, subwords: base_vocabulary.Vocabulary, with_spans: bool
) -> Any:
  """Tokenises texts to 'targets' without EOS and, if wanted, to 'spans'."""

  def encode(text, char_spans, has_spans):
    text = text.decode('utf-8', 'replace')
    if not with_spans:
      ids = np.asarray(subwords.encode(text), np.int32)
      return ids, np.zeros([0], np.int32)
    record = {'text': text}
    if has_spans:
      record['spans'] = char_spans.reshape(-1, 2).tolist()
    ids, starts, ends = subwords.encode_with_offsets(text)
    spans = cache_builders.token_spans(
      text, salient_spans.spans_of_record(record), ids, starts, ends, subwords
    )
    return np.asarray(ids, np.int32), spans.reshape(-1)

  @seqio.map_over_dataset
  def encode_one(example):
    ids, spans = tf.numpy_function(
      encode,
      [example['text'], example['char_spans'], example['has_spans']],
      [tf.int32, tf.int32],
    )
    ids, spans = tf.ensure_shape(ids, [None]), tf.ensure_shape(spans, [None])
    return {'targets': ids} | ({'spans': spans} if with_spans else {})

  return encode_one(dataset).filter(
    lambda example: tf.size(example['targets']) > 0
  )


def _corrupt_spans(
  dataset: Any,
  sequence_length: Mapping[str, int],
  subwords: base_vocabulary.Vocabulary,
  noise_density: float,
) -> Any:
  """Joins texts with EOS between, cuts them to the lengths, masks spans."""
  length = span_corruption.tokens_that_fill(
    sequence_length['inputs'], sequence_length['targets'], noise_density
  )
  sentinels = subwords.sentinels

  def corrupt(tokens, seed):
    rng = np.random.default_rng(seed.astype(np.uint32).tolist())
    spans = span_corruption.random_spans(len(tokens), rng, noise_density)
    return span_corruption.mask_spans(tokens, spans, sentinels)

  @seqio.map_over_dataset(num_seeds=1)
  def corrupt_one(tokens, seed):
    return _masked(tf.numpy_function(corrupt, [tokens, seed], [tf.int32] * 2))

  chunks = _chunks(dataset, length, subwords)
  # A chunk of one token cannot be corrupted.
  return corrupt_one(chunks.filter(lambda tokens: tf.size(tokens) >= 2))


def _cut_rows(
  dataset: Any,
  sequence_length: Mapping[str, int],
  subwords: base_vocabulary.Vocabulary,
) -> Any:
  """Joins texts with EOS between, and cuts them to fill the targets."""
  chunks = _chunks(dataset, sequence_length['targets'], subwords)
  return chunks.map(lambda tokens: {'targets': tokens})


def _chunks(
  dataset: Any, length: int, subwords: base_vocabulary.Vocabulary
) -> Any:
  """Cuts texts, joined with an EOS after each, to pieces of `length` tokens."""

  def with_eos(example):
    return tf.concat([example['targets'], [subwords.eos_id]], axis=0)

  streams = dataset.map(with_eos).ragged_batch(_TEXTS_PER_STREAM)
  return streams.flat_map(
    lambda texts: tf.data.Dataset.from_tensor_slices(texts.flat_values).batch(
      length
    )
  )


def _mask_salient(
  dataset: Any,
  sequence_length: Mapping[str, int],
  subwords: base_vocabulary.Vocabulary,
  noise_density: float,
) -> Any:
  """Masks salient spans, and leaves out texts without one that fits."""
  sentinels = subwords.sentinels

  def mask(tokens, spans, seed):
    rng = np.random.default_rng(seed.astype(np.uint32).tolist())
    tokens, spans = span_corruption.draw_salient(
      tokens,
      spans.reshape(-1, 2),
      rng,
      inputs_length=sequence_length['inputs'],
      targets_length=sequence_length['targets'],
      max_spans=len(sentinels),
      noise_density=noise_density,
    )
    return span_corruption.mask_spans(tokens, spans, sentinels)

  @seqio.map_over_dataset(num_seeds=1)
  def mask_one(example, seed):
    parts = [example['targets'], example['spans'], seed]
    return _masked(tf.numpy_function(mask, parts, [tf.int32] * 2))

  return mask_one(dataset).filter(
    lambda example: tf.size(example['targets']) > 0
  )


def _masked(pair: Any) -> dict[str, Any]:
  inputs, targets = (tf.ensure_shape(part, [None]) for part in pair)
  return {'inputs': inputs, 'targets': targets}
