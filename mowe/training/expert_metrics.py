"""What a run tells of its experts: how many are met, how they are moved."""

import numpy as np

from mowe.training.metrics import Mean
from mowe.words import plan as plans


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

  def count(self, plan: plans.ExpertPlan) -> np.ndarray:
    """Counts a step; returns the experts of its batch, ascending."""
    present = experts_of(plan, len(self._seen))
    if self._is_trained:
      self._num_unseen -= int(np.count_nonzero(~self._seen[present]))
      self._seen[present] = True
    num_tokens = sum(
      np.count_nonzero(stream.slots < _num_slots(stream))
      for stream in (plan.encoder, plan.decoder)
      if stream is not None
    )
    one = np.float32(1)
    self._latest = {
      'experts/distinct': Mean(np.float32(len(present)), one),
      'experts/tokens_each': Mean(
        np.float32(num_tokens), np.float32(len(present))
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


def experts_of(plan: plans.ExpertPlan, num_experts: int) -> np.ndarray:
  """Experts of a plan, <int32>[n], ascending."""
  experts = np.concatenate([e.reshape(-1) for e in plan.updates.experts])
  return np.sort(experts[experts < num_experts])


def _num_slots(stream: plans.StreamPlan) -> int:
  return sum(
    int(np.prod(sources.shape[-2:])) for sources in stream.classes.sources
  )
