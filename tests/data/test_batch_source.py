"""Tests batches: keys and shifts by hand, packing, resuming, evaluation.

Also tests `packing` and `prefetch`.
"""

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from mowe.data import batch_source, packing, prefetch

_LENGTHS = {'inputs': 8, 'targets': 6}


@dataclasses.dataclass(frozen=True)
class _Numbered:
  """Example i has `sizes[i]` tokens i + 2, then EOS; it can add noise."""

  sizes: tuple[tuple[int, int], ...]
  name: str = 'numbered'
  noisy: bool = False
  offset: int = 2

  @property
  def num_examples(self):
    return len(self.sizes)

  def length_bounds(self):
    return np.array(self.sizes).reshape(-1, 2) + 1

  def example(self, index, rng):
    shorter = int(rng.integers(2)) if self.noisy else 0
    return tuple(
      np.array([index + self.offset] * (size - shorter) + [1], np.int32)
      for size in self.sizes[index]
    )

  def report(self):
    return {'examples': self.num_examples}


def _task(count, seed=0, **kwargs):
  sizes = np.random.default_rng(seed).integers(1, 5, (count, 2)).tolist()
  return _Numbered(tuple(map(tuple, sizes)), **kwargs)


def _assert_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for key in actual:
    np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)
    assert actual[key].dtype == expected[key].dtype


def test_a_batch_by_hand():
  rows = [[(np.array([7, 8, 1]), np.array([5, 1]))], []]
  batch = batch_source.make_batch(rows, {'inputs': 4, 'targets': 3})
  assert {key: value.tolist() for key, value in batch.items()} == {
    'encoder_input_tokens': [[7, 8, 1, 0], [0, 0, 0, 0]],
    'decoder_input_tokens': [[0, 5, 1], [0, 0, 0]],
    'decoder_target_tokens': [[5, 1, 0], [0, 0, 0]],
    'decoder_loss_weights': [[1, 1, 0], [0, 0, 0]],
  }
  assert batch['decoder_loss_weights'].dtype == np.float32
  assert batch['encoder_input_tokens'].dtype == np.int32


def test_a_packed_batch_by_hand():
  # This is the example in the documentation of seqio's EncDecFeatureConverter.
  examples = [
    (np.array([7, 8, 5, 1]), np.array([3, 9, 1])),
    (np.array([8, 4, 9, 3, 1]), np.array([4, 1])),
  ]
  lengths = {'inputs': 10, 'targets': 7}
  batch = batch_source.make_batch([examples], lengths, segments=True)
  assert {key: value[0].tolist() for key, value in batch.items()} == {
    'encoder_input_tokens': [7, 8, 5, 1, 8, 4, 9, 3, 1, 0],
    'encoder_segment_ids': [1, 1, 1, 1, 2, 2, 2, 2, 2, 0],
    'encoder_positions': [0, 1, 2, 3, 0, 1, 2, 3, 4, 0],
    'decoder_target_tokens': [3, 9, 1, 4, 1, 0, 0],
    'decoder_input_tokens': [0, 3, 9, 0, 4, 0, 0],
    'decoder_loss_weights': [1, 1, 1, 1, 1, 0, 0],
    'decoder_segment_ids': [1, 1, 1, 2, 2, 0, 0],
    'decoder_positions': [0, 1, 2, 0, 1, 0, 0],
  }


def _examples_of(batch):
  """The first token of each example in a packed batch."""
  starts = (batch['encoder_positions'] == 0) & (
    batch['encoder_segment_ids'] > 0
  )
  return (batch['encoder_input_tokens'][starts] - 2).tolist()


@pytest.mark.parametrize('pack', [False, True])
def test_an_epoch_has_every_example_once(pack):
  task = _task(12)
  made = batch_source.Batches(task, 1, _LENGTHS, seed=3, pack=pack)
  orders = []
  for epoch in range(3):
    seen = []
    for step in range(made.steps_per_epoch):
      batch = made(epoch * made.steps_per_epoch + step)
      if not pack:
        seen.append(int(batch['encoder_input_tokens'][0, 0]) - 2)
      else:
        seen += _examples_of(batch)
    assert sorted(seen) == list(range(12))
    orders.append(seen)
  assert orders[0] != orders[1] != orders[2]


@hypothesis.given(
  count=strategies.integers(1, 60), seed=strategies.integers(0, 999)
)
@hypothesis.settings(max_examples=25)
def test_packed_rows_are_the_separate_examples(count, seed):
  task = _task(count, seed)
  made = batch_source.Batches(task, 3, _LENGTHS, seed=seed, pack=True)
  batch = made(1)
  for row in range(3):
    segments = batch['decoder_segment_ids'][row]
    for segment in range(1, segments.max() + 1):
      inputs = batch['encoder_input_tokens'][row][
        batch['encoder_segment_ids'][row] == segment
      ]
      where = segments == segment
      targets = batch['decoder_target_tokens'][row][where]
      expected = task.example(int(inputs[0]) - 2, np.random.default_rng(0))
      np.testing.assert_array_equal(inputs, expected[0])
      np.testing.assert_array_equal(targets, expected[1])
      shifted = batch['decoder_input_tokens'][row][where]
      np.testing.assert_array_equal(shifted, [0, *expected[1][:-1]])


@hypothesis.given(
  bounds=strategies.lists(
    strategies.tuples(strategies.integers(1, 8), strategies.integers(1, 6)),
    min_size=1,
    max_size=80,
  ),
  seed=strategies.integers(0, 99),
)
def test_rows_are_filled_next_fit(bounds, seed):
  bounds = np.array(bounds)
  rows = packing.pack_rows(bounds, 8, 6, seed)
  order = [rows.examples(row).tolist() for row in range(rows.num_rows)]
  assert sorted(itertools.chain(*order)) == list(range(len(bounds)))
  # Adding one example after another must give the same rows.
  expected, used = [[]], np.zeros(2)
  for index in rows.order.tolist():
    used = used + bounds[index]
    if (used > (8, 6)).any():
      expected.append([])
      used = bounds[index]
    expected[-1].append(index)
  assert order == expected


@pytest.mark.parametrize('pack', [False, True])
def test_resuming_gives_identical_batches(pack):
  def make():
    mixed = [(_task(9, noisy=True), 1.0), (_task(40, 1, noisy=True), 2.5)]
    return batch_source.Batches(mixed, 4, _LENGTHS, seed=7, pack=pack)

  whole = list(itertools.islice(make().from_step(0), 30))
  resumed = itertools.islice(make().from_step(17), 13)
  for expected, actual in zip(whole[17:], resumed, strict=True):
    _assert_equal(actual, expected)
  other = batch_source.Batches(_task(9), 4, _LENGTHS, seed=8, pack=pack)
  assert not np.array_equal(
    other(0)['encoder_input_tokens'], whole[0]['encoder_input_tokens']
  )


@pytest.mark.parametrize('pack', [False, True])
def test_some_rows_of_a_batch_are_those_of_the_whole(pack):
  tasks = [(_task(7), 0.4), (_task(5, seed=1), 0.6)]
  lengths = {'inputs': 40, 'targets': 30}
  whole = batch_source.Batches(tasks, 6, lengths, seed=2, pack=pack)
  rows = np.array([1, 2, 5])
  some = whole.of_rows(rows)
  for step in range(4):
    expected = whole(step)
    others = np.delete(np.arange(6), rows)
    for name, array in some(step).items():
      np.testing.assert_array_equal(array[rows], expected[name][rows])
      assert not array[others].any() and len(array) == 6


def test_rates_are_of_examples_also_when_packed():
  # Each example of the first task fills a row; four of the second share one.
  long = _Numbered(((7, 5),) * 10, offset=2)
  short = _Numbered(((1, 0),) * 100, offset=200)
  made = batch_source.Batches([(long, 1), (short, 3)], 64, _LENGTHS, pack=True)
  counts = np.zeros(2)
  for step in range(64):
    batch = made(step)
    firsts = batch['encoder_input_tokens'][
      (batch['encoder_positions'] == 0) & (batch['encoder_segment_ids'] > 0)
    ]
    counts += (firsts < 200).sum(), (firsts >= 200).sum()
  assert counts[1] / counts[0] == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize('pack', [False, True])
def test_evaluation_is_in_order_and_padded(pack):
  made = batch_source.Batches(
    [(_task(5), 1), (_task(2, offset=50), 1)], 4, _LENGTHS, pack=pack
  )
  found = list(made.eval_batches())
  firsts = np.concatenate([b['encoder_input_tokens'][:, 0] for b in found])
  assert firsts.tolist() == [2, 3, 4, 5, 6, 50, 51, 0]
  assert made.num_eval_examples() == 7
  assert found[1]['decoder_loss_weights'][3].sum() == 0
  assert 'encoder_segment_ids' not in found[0]
  again = list(made.eval_batches())
  _assert_equal(again[1], found[1])


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match='reach 9 and 9.*feature_lengths'):
    batch_source.Batches(_Numbered(((8, 8),)), 2, _LENGTHS)
  with pytest.raises(ValueError, match='numbered has none'):
    batch_source.Batches(_Numbered(()), 2, _LENGTHS)
  with pytest.raises(ValueError, match='batch_size 0'):
    batch_source.Batches(_task(3), 0, _LENGTHS)
  with pytest.raises(ValueError, match='0 tasks'):
    batch_source.Batches([], 1, _LENGTHS)


@pytest.mark.parametrize(('depth', 'threads'), [(1, 1), (2, 1), (7, 3)])
def test_prefetch_depth_changes_nothing(depth, threads):
  made = batch_source.Batches(_task(9, noisy=True), 4, _LENGTHS)
  with prefetch.Prefetcher(
    made, 5, 25, depth=depth, num_threads=threads
  ) as ahead:
    found = list(ahead)
  assert len(found) == 20
  for step, batch in enumerate(found, start=5):
    _assert_equal(batch, made(step))


def test_prefetch_raises_where_the_batch_would_come():
  def fail_at_three(step):
    if step == 3:
      raise OSError('disk gone')
    return step

  ahead = prefetch.Prefetcher(
    fail_at_three, depth=5, transform=lambda batch: batch * 10
  )
  assert [next(ahead) for _ in range(3)] == [0, 10, 20]
  with pytest.raises(OSError, match='disk gone'):
    next(ahead)
  with pytest.raises(StopIteration):
    next(ahead)


def test_prefetch_stops_cleanly():
  made = []
  with prefetch.Prefetcher(made.append, depth=3) as ahead:
    next(ahead)
  count = len(made)
  assert count <= 5
  assert list(ahead) == []
  with pytest.raises(ValueError, match='depth and num_threads'):
    prefetch.Prefetcher(made.append, depth=0)
