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
    self._num_experts = num_experts
    # The expert in each slot, -1 for none, and the number of the batch that
    # used it last.
    self._expert_in = np.full(num_slots, -1, np.int64)
    self._last_use = np.zeros(num_slots, np.int64)
    self._now = 0
    # The experts that are in slots, ascending, and the slot of each.
    self._in_slots = np.zeros(0, np.int64)
    self._slots = np.zeros(0, np.int64)

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
        'The experts of a batch, or its rows of a memory, must fit into the '
        f'slots on the device, but there are {len(experts):,} of them and num_slots '
        f'is {num_slots:,}. Raise num_slots (the macro NUM_SLOTS) to '
        f'{len(experts) * 5 // 4:,} or more, or take a smaller batch.'
      )
    self._now += 1
    slots = self._slots_of(experts)
    self._last_use[slots[slots >= 0]] = self._now
    entering = experts[slots < 0].astype(np.int64)
    # Those slots are taken that have not been used for longest. The slots of
    # this batch count as used just now, so they would be the last to be taken,
    # and there are enough others.
    count = len(entering)
    order = np.argpartition(self._last_use, count - 1)[:count]
    order.sort()
    leaving = self._expert_in[order]
    self._expert_in[order] = entering
    self._last_use[order] = self._now
    if count:
      slots = np.argsort(self._expert_in)
      self._slots = slots[np.count_nonzero(self._expert_in < 0) :]
      self._in_slots = self._expert_in[self._slots]
    return Move(order, entering, leaving)

  def in_slots(self, plan: step_plans.GroupPlan) -> step_plans.GroupPlan:
    """The plan of the last batch with slots in the place of experts.

    Numbers of unused places, which begin at `num_experts` there, begin at
    `num_slots` here, so that a scatter drops them still. They stay distinct.
    """
    num_experts, num_slots = self._num_experts, len(self._expert_in)

    def renumber(experts):
      beyond = experts - num_experts + num_slots
      slots = self._slots_of(experts)
      return np.where(experts < num_experts, slots, beyond).astype(np.int32)

    return plan.renumbered(renumber)

  def _slots_of(self, experts):
    """The slots <int64>[n] of experts <int>[n]; -1 for none."""
    if not len(self._in_slots):
      return np.full(experts.shape, -1, np.int64)
    places = np.searchsorted(self._in_slots, experts)
    places = np.minimum(places, len(self._in_slots) - 1)
    is_in = self._in_slots[places] == experts
    return np.where(is_in, self._slots[places], -1)
