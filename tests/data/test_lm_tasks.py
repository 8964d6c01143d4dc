"""Tests running text: its cache, its tasks, and batches by hand.

Also tests `lm_batches`.
"""

import gzip

import numpy as np
import pytest

from mowe.data import batch_source, lm_batches, lm_tasks
from mowe.data.caches import lm_cache
from mowe.words import byte_vocabulary, sentencepiece_vocabulary

BYTES = byte_vocabulary.ByteVocabulary(extra_ids=2)
LINES = 'ab\n\n c d é \n'


def _write(folder, name='text.txt', text=LINES):
  path = folder / name
  path.write_text(text)
  return str(path)


def _ids(text):
  return [byte + 3 for byte in text.encode()]


@pytest.fixture
def cache(tmp_path):
  return lm_cache.cache_texts([_write(tmp_path)], tmp_path / 'cache', BYTES)


def _stream_cache(tmp_path, size):
  """A cache of the tokens 3, 4, 5, ..., so that each token tells its place."""
  content = bytes(range(size))
  (tmp_path / 'raw').write_bytes(content)
  return lm_cache.cache_texts(
    [str(tmp_path / 'raw')], tmp_path / 'stream', BYTES, unit='file'
  )


def test_every_line_is_kept_and_counted(cache):
  # The blank line counts too, because WikiText has an end for each line.
  expected = [*_ids('ab'), 1, 1, *_ids(' c d é '), 1]
  assert cache.flat('targets').tolist() == expected
  # The words are ab, c, d, é and three line ends. The bytes are those of the
  # file.
  assert cache.totals == {
    'texts': 3,
    'words': 7,
    'bytes': len(LINES.encode()),
  }
  assert cache.kind == 'language_model'


def test_records_are_texts(tmp_path):
  path = _write(tmp_path, 'a.jsonl', '{"body": "a b"}\n\n{"body": "c"}\n')
  cache = lm_cache.cache_texts(
    [path], tmp_path / 'cache', BYTES, field='body', num_workers=1
  )
  assert cache.flat('targets').tolist() == [*_ids('a b'), 1, *_ids('c'), 1]
  assert cache.totals == {'texts': 2, 'words': 5, 'bytes': 6}


def test_a_whole_file_is_its_bytes(tmp_path):
  content = bytes([0, 10, 255, 13, 10]) * 30_000
  path = tmp_path / 'enwik.gz'
  path.write_bytes(gzip.compress(content))
  cache = lm_cache.cache_texts(
    [str(path)], tmp_path / 'cache', BYTES, unit='file'
  )
  assert bytes((cache.flat('targets') - 3).astype(np.uint8)) == content
  assert cache.totals == {'bytes': len(content)}


def test_files_are_cut_into_bytes_alone(tmp_path):
  path = _write(tmp_path)
  vocabulary = sentencepiece_vocabulary.train_sentencepiece(
    ['ab cd é'] * 9, tmp_path / 'v.model', 9
  )
  with pytest.raises(ValueError, match='Use --vocabulary bytes'):
    lm_cache.cache_texts([path], tmp_path / 'c', vocabulary, unit='file')
  with pytest.raises(ValueError, match="unit must be one of .'line', 'file'"):
    lm_cache.cache_texts([path], tmp_path / 'c', BYTES, unit='paragraph')


def test_running_text_is_cut_into_rows(tmp_path):
  cache = _stream_cache(tmp_path, 10)
  task = lm_tasks.LanguageModelTask(cache, {'targets': 4})
  examples = [task.example(i, None)[1].tolist() for i in range(3)]
  assert examples == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12]]
  assert task.length_bounds().tolist() == [[0, 4], [0, 4], [0, 2]]


def test_long_texts_are_cut_and_short_ones_are_not_joined(cache):
  task = lm_tasks.SeparateTexts(cache, {'targets': 5})
  examples = [task.example(i, None)[1] for i in range(task.num_examples)]
  long = [*_ids(' c d é '), 1]
  assert [x.tolist() for x in examples] == [
    [*_ids('ab'), 1],
    [1],
    long[:5],
    long[5:],
  ]
  assert task.length_bounds()[:, 1].tolist() == [3, 1, 5, 4]
  packed = batch_source.Batches(
    task, 2, {'targets': 5}, pack=True, make_batch_of=lm_batches.make_batch
  )
  counts = {}
  for step in range(packed.steps_per_epoch):
    batch = packed(step)
    assert set(batch) == {
      'decoder_input_tokens',
      'decoder_target_tokens',
      'decoder_loss_weights',
      'decoder_segment_ids',
      'decoder_positions',
    }
    starts = batch['decoder_positions'] == 0
    assert not batch['decoder_input_tokens'][starts].any()
    counts[step] = batch['decoder_loss_weights'].sum()
  assert sum(counts.values()) >= len(cache.flat('targets'))


def test_other_caches_are_refused(tmp_path, cache):
  del tmp_path
  cache.summary['recipe']['kind'] = 'questions'
  with pytest.raises(ValueError, match='--kind language_model'):
    lm_tasks.LanguageModelTask(cache, {'targets': 4})
  cache.summary['recipe']['kind'] = 'text'
  with pytest.raises(ValueError, match="must give 'targets'"):
    lm_tasks.SeparateTexts(cache, {'inputs': 4})


def test_inputs_stand_before_targets():
  array = lambda *ids: np.array(ids, np.int32)
  rows = [[(array(5, 1), array(6, 7, 1)), (array(), array(8, 1))], []]
  batch = lm_batches.make_batch(rows, {'inputs': 3, 'targets': 6}, True)
  expected = {
    'decoder_target_tokens': [5, 1, 6, 7, 1, 8, 1, 0, 0],
    'decoder_input_tokens': [0, 5, 1, 6, 7, 0, 8, 0, 0],
    'decoder_loss_weights': [0, 0, 1, 1, 1, 1, 1, 0, 0],
    # The places where 0, 5 and 1 are read belong to the prefix, so they see each
    # other.
    'decoder_causal_attention': [1, 1, 1, 0, 0, 0, 0, 0, 0],
    'decoder_segment_ids': [1, 1, 1, 1, 1, 2, 2, 0, 0],
    'decoder_positions': [0, 1, 2, 3, 4, 0, 1, 0, 0],
  }
  assert set(batch) == set(expected)
  for name, row in expected.items():
    np.testing.assert_array_equal(batch[name], [row, [0] * 9], name)


def test_rows_continue_those_of_the_batch_before(tmp_path):
  # 28 tokens are nine rows of 3 and one token. Two parts have four rows each,
  # so 4 tokens are left out.
  cache = _stream_cache(tmp_path, 28)
  task = lm_tasks.ContiguousText(cache, {'targets': 3})
  made = lm_batches.ContiguousBatches(task, 2)
  assert made.steps_per_epoch == 4
  assert made.report()[task.name]['tokens_left_out'] == 4
  first, second = made(0), made(1)
  assert first['decoder_target_tokens'].tolist() == [[3, 4, 5], [15, 16, 17]]
  # The first input of the second part is the token before it, as in one text.
  assert first['decoder_input_tokens'].tolist() == [[0, 3, 4], [14, 15, 16]]
  assert second['decoder_input_tokens'].tolist() == [[5, 6, 7], [17, 18, 19]]
  # The parts begin anew in every epoch, and only then.
  begins = [made(step)['decoder_begins_part'].tolist() for step in range(9)]
  assert begins == [[place % 4 == 0] * 2 for place in range(9)]
  for name, array in made(4 + 1).items():
    np.testing.assert_array_equal(array, second[name])
  with pytest.raises(ValueError, match='must fill at least one batch'):
    lm_batches.ContiguousBatches(task, 10)


def _seen(made):
  """How often each token counts in the loss."""
  counts = np.zeros(40, int)
  for batch in made:
    weights = batch['decoder_loss_weights'] > 0
    np.add.at(counts, batch['decoder_target_tokens'][weights], 1)
  return counts


@pytest.mark.parametrize('size', [1, 3, 7, 12, 13])
@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_every_token_counts_once(size, batch_size):
  stream = np.arange(3, 3 + size).astype(np.uint16)
  expected = np.zeros(40, int)
  expected[3 : 3 + size] = 1
  made = lm_batches.segments(stream, batch_size, 3)
  np.testing.assert_array_equal(_seen(made), expected)
  for stride in (1, 2, 4):
    made = lm_batches.sliding_windows(stream, batch_size, 4, stride)
    np.testing.assert_array_equal(_seen(made), expected)


def test_windows_by_hand():
  stream = np.arange(10, 17).astype(np.int32)
  first, second = lm_batches.sliding_windows(stream, 2, 4, 2)
  assert first['decoder_target_tokens'].tolist() == [
    [10, 11, 12, 13],
    [12, 13, 14, 15],
  ]
  assert first['decoder_input_tokens'].tolist() == [
    [0, 10, 11, 12],
    [0, 12, 13, 14],
  ]
  assert first['decoder_loss_weights'].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
  # The text ends here, so the last row is all padding.
  assert second['decoder_target_tokens'].tolist() == [
    [14, 15, 16, 0],
    [0, 0, 0, 0],
  ]
  assert second['decoder_loss_weights'].tolist() == [[0, 0, 1, 0], [0] * 4]
  with pytest.raises(ValueError, match='windows side by side'):
    next(lm_batches.sliding_windows(stream, 2, 4, 5))
