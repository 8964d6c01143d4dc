"""Tests a seqio task that is streamed: keys, resuming, evaluation, errors."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

seqio = pytest.importorskip('seqio')

import tensorflow as tf

from mowe.data import batch_source, seqio_stream
from mowe.words import byte_vocabulary, sentencepiece_vocabulary

_BYTES = byte_vocabulary.ByteVocabulary()
_LENGTHS = {'inputs': 10, 'targets': 7}
_EXAMPLES = [([7, 8, 5], [3, 9]), ([8, 4, 9, 3], [4]), ([6], [5, 5])]


@pytest.fixture(scope='module', autouse=True)
def numbers():
  """A task of three examples of numbers, which needs no text."""

  def read(split, shuffle_files=False, seed=None):
    return tf.data.Dataset.from_generator(
      lambda: ({'inputs': i, 'targets': t} for i, t in _EXAMPLES),
      output_signature={
        name: tf.TensorSpec([None], tf.int32) for name in _LENGTHS
      },
    )

  feature = seqio.Feature(seqio_stream.seqio_vocabulary(_BYTES))
  seqio.TaskRegistry.add(
    'numbers',
    source=seqio.FunctionDataSource(read, splits=('train',)),
    preprocessors=[seqio.preprocessors.append_eos],
    output_features={name: feature for name in _LENGTHS},
  )
  seqio.MixtureRegistry.add('number_mixture', [('numbers', 1.0)])
  yield
  seqio.MixtureRegistry.remove('number_mixture')
  seqio.TaskRegistry.remove('numbers')


def _rows(*groups):
  return [
    [tuple(np.array([*part, 1]) for part in _EXAMPLES[i]) for i in group]
    for group in groups
  ]


@pytest.mark.slow
@pytest.mark.parametrize('pack', [False, True])
def test_a_stream_and_our_batches_agree(pack):
  stream = seqio_stream.SeqioBatches(
    'numbers', 1, _LENGTHS, pack=pack, shuffle=False
  )
  batch = next(stream.from_step(0))
  rows = _rows([0, 1]) if pack else _rows([0])
  expected = batch_source.make_batch(rows, _LENGTHS, segments=pack)
  assert batch.keys() == expected.keys()
  for key in batch:
    np.testing.assert_array_equal(batch[key], expected[key], err_msg=key)
    assert batch[key].dtype == expected[key].dtype


@pytest.mark.slow
def test_starting_later_skips():
  stream = seqio_stream.SeqioBatches('number_mixture', 2, _LENGTHS, seed=5)
  whole = list(itertools.islice(stream.from_step(0), 6))
  part = list(itertools.islice(stream.from_step(4), 2))
  for expected, actual in zip(whole[4:], part, strict=True):
    for key in expected:
      np.testing.assert_array_equal(actual[key], expected[key])


def test_evaluation_ends_with_padding():
  stream = seqio_stream.SeqioBatches('numbers', 2, _LENGTHS)
  first, last = stream.eval_batches()
  assert first['encoder_input_tokens'][:, 0].tolist() == [7, 8]
  assert last['encoder_input_tokens'][:, 0].tolist() == [6, 0]
  assert last['decoder_loss_weights'].sum(axis=1).tolist() == [3, 0]


def test_bytes_have_the_same_ids_in_seqio():
  vocabulary = seqio_stream.seqio_vocabulary(_BYTES)
  assert vocabulary.vocab_size == _BYTES.size
  assert vocabulary.encode('où?') == _BYTES.encode('où?')
  assert vocabulary.eos_id == _BYTES.eos_id


def test_a_task_without_placeholder_is_cached_finished(tmp_path):
  cache = seqio_stream.cache_seqio_task('numbers', tmp_path / 'c', _BYTES)
  assert cache.tokens('inputs', 1).tolist() == [8, 4, 9, 3, 1]
  assert cache.tokens('targets', 2).tolist() == [5, 5, 1]


def test_a_sentencepiece_file_is_known_by_its_digest(tmp_path):
  texts = ['the cat sat on the mat', 'a dog ate the cat', 'dogs and mats']
  # The vocabularies have equal sizes, so only their digests differ.
  ours, other = (
    sentencepiece_vocabulary.train_sentencepiece(
      texts, tmp_path / f'{kind}.model', 20, model_type=kind
    )
    for kind in ('unigram', 'bpe')
  )
  feature = seqio.Feature(seqio_stream.seqio_vocabulary(ours))
  seqio.TaskRegistry.add(
    'sentences',
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files=False, seed=None: (
        tf.data.Dataset.from_tensor_slices({'targets': texts})
      ),
      splits=('train',),
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos,
    ],
    output_features={'targets': feature},
  )
  try:
    cache = seqio_stream.cache_seqio_task('sentences', tmp_path / 'c', ours)
    found = cache.tokens('targets', 1).tolist()
    assert found == [*ours.encode(texts[1]), ours.eos_id]
    with pytest.raises(ValueError, match="that of the task 'sentences'"):
      seqio_stream.cache_seqio_task('sentences', tmp_path / 'd', other)
  finally:
    seqio.TaskRegistry.remove('sentences')


def test_errors_say_what_to_do(tmp_path):
  # Other tests may have registered more than the message has room for.
  names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  assert 'numbers' in names
  with pytest.raises(ValueError, match=f"'no_task' is not.*'{min(names)}'"):
    seqio_stream.SeqioBatches('no_task', 2, _LENGTHS)
  with pytest.raises(ValueError, match=r"has \['train'\]"):
    seqio_stream.SeqioBatches('numbers', 2, _LENGTHS, split='test')
  with pytest.raises(ValueError, match=r"mixture of \['numbers'\]"):
    seqio_stream.cache_seqio_task('number_mixture', tmp_path / 'c', _BYTES)
  with pytest.raises(ValueError, match="that of the task 'numbers'"):
    seqio_stream.cache_seqio_task(
      'numbers', tmp_path / 'c', byte_vocabulary.ByteVocabulary(3)
    )


def test_tensorflow_has_no_accelerator():
  seqio_stream.import_seqio()
  assert tf.config.get_visible_devices('GPU') == []


def test_importing_the_data_room_loads_no_tensorflow():
  code = (
    'import sys\n'
    'from mowe.commands import cache_task\n'
    'from mowe.data import batch_source, prefetch, seqio_stream\n'
    'from mowe.data.text import generated_world\n'
    'bad = {"tensorflow", "seqio", "jax", "gin"} & set(sys.modules)\n'
    'assert not bad, bad\n'
    'sys.modules["tensorflow"] = None\n'
    'try:\n'
    '  seqio_stream.SeqioBatches("a", 1, {})\n'
    'except ImportError as error:\n'
    '  assert "mowe[tasks]" in str(error), error\n'
    'else:\n'
    '  raise AssertionError\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
