"""Tests tasks over small caches: contents, bounds, counts and errors."""

import numpy as np
import pytest

from mowe.data import text_tasks
from mowe.data.caches import cache_builders
from mowe.data.text import span_corruption
from mowe.words import byte_vocabulary

_BYTES = byte_vocabulary.ByteVocabulary()
_SENTINEL = _BYTES.sentinel_id(0)


def _text_cache(path, texts):
  records = [t if isinstance(t, dict) else {'text': t} for t in texts]
  return cache_builders.cache_text(records, path / 'text', _BYTES)


def _restored(inputs, targets):
  assert inputs[-1] == targets[-1] == 1
  num_spans = int((targets > _SENTINEL - _BYTES.extra_ids).sum())
  return span_corruption.restore(
    inputs[:-1], targets[:-1], _BYTES.sentinels[:num_spans]
  )


def _check_bounds(task):
  bounds = task.length_bounds()
  assert bounds.shape == (task.num_examples, 2)
  for index in range(task.num_examples):
    for seed in range(5):
      example = task.example(index, np.random.default_rng(seed))
      lengths = [len(part) for part in example]
      assert (lengths <= bounds[index]).all(), (lengths, bounds[index])
      assert [part.dtype for part in example] == [np.int32, np.int32]
  limits = task.feature_lengths['inputs'], task.feature_lengths['targets']
  assert (bounds <= limits).all()


def test_span_corruption_chunks_are_the_stream(tmp_path):
  cache = _text_cache(tmp_path, ['a' * 50, 'b' * 50, 'c' * 33])
  lengths = {'inputs': 32, 'targets': 20}
  task = text_tasks.SpanCorruptionTask(cache, lengths)
  # Of 35 tokens 5 are masked in 2 spans, so the inputs have 30 + 2 + 1 = 33
  # tokens, one too many. For 34 tokens they have 29 + 2 + 1 = 32.
  assert task.chunk_length == 34
  # The texts have 51 + 51 + 34 = 136 tokens, which are 4 full chunks.
  assert task.num_examples == 4
  rng = np.random.default_rng(0)
  examples = [task.example(index, rng) for index in range(4)]
  assert {len(inputs) for inputs, _ in examples} == {32}
  restored = np.concatenate([_restored(*example) for example in examples])
  np.testing.assert_array_equal(restored, cache.flat('targets'))
  _check_bounds(task)


@pytest.mark.parametrize(
  ('size', 'num_examples', 'left_out'),
  # The EOS is a token as well: 35 tokens leave one over, and 36 make a second,
  # short example.
  [(1, 1, 0), (20, 1, 0), (33, 1, 0), (34, 1, 1), (35, 2, 0)],
)
def test_the_rest_of_the_stream(tmp_path, size, num_examples, left_out):
  cache = _text_cache(tmp_path, ['a' * size])
  task = text_tasks.SpanCorruptionTask(cache, {'inputs': 32, 'targets': 20})
  assert task.num_examples == num_examples
  assert task.report()['tokens_left_out'] == left_out
  _check_bounds(task)


def test_span_corruption_errors(tmp_path):
  cache = _text_cache(tmp_path, ['a' * 50])
  with pytest.raises(ValueError, match="'inputs' and 'targets' at least 3"):
    text_tasks.SpanCorruptionTask(cache, {'inputs': 32})
  with pytest.raises(ValueError, match='sentinels, but the vocabulary'):
    text_tasks.SpanCorruptionTask(cache, {'inputs': 4096, 'targets': 2048})
  with pytest.raises(ValueError, match="T5's are 0.15 and 3"):
    text_tasks.SpanCorruptionTask(cache, {'inputs': 9, 'targets': 9}, 1.5)


def test_salient_spans_mask_whole_spans(tmp_path):
  text = 'Ada was born in Paris.'
  cache = _text_cache(tmp_path, [{'text': text, 'spans': [[0, 3], [16, 21]]}])
  task = text_tasks.SalientSpanTask(cache, {'inputs': 32, 'targets': 20}, 0.15)
  seen = set()
  for seed in range(20):
    inputs, targets = task.example(0, np.random.default_rng(seed))
    assert _BYTES.decode(_restored(inputs, targets)) == text
    seen.add(_BYTES.decode(targets))
  # The budget is round(22 * 0.15) = 3 tokens, so one span is masked but never
  # both.
  assert seen == {'<extra_id_0>Ada', '<extra_id_0>Paris'}
  _check_bounds(task)


def test_salient_spans_leave_out_and_count(tmp_path):
  cache = _text_cache(
    tmp_path,
    [
      'nothing of note',
      # This span is longer than the targets.
      {'text': 'x' * 40, 'spans': [[0, 30]]},
      # This text is longer than the inputs, so it is cut into windows.
      {'text': 'y' * 90, 'spans': [[2, 5], [80, 84]]},
      {'text': 'z' * 9, 'spans': [[2, 5]]},
    ],
  )
  task = text_tasks.SalientSpanTask(cache, {'inputs': 20, 'targets': 10}, 0.3)
  assert task.report() == {
    'examples': 2,
    'texts_without_span': 2,
    'texts_in_windows': 1,
    'spans': 4,
    'spans_too_long': 1,
  }
  _check_bounds(task)
  starts = set()
  for seed in range(50):
    inputs, targets = task.example(0, np.random.default_rng(seed))
    assert len(_restored(inputs, targets)) == 19
    starts.add(len(targets))
  # The targets are a span of 3 or 4 tokens, a sentinel and EOS. Both spans must
  # occur.
  assert starts == {5, 6}


def test_no_salient_span_at_all_is_an_error(tmp_path):
  cache = _text_cache(tmp_path, ['nothing of note'])
  with pytest.raises(ValueError, match='none of the 1 texts.*longer targets'):
    text_tasks.SalientSpanTask(cache, {'inputs': 20, 'targets': 10})


def test_text_to_text_trims_before_eos_and_counts(tmp_path):
  questions = [
    {'question': 'who is it?', 'answers': ['Ada Lovelace']},
    {'question': 'who?', 'answers': ['Ada']},
  ]
  cache = cache_builders.cache_questions(
    questions, tmp_path / 'qa', _BYTES, prompt='{question}'
  )
  task = text_tasks.TextToTextTask(cache, {'inputs': 6, 'targets': 5})
  inputs, targets = task.example(0, np.random.default_rng(0))
  assert _BYTES.decode(inputs) == 'who i' and inputs[-1] == 1
  assert _BYTES.decode(targets) == 'Ada ' and targets[-1] == 1
  assert task.report() == {
    'examples': 2,
    'inputs_trimmed': 1,
    'targets_trimmed': 1,
  }
  _check_bounds(task)
  with pytest.raises(ValueError, match='at least 2 tokens each'):
    text_tasks.TextToTextTask(cache, {'inputs': 6, 'targets': 1})


def test_a_cache_of_the_wrong_kind_is_refused(tmp_path):
  cache = _text_cache(tmp_path, ['a text'])
  with pytest.raises(ValueError, match="needs the feature 'inputs'.*'text'"):
    text_tasks.TextToTextTask(cache, {'inputs': 6, 'targets': 5})
  questions = cache_builders.cache_questions(
    [{'question': 'who?', 'answers': ['Ada']}], tmp_path / 'qa', _BYTES
  )
  for masking in (text_tasks.SpanCorruptionTask, text_tasks.SalientSpanTask):
    with pytest.raises(ValueError, match="kind 'questions'.*TextToTextTask"):
      masking(questions, {'inputs': 9, 'targets': 9})


def test_bounds_of_salient_targets_are_tight(tmp_path):
  spans = [[0, 1], [2, 3], [4, 5], [10, 13], [20, 30]]
  cache = _text_cache(tmp_path, ['none', {'text': 'x' * 40, 'spans': spans}])
  lengths = {'inputs': 64, 'targets': 64}
  # A budget of 4 tokens holds three spans of one token, or one of these and the
  # span of three: at most 4 tokens with 3 sentinels. The span of 10 is masked
  # alone, with a sentinel and EOS: 10 + 1 + 1.
  task = text_tasks.SalientSpanTask(cache, lengths, 0.1)
  np.testing.assert_array_equal(task.length_bounds(), [[41, 12]])
  # Without that span there are at most 4 tokens, 3 sentinels and EOS.
  short = text_tasks.SalientSpanTask(cache, {'inputs': 64, 'targets': 9}, 0.1)
  np.testing.assert_array_equal(short.length_bounds(), [[41, 8]])
  _check_bounds(task)
  _check_bounds(short)
