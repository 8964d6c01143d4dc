"""Tests plans: every token has one slot, of its own expert, in any batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mowe.words.plans import batch_plans

NUM_EXPERTS = 7


def routing(rng, batch, length, num_experts=NUM_EXPERTS):
  """Routing ids, with padding (-1) and tokens without expert (num_experts)."""
  return rng.integers(-1, num_experts + 1, (batch, length)).astype(np.int32)


def cut(stream, microbatch):
  """The plan of one microbatch."""
  return batch_plans.StreamPlan(
    batch_plans.SizeClasses(
      *(tuple(x[microbatch] for x in field) for field in stream.classes)
    ),
    stream.slots[microbatch],
  )


def owners_and_tokens(classes):
  """The expert of each slot and the token in it, read from a plan."""
  owners = [
    np.repeat(experts, sources.shape[1])
    for experts, sources in zip(*classes, strict=True)
  ]
  tokens = [sources.reshape(-1) for sources in classes.sources]
  return np.concatenate(owners), np.concatenate(tokens)


def check_classes(classes, ids, num_experts):
  """Every routed token has one slot, of its expert; an expert has one place."""
  flat = ids.reshape(-1)
  owners, tokens = owners_and_tokens(classes)
  filled = tokens < flat.size
  # All other slots are empty, and hold the number that says so.
  assert (tokens[~filled] == flat.size).all()
  np.testing.assert_array_equal(
    np.sort(tokens[filled]),
    np.flatnonzero((flat >= 0) & (flat < num_experts)),
  )
  np.testing.assert_array_equal(owners[filled], flat[tokens[filled]])
  # Tokens are in order and empty slots come last, so a batch has only one plan.
  for sources in classes.sources:
    assert (np.diff(sources, axis=1) >= (sources[:, 1:] < flat.size)).all()
  experts = np.concatenate(classes.experts)
  # Each unused place has a number of its own, so that a scatter may rely on
  # unique indices.
  assert np.unique(experts).size == experts.size
  present = np.unique(flat)
  present = present[(present >= 0) & (present < num_experts)]
  np.testing.assert_array_equal(
    np.sort(experts[experts < num_experts]), present
  )


def check_stream(stream, ids, num_experts):
  check_classes(stream.classes, ids, num_experts)
  _, tokens = owners_and_tokens(stream.classes)
  assert stream.slots.shape == ids.shape
  slots, flat = stream.slots.reshape(-1), ids.reshape(-1)
  routed = (flat >= 0) & (flat < num_experts)
  assert (slots[~routed] == tokens.size).all()
  np.testing.assert_array_equal(tokens[slots[routed]], np.flatnonzero(routed))


def profile(*classes):
  """A profile with the same sizes for an encoder and for its updates."""
  sizes = batch_plans.ClassSizes(classes)
  return batch_plans.CapacityProfile((('encoder', sizes),), updates=sizes)


def test_three_tokens_by_hand():
  # Expert 2 has two tokens, expert 0 has one, and the last token has no expert.
  ids = np.array([[2, 0, 2, 3]], np.int32)
  plan = batch_plans.make_plan({'encoder': ids}, profile((1, 2), (2, 1)), 3)
  # Class 1 holds expert 0 and an unused place, whose number is 3 + 1. Class 2
  # holds expert 2.
  classes = plan.encoder.classes
  np.testing.assert_array_equal(classes.experts[0], [0, 4])
  np.testing.assert_array_equal(classes.experts[1], [2])
  np.testing.assert_array_equal(classes.sources[0], [[1], [4]])
  np.testing.assert_array_equal(classes.sources[1], [[0, 2]])
  np.testing.assert_array_equal(plan.encoder.slots, [[2, 0, 3, 4]])
  assert plan.decoder is None


def test_updates_count_the_tokens_of_all_streams():
  # Expert 1 is in both streams. The tokens of the decoder are numbered from 3,
  # after those of the encoder.
  ids = {
    'encoder': np.array([[1, 0, 2]], np.int32),
    'decoder': np.array([[2, 1]], np.int32),
  }
  sizes = batch_plans.ClassSizes(((1, 2), (2, 1)))
  plan = batch_plans.make_plan(
    ids,
    batch_plans.CapacityProfile(
      (('encoder', sizes), ('decoder', sizes)), sizes
    ),
    num_experts=2,
  )
  np.testing.assert_array_equal(plan.updates.experts[0], [0, 3])
  np.testing.assert_array_equal(plan.updates.experts[1], [1])
  np.testing.assert_array_equal(plan.updates.sources[0], [[1], [5]])
  np.testing.assert_array_equal(plan.updates.sources[1], [[0, 4]])


def test_an_expert_without_room_moves_up_a_class():
  ids = np.array([[0, 1, 2]], np.int32)
  plan = batch_plans.make_plan({'encoder': ids}, profile((1, 2), (3, 1)), 3)
  check_stream(plan.encoder, ids, 3)
  np.testing.assert_array_equal(plan.encoder.classes.sources[1], [[2, 3, 3]])


def test_a_batch_that_does_not_fit_gives_no_plan():
  for ids in ([[0, 0]], [[0, 1]]):
    batch = {'encoder': np.array(ids, np.int32)}
    assert batch_plans.make_plan(batch, profile((1, 1)), num_experts=2) is None


@settings(max_examples=60, deadline=None)
@given(
  st.integers(0, 2**31),
  # With more than 2**16 experts, their numbers are sorted in two rounds.
  st.integers(1, 300) | st.integers(2**16 - 1, 2**20),
  st.sampled_from([1, 2]),
)
def test_every_batch_of_the_shape_is_planned(seed, num_experts, microbatches):
  rng = np.random.default_rng(seed)
  shapes = {'encoder': (4, 11), 'decoder': (4, 5)}
  trial = {
    name: routing(rng, *shape, num_experts) for name, shape in shapes.items()
  }
  ladder = batch_plans.profile_ladder(
    [trial], num_experts, num_microbatches=microbatches
  )
  planner = batch_plans.Planner(
    ladder, num_experts, num_microbatches=microbatches
  )
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
    everything = []
    for name in shapes:
      stream = getattr(plan, name)
      for m, part in enumerate(
        batch_plans.microbatches(batch[name], microbatches)
      ):
        one = cut(stream, m) if microbatches > 1 else stream
        check_stream(one, part, num_experts)
        everything.append(part.reshape(-1))
    check_classes(plan.updates, np.concatenate(everything), num_experts)


def test_the_trial_batch_takes_the_first_profile():
  rng = np.random.default_rng(0)
  trials = [{'encoder': routing(rng, 4, 32, 50)} for _ in range(5)]
  ladder = batch_plans.profile_ladder(trials, 50)
  planner = batch_plans.Planner(ladder, 50)
  for trial in trials:
    planner(trial)
  assert planner.profiles_used == {0: 5}


def test_the_same_batch_gives_the_same_plan_after_any_history():
  rng = np.random.default_rng(0)
  trials = [{'encoder': routing(rng, 4, 32, 500)} for _ in range(3)]
  ladder = batch_plans.profile_ladder(trials, 500)
  one, other = (
    batch_plans.Planner(ladder, 500),
    batch_plans.Planner(ladder, 500),
  )
  other({'encoder': np.zeros((4, 32), np.int32)})
  a, b = one(trials[1]), other(trials[1])
  np.testing.assert_array_equal(a.encoder.slots, b.encoder.slots)
  for field, other_field in zip(a.updates, b.updates, strict=True):
    for array, other_array in zip(field, other_field, strict=True):
      np.testing.assert_array_equal(array, other_array)


@pytest.mark.parametrize('num_experts', [5, 2**17])
def test_a_stream_has_the_plan_of_its_own_tokens(num_experts):
  rng = np.random.default_rng(0)
  batch = {
    'encoder': routing(rng, 6, 13, num_experts),
    'decoder': routing(rng, 6, 4, num_experts),
  }
  (profile, *_) = batch_plans.profile_ladder(
    [batch], num_experts, num_microbatches=3
  )
  plan = batch_plans.make_plan(batch, profile, num_experts, num_microbatches=3)
  for name, sizes in profile.streams:
    for m, ids in enumerate(batch_plans.microbatches(batch[name], 3)):
      alone = batch_plans.place_tokens(ids, sizes, num_experts)
      one = cut(getattr(plan, name), m)
      np.testing.assert_array_equal(one.slots, alone.slots)
      for field, of_alone in zip(one.classes, alone.classes, strict=True):
        for array, expected in zip(field, of_alone, strict=True):
          np.testing.assert_array_equal(array, expected)


def test_no_trial_batches_is_an_error():
  with pytest.raises(ValueError, match='at least one trial batch'):
    batch_plans.profile_ladder([], 3)


def test_a_batch_of_another_shape_is_an_error():
  ladder = batch_plans.profile_ladder(
    [{'encoder': np.zeros((1, 4), np.int32)}], 9
  )
  bigger = {'encoder': np.arange(9, dtype=np.int32)[None]}
  with pytest.raises(ValueError, match='from batches of this shape'):
    batch_plans.Planner(ladder, 9)(bigger)
