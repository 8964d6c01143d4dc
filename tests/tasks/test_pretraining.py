"""Tests seqio pretraining tasks on local files and mocked TFDS."""

import json

import numpy as np
import pytest

tfds = pytest.importorskip('tensorflow_datasets')
seqio = pytest.importorskip('seqio')

from mowe.data import seqio_stream
from mowe.data.text import span_corruption
from mowe.words import byte_vocabulary
from tasks import pretraining

_BYTES = byte_vocabulary.ByteVocabulary()
_SENTINEL = _BYTES.sentinel_id(0)
_LENGTHS = {'inputs': 40, 'targets': 24}


@pytest.fixture
def text_file(tmp_path):
  path = tmp_path / 't.jsonl'
  records = [
    {'text': 'It was in Oslo that Ada Byron lived, in 1981.'},
    {'text': 'nothing of note'},
    {'text': 'è, my word', 'spans': [[6, 10]]},
  ]
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


@pytest.fixture
def name(request):
  name = request.node.name.split('[')[0]
  yield name
  seqio.TaskRegistry.remove(name)


def _examples(name, seed=3, lengths=_LENGTHS):
  # TFDS does not mock the count of examples that caching in memory needs.
  dataset = seqio.get_mixture_or_task(name).get_dataset(
    lengths, 'train', shuffle=False, seed=seed, try_in_mem_cache=False
  )
  return [
    (one['inputs'], one['targets']) for one in dataset.as_numpy_iterator()
  ]


def _restored(inputs, targets):
  assert inputs[-1] == targets[-1] == 1
  num_spans = int((targets > _SENTINEL - _BYTES.extra_ids).sum())
  return span_corruption.restore(
    inputs[:-1], targets[:-1], _BYTES.sentinels[:num_spans]
  )


def test_span_corruption_restores_the_stream(text_file, name):
  pretraining.register_text_task(name, text_file, 'bytes')
  examples = _examples(name)
  length = span_corruption.tokens_that_fill(40, 24)
  restored = [_restored(*example) for example in examples]
  assert [len(chunk) for chunk in restored[:-1]] == [length] * (
    len(restored) - 1
  )
  assert {len(inputs) for inputs, _ in examples[:-1]} == {40}
  stream = np.concatenate(restored)
  decoded = [
    _BYTES.decode(part)
    for part in np.split(stream, np.flatnonzero(stream == 1))
  ]
  assert decoded[0] == 'It was in Oslo that Ada Byron lived, in 1981.'
  assert (stream == 1).sum() == 3


def test_running_text_fills_the_rows_of_a_language_model(text_file, name):
  pretraining.register_text_task(
    name, text_file, 'bytes', objective='language_model'
  )
  stream = seqio_stream.SeqioBatches(
    name, 2, {'targets': 16}, is_one_stack=True, shuffle=False
  )
  batches = list(stream.eval_batches())
  assert set(batches[0]) == {
    'decoder_input_tokens',
    'decoder_target_tokens',
    'decoder_loss_weights',
  }
  rows = np.concatenate([one['decoder_target_tokens'] for one in batches])
  tokens = rows[rows > 0]
  texts = np.split(tokens, np.flatnonzero(tokens == 1) + 1)
  assert [_BYTES.decode(text) for text in texts] == [
    'It was in Oslo that Ada Byron lived, in 1981.',
    'nothing of note',
    'è, my word',
    '',
  ]
  # All rows but the last one are full, and the first input of each row is 0.
  assert (rows[: len(tokens) // 16] > 0).all()
  inputs = np.concatenate([one['decoder_input_tokens'] for one in batches])
  np.testing.assert_array_equal(inputs[:, 0], 0)
  np.testing.assert_array_equal(inputs[0, 1:], rows[0, :-1])


def test_inputs_and_targets_share_the_row_of_a_prefix_lm(text_file, name):
  pretraining.register_text_task(name, text_file, 'bytes')
  stream = seqio_stream.SeqioBatches(
    name, 1, _LENGTHS, is_one_stack=True, shuffle=False
  )
  batch = next(iter(stream.eval_batches()))
  (row,) = batch['decoder_target_tokens']
  (prefix,) = batch['decoder_causal_attention']
  (weights,) = batch['decoder_loss_weights']
  assert len(row) == sum(_LENGTHS.values())
  size = int(prefix.sum()) - 1
  # As in `lm_batches`, the prefix is one place longer than the inputs.
  assert row[size - 1] == 1 and weights[size - 1] == 0 and weights[size] == 1


def test_the_seed_decides_the_noise(text_file, name):
  pretraining.register_text_task(name, text_file, 'bytes')
  first, again, other = (_examples(name, seed) for seed in (3, 3, 4))
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a[0], b[0])
  assert any(
    a[0].tolist() != b[0].tolist() for a, b in zip(first, other, strict=True)
  )


def test_salient_spans_are_masked_whole(text_file, name):
  pretraining.register_text_task(
    name, text_file, 'bytes', objective='salient_spans'
  )
  seen = set()
  for seed in range(8):
    examples = _examples(name, seed, {'inputs': 60, 'targets': 24})
    # The text without a span is left out.
    assert len(examples) == 2
    seen |= {_BYTES.decode(targets) for _, targets in examples}
  spans = {part for text in seen for part in text.split('<extra_id_')}
  spans = {part.split('>')[1] for part in spans if part}
  assert spans <= {'Oslo', 'Ada Byron', '1981', 'word'}
  assert {'word'} < spans


def test_the_cache_is_before_the_noise(text_file, name, tmp_path):
  pretraining.register_text_task(
    name, text_file, 'bytes', objective='salient_spans'
  )
  cache = seqio_stream.cache_seqio_task(name, tmp_path / 'c', _BYTES)
  assert cache.features == ('targets', 'spans')
  assert cache.kind == 'text'
  assert _BYTES.decode(cache.tokens('targets', 2)) == 'è, my word'
  # The letter è has two bytes.
  assert cache.spans(2).tolist() == [[7, 11]]
  again = seqio_stream.cache_seqio_task(name, tmp_path / 'c', _BYTES)
  assert again.summary == cache.summary


def test_bad_arguments_are_refused(text_file):
  with pytest.raises(ValueError, match='matches none'):
    pretraining.register_text_task('a', 'no/such/*.jsonl', 'bytes')
  with pytest.raises(ValueError, match='objective must be one of'):
    pretraining.register_text_task('a', text_file, 'bytes', 'prefix_lm')
  assert 'a' not in seqio.TaskRegistry.names()


def _mocked(self, *args, **kwargs):
  del self, args, kwargs
  import tensorflow as tf

  text = 'Die Stadt è Oslo, 1981.'
  start = len('Die Stadt è '.encode())
  spans = {'start': [start], 'limit': [start + 4], 'type': ['LOC']}
  one = {'text': [text] * 3, 'title': ['t'] * 3}
  return tf.data.Dataset.from_tensor_slices(one).map(
    lambda example: example | {'spans': spans}
  )


def test_tfds_tasks_run_on_mocked_data():
  names = pretraining.register_tfds_tasks('bytes')
  # Registering a second time must change nothing.
  assert names == pretraining.register_tfds_tasks('bytes')
  try:
    with tfds.testing.mock_data(num_examples=3, as_dataset_fn=_mocked):
      for name in names:
        examples = _examples(name)
        assert examples, name
        for inputs, targets in examples:
          assert len(inputs) <= 40 and len(targets) <= 24
      # The spans of the tagger are in bytes and not in characters.
      targets = [_BYTES.decode(t) for _, t in _examples(names[2])]
      assert targets == ['<extra_id_0>Oslo'] * 3
  finally:
    for name in names:
      seqio.TaskRegistry.remove(name)
