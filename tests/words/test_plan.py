"""Plans: every token gets one slot, of its own expert, whatever the batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowe.words import plan as plans

NUM_EXPERTS = 7


def routing(rng, batch, length, num_experts=NUM_EXPERTS):
  """Ids with padding (-1) and tokens without an expert (num_experts)."""
  return rng.integers(-1, num_experts + 1, (batch, length)).astype(np.int32)


def owner_of_slots(plan, stream, microbatch=None):
  """Expert of each slot, and the token in it, read back from a plan."""
  sources, rows = stream.sources, stream.rows
  if microbatch is not None:
    sources = [s[microbatch] for s in sources]
    rows = rows[microbatch]
  num_groups = sum(s.shape[0] for s in sources)
  rows = np.arange(num_groups) if rows is None else rows
  owners = np.repeat(
    plan.experts[rows],
    np.concatenate([np.full(s.shape[0], s.shape[1]) for s in sources]),
  )
  return owners, np.concatenate([s.reshape(-1) for s in sources])


def check(plan, stream, ids, num_experts, microbatch=None):
  owners, tokens = owner_of_slots(plan, stream, microbatch)
  slots = stream.slots if microbatch is None else stream.slots[microbatch]
  flat = ids.reshape(-1)
  routed = (flat >= 0) & (flat < num_experts)
  slots = slots.reshape(-1)
  # Tokens without an expert have no slot, the others one each.
  assert (slots[~routed] == owners.size).all()
  assert np.unique(slots[routed]).size == routed.sum()
  np.testing.assert_array_equal(owners[slots[routed]], flat[routed])
  np.testing.assert_array_equal(tokens[slots[routed]], np.flatnonzero(routed))
  # All other slots are empty.
  assert (np.delete(tokens, slots[routed]) == flat.size).all()


def test_three_tokens_by_hand():
  # Expert 2 has two tokens, expert 0 one, the last token none.
  ids = np.array([[2, 0, 2, 3]], np.int32)
  profile = plans.CapacityProfile(
    (('encoder', plans.StreamProfile(((1, 2), (2, 1)))),), num_rows=3
  )
  plan = plans.make_plan({'encoder': ids}, profile, num_experts=3)
  # Rows: class 1 holds expert 0 and an unused place (number 3 + 1),
  # class 2 holds expert 2.
  np.testing.assert_array_equal(plan.experts, [0, 4, 2])
  np.testing.assert_array_equal(plan.encoder.sources[0], [[1], [4]])
  np.testing.assert_array_equal(plan.encoder.sources[1], [[0, 2]])
  np.testing.assert_array_equal(plan.encoder.slots, [[2, 0, 3, 4]])
  assert plan.decoder is None


def test_an_expert_without_room_moves_up_a_class():
  ids = np.array([[0, 1, 2]], np.int32)
  profile = plans.CapacityProfile(
    (('encoder', plans.StreamProfile(((1, 2), (3, 1)))),), num_rows=3
  )
  plan = plans.make_plan({'encoder': ids}, profile, num_experts=3)
  check(plan, plan.encoder, ids, 3)
  np.testing.assert_array_equal(plan.encoder.sources[1], [[2, 3, 3]])


def test_a_batch_that_does_not_fit_gives_no_plan():
  profile = plans.CapacityProfile(
    (('encoder', plans.StreamProfile(((1, 1),))),), num_rows=1
  )
  for ids in ([[0, 0]], [[0, 1]]):
    batch = {'encoder': np.array(ids, np.int32)}
    assert plans.make_plan(batch, profile, num_experts=2) is None


@settings(max_examples=60, deadline=None)
@given(
  st.integers(0, 2**31),
  st.integers(1, 300),
  st.sampled_from([1, 2]),
)
def test_every_batch_of_the_shape_is_planned(seed, num_experts, microbatches):
  rng = np.random.default_rng(seed)
  shapes = {'encoder': (4, 11), 'decoder': (4, 5)}
  trial = {
    name: routing(rng, *shape, num_experts) for name, shape in shapes.items()
  }
  ladder = plans.profile_ladder(
    [trial], num_experts, num_microbatches=microbatches
  )
  planner = plans.Planner(ladder, num_experts, num_microbatches=microbatches)
  hostile = [
    trial,
    {name: np.zeros(shape, np.int32) for name, shape in shapes.items()},
    {
      name: (np.arange(np.prod(shape)).reshape(shape) % num_experts).astype(
        np.int32
      )
      for name, shape in shapes.items()
    },
    {name: np.full(shape, -1, np.int32) for name, shape in shapes.items()},
  ]
  for batch in hostile:
    plan = planner(batch)
    for name in shapes:
      stream = getattr(plan, name)
      for m, part in enumerate(plans.microbatches(batch[name], microbatches)):
        check(plan, stream, part, num_experts, m if microbatches > 1 else None)
    inside = plan.experts[plan.experts < num_experts]
    # Unused rows have numbers of their own, so that a scatter may rely on it.
    assert np.unique(plan.experts).size == plan.experts.size
    present = np.unique(np.concatenate([v.reshape(-1) for v in batch.values()]))
    present = present[(present >= 0) & (present < num_experts)]
    np.testing.assert_array_equal(np.sort(inside), present)


def test_the_trial_batch_takes_the_first_profile():
  rng = np.random.default_rng(0)
  trials = [{'encoder': routing(rng, 4, 32, 50)} for _ in range(5)]
  ladder = plans.profile_ladder(trials, 50)
  planner = plans.Planner(ladder, 50)
  for trial in trials:
    planner(trial)
  assert planner.profiles_used == {0: 5}


def test_the_same_batch_gives_the_same_plan_after_any_history():
  rng = np.random.default_rng(0)
  trials = [{'encoder': routing(rng, 4, 32, 500)} for _ in range(3)]
  ladder = plans.profile_ladder(trials, 500)
  one, other = plans.Planner(ladder, 500), plans.Planner(ladder, 500)
  other({'encoder': np.zeros((4, 32), np.int32)})
  a, b = one(trials[1]), other(trials[1])
  np.testing.assert_array_equal(a.experts, b.experts)
  np.testing.assert_array_equal(a.encoder.slots, b.encoder.slots)


def test_no_trial_batches_is_an_error():
  with pytest.raises(ValueError, match='at least one trial batch'):
    plans.profile_ladder([], 3)


def test_a_batch_of_another_shape_is_an_error():
  ladder = plans.profile_ladder([{'encoder': np.zeros((1, 4), np.int32)}], 9)
  bigger = {'encoder': np.arange(9, dtype=np.int32)[None]}
  with pytest.raises(ValueError, match='from batches of this shape'):
    plans.Planner(ladder, 9)(bigger)
