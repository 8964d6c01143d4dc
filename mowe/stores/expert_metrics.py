"""Metrics of word experts: how many a batch has, and tokens of each."""

import numpy as np

from mowe.stores.row_files import row_index
from mowe.training.train_metrics import Mean
from mowe.words.plans import batch_plans, sharded_plan


class ExpertCounts:
  """Counts the experts of each step, on the host.

  Args:
    index: this object marks in it which experts training has met.
    is_trained: whether experts are trained; frozen ones are never seen.
  """

  def __init__(self, index: row_index.RowIndex, is_trained: bool):
    self._index = index
    self._is_trained = is_trained
    self._latest: dict[str, Mean] = {}

  def count(
    self, plan: batch_plans.ExpertPlan | sharded_plan.ShardedPlan
  ) -> np.ndarray:
    """Counts a step; returns the experts of its batch, <int>[n], ascending."""
    present = plan.present_experts(self._index.num_rows)
    if self._is_trained:
      self._index.mark_seen(present)
    one = np.float32(1)
    self._latest = {
      'experts/distinct': Mean(np.float32(len(present)), one),
      'experts/tokens_each': Mean(
        np.float32(plan.num_tokens()), np.float32(len(present))
      ),
    }
    if self._is_trained:
      self._latest['experts/never_seen'] = Mean(
        np.float32(self._index.num_rows - self._index.num_seen), one
      )
    return present

  def metrics(self) -> dict[str, Mean]:
    """The metrics of the last step."""
    return self._latest
