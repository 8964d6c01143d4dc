"""Tests plans of rows: every token finds the row that it addresses."""

import numpy as np
import pytest

from mowe.words.addresses import hashed_ngrams, ngram_hashes
from mowe.words.plans import row_plans

_VOCAB, _BATCH, _LENGTH = 40, 6, 9
_ADDRESS = hashed_ngrams.HashedNGrams(
  ngram_hashes.engram_hashes(_VOCAB, [50, 60], 2)[0]
)


def _batch(seed=0, high=_VOCAB):
  rng = np.random.default_rng(seed)

  def draw(length):
    ids = rng.integers(1, high, (_BATCH, length)).astype(np.int32)
    # Some rows end with padding.
    ids[::2, length - 2 :] = 0
    return ids

  return {
    'encoder_input_tokens': draw(_LENGTH),
    'decoder_input_tokens': draw(_LENGTH - 4),
  }


def _planner(**changes):
  settings = {
    'streams': ('encoder', 'decoder'),
    'num_rows': _ADDRESS.num_rows + 3,
    'trial_batches': [_batch(1, 5), _batch(2, 5)],
  }
  return row_plans.RowPlanner(_ADDRESS, **settings | changes)


@pytest.mark.parametrize('most_kept', [0, 2**20])
def test_places_lead_to_the_rows(monkeypatch, most_kept):
  monkeypatch.setattr(row_plans, '_MOST_KEPT', most_kept)
  planner = _planner()
  for seed in range(3):
    batch = _batch(seed)
    plan = planner(batch)
    expected = {
      'encoder': _ADDRESS.encoder_rows(batch['encoder_input_tokens']),
      'decoder': _ADDRESS.decoder_rows(batch['decoder_input_tokens']),
    }
    named = np.concatenate([rows.reshape(-1) for rows in expected.values()])
    distinct = np.unique(named[named >= 0])
    present = plan.present_experts(_ADDRESS.num_rows + 3)
    np.testing.assert_array_equal(present, distinct)
    assert plan.num_tokens() == (named >= 0).sum()
    # All numbers are distinct, as a scatter in place asks.
    assert len(np.unique(plan.rows)) == len(plan.rows)
    for stream, rows in expected.items():
      places = plan.places[stream]
      assert places.dtype == np.int32
      found = np.where(places >= 0, plan.rows[places], -1)
      np.testing.assert_array_equal(found, rows)


def test_a_batch_with_more_rows_takes_a_larger_size(caplog):
  planner = _planner()
  small = len(planner(_batch(1, 5)).rows)
  assert small == planner.rows_at_once and planner.sizes_used == {0: 1}
  large = len(planner(_batch(1)).rows)
  assert large > small and 'names more rows than the trial' in caplog.text
  # The choice depends on the batch alone.
  assert len(planner(_batch(1, 5)).rows) == small


def test_microbatches_are_cut_as_the_step_cuts_them():
  whole, cut = _planner()(_batch()), _planner(num_microbatches=2)(_batch())
  np.testing.assert_array_equal(whole.rows, cut.rows)
  for stream, places in cut.places.items():
    for part in range(2):
      np.testing.assert_array_equal(places[part], whole.places[stream][part::2])


def test_another_shape_or_no_batch_is_refused():
  with pytest.raises(ValueError, match='at least one trial batch'):
    _planner(trial_batches=[])
  long = {
    name: np.tile(tokens, (50, 1)) + np.arange(300)[:, None] % 30
    for name, tokens in _batch().items()
  }
  planner = _planner(trial_batches=[{k: v[:1] for k, v in _batch().items()}])
  with pytest.raises(ValueError, match='must have the shape of the trial'):
    planner(long)
