"""Metrics of word experts: how many a batch has, and tokens of each."""

import numpy as np

from mowe.training.train_metrics import Mean
from mowe.words.plans import batch_plans, sharded_plan


class ExpertCounts:
  """Counts the experts of each step, on the host.

  Args:
    seen: <bool>[num_experts], whether training has met the expert; this object
      keeps the array up to date.
    is_trained: whether experts are trained; frozen ones are never seen.
  """

  def __init__(self, seen: np.ndarray, is_trained: bool):
    self._seen = seen
    self._is_trained = is_trained
    self._num_unseen = int(np.count_nonzero(~seen))
    self._latest: dict[str, Mean] = {}

  def count(
    self, plan: batch_plans.ExpertPlan | sharded_plan.ShardedPlan
  ) -> np.ndarray:
    """Counts a step; returns the experts of its batch, <int>[n], ascending."""
    present = plan.present_experts(len(self._seen))
    if self._is_trained:
      self._num_unseen -= int(np.count_nonzero(~self._seen[present]))
      self._seen[present] = True
    one = np.float32(1)
    self._latest = {
      'experts/distinct': Mean(np.float32(len(present)), one),
      'experts/tokens_each': Mean(
        np.float32(plan.num_tokens()), np.float32(len(present))
      ),
    }
    if self._is_trained:
      self._latest['experts/never_seen'] = Mean(
        np.float32(self._num_unseen), one
      )
    return present

  def metrics(self) -> dict[str, Mean]:
    """The metrics of the last step."""
    return self._latest
