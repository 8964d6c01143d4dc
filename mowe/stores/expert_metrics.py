"""What a run tells of its experts: how many are met, how they are moved."""

import numpy as np

from mowe.training.train_metrics import Mean
from mowe.words import batch_plans, sharded_plan


class ExpertCounts:
  """Counts experts of the steps, on the host.

  Args:
    seen: <bool>[num_experts], those that training has met; kept true here.
    is_trained: whether experts are trained.
  """

  def __init__(self, seen: np.ndarray, is_trained: bool):
    self._seen = seen
    self._is_trained = is_trained
    self._num_unseen = int(np.count_nonzero(~seen))
    self._latest: dict[str, Mean] = {}

  def count(
    self, plan: batch_plans.ExpertPlan | sharded_plan.ShardedPlan
  ) -> np.ndarray:
    """Counts a step; returns the experts of its batch, ascending."""
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
    """Numbers of the last step."""
    return self._latest
