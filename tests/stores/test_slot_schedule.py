"""Tests the schedule of slots against a plain least-recently-used cache."""

import collections

import numpy as np
import pytest

from mowe.stores import slot_schedule
from mowe.words.plans import batch_plans

_EXPERTS, _SLOTS = 40, 13


@pytest.mark.parametrize('seed', range(4))
def test_least_recently_used_experts_leave(seed):
  rng = np.random.default_rng(seed)
  schedule = slot_schedule.SlotSchedule(_EXPERTS, _SLOTS)
  last_use = {}  # This has only the experts that are in slots.
  expert_in = {}
  for now in range(60):
    number = rng.integers(0, _SLOTS + 1)
    experts = np.sort(rng.permutation(_EXPERTS)[:number])
    move = schedule.take(experts)
    entering = [e for e in experts.tolist() if e not in last_use]
    assert sorted(move.entering.tolist()) == entering
    leaving = [e for e in move.leaving.tolist() if e >= 0]
    free = _SLOTS - len(last_use)
    assert len(leaving) == max(0, len(entering) - free)
    staying = [t for e, t in last_use.items() if e not in leaving]
    used_now = set(experts.tolist())
    for expert in leaving:
      assert expert not in used_now
      others = [
        time
        for one, time in last_use.items()
        if one not in leaving and one not in used_now
      ]
      assert all(last_use[expert] <= time for time in others)
    assert len(staying) + len(leaving) == len(last_use)
    for slot, new, old in zip(*(part.tolist() for part in move), strict=True):
      assert expert_in.get(slot, -1) == old
      expert_in[slot] = new
    for expert in leaving:
      del last_use[expert]
    last_use |= dict.fromkeys(experts.tolist(), now)
  counts = collections.Counter(expert_in.values())
  assert max(counts.values()) == 1


def test_too_few_slots():
  schedule = slot_schedule.SlotSchedule(_EXPERTS, _SLOTS)
  with pytest.raises(
    ValueError,
    match=r'fit into the slots .* there are 20 of them and num_slots is 13\. '
    r'Raise num_slots \(the macro NUM_SLOTS\) to 25 or more',
  ):
    schedule.take(np.arange(20))


def test_a_plan_in_slots_is_the_same_plan():
  rng = np.random.default_rng(0)
  ids = {
    'encoder': rng.integers(-1, _EXPERTS + 1, (3, 5), np.int32),
    'decoder': rng.integers(-1, _EXPERTS + 1, (3, 4), np.int32),
  }
  profile = batch_plans.profile_ladder([ids], _EXPERTS)[0]
  plan = batch_plans.make_plan(ids, profile, _EXPERTS)
  schedule = slot_schedule.SlotSchedule(_EXPERTS, 30)
  present = np.unique(np.concatenate([i.reshape(-1) for i in ids.values()]))
  present = present[(present >= 0) & (present < _EXPERTS)]
  move = schedule.take(present)
  slot_of = dict(zip(move.entering.tolist(), move.slots.tolist(), strict=True))
  in_slots = schedule.in_slots(plan)
  for old, new in (
    (plan.encoder.classes, in_slots.encoder.classes),
    (plan.decoder.classes, in_slots.decoder.classes),
    (plan.updates, in_slots.updates),
  ):
    old = np.concatenate(old.experts)
    new = np.concatenate(new.experts)
    assert len(set(new.tolist())) == len(new)
    for expert, slot in zip(old.tolist(), new.tolist(), strict=True):
      assert slot == slot_of[expert] if expert < _EXPERTS else slot >= 30
  np.testing.assert_array_equal(in_slots.encoder.slots, plan.encoder.slots)
