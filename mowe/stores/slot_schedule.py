"""Which expert lies in which slot of the tables on the device, step by step.

The schedule is made on the host, ahead of the device, and moves nothing itself:
it says what must be moved before each step.
"""

from typing import NamedTuple

import numpy as np

from mowe.words.plans import step_plans


class Move(NamedTuple):
  """What changes before a step.

  Attributes:
    slots: <int64>[n], the slots that get another expert, ascending.
    entering: <int64>[n], the expert that comes into each of them.
    leaving: <int64>[n], the expert that was in each of them; -1 for none.
  """

  slots: np.ndarray
  entering: np.ndarray
  leaving: np.ndarray


class SlotSchedule:
  """Gives the experts of each batch slots; the least recently used ones leave.

  Args:
    num_experts: how many experts there are.
    num_slots: rows of the tables on the device.
  """

  def __init__(self, num_experts: int, num_slots: int):
    # The slot of each expert and the expert in each slot, -1 for none; and the
    # number of the batch that used a slot last.
    self._slot_of = np.full(num_experts, -1, np.int32)
    self._expert_in = np.full(num_slots, -1, np.int64)
    self._last_use = np.zeros(num_slots, np.int64)
    self._now = 0

  def take(self, experts: np.ndarray) -> Move:
    """Gives slots to the experts of the next batch.

    Args:
      experts: <int>[n], the distinct experts of the batch.

    Returns:
      The changes; experts that have a slot already keep it.

    Raises:
      ValueError: there are more of them than slots.
    """
    num_slots = len(self._expert_in)
    if len(experts) > num_slots:
      raise ValueError(
        'The experts of a batch must fit into the slots on the device, but a '
        f'batch has {len(experts):,} experts and num_slots is {num_slots:,}. '
        f'Raise num_slots to {len(experts) * 5 // 4:,} or more, or take a '
        'smaller batch.'
      )
    self._now += 1
    slots = self._slot_of[experts]
    self._last_use[slots[slots >= 0]] = self._now
    entering = experts[slots < 0].astype(np.int64)
    # Those slots are taken that have not been used for longest. The slots of
    # this batch count as used just now, so they would be the last to be taken,
    # and there are enough others.
    count = len(entering)
    order = np.argpartition(self._last_use, count - 1)[:count]
    order.sort()
    leaving = self._expert_in[order]
    self._slot_of[leaving[leaving >= 0]] = -1
    self._slot_of[entering] = order
    self._expert_in[order] = entering
    self._last_use[order] = self._now
    return Move(order, entering, leaving)

  def in_slots(self, plan: step_plans.GroupPlan) -> step_plans.GroupPlan:
    """The plan of the last batch with slots in the place of experts.

    Numbers of unused places, which begin at `num_experts` there, begin at
    `num_slots` here, so that a scatter drops them still. They stay distinct.
    """
    num_experts, num_slots = len(self._slot_of), len(self._expert_in)

    def renumber(experts):
      slots = self._slot_of[np.minimum(experts, num_experts - 1)]
      beyond = experts - num_experts + num_slots
      return np.where(experts < num_experts, slots, beyond).astype(np.int32)

    return plan.renumbered(renumber)
