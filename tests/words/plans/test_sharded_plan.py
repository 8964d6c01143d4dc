"""Tests plans for several devices: each token reaches its expert, in order."""

import functools

import numpy as np
import pytest

from mowe.words.plans import batch_plans, sharded_plan

EXPERTS = 24
SHAPES = {'encoder': (16, 5), 'decoder': (16, 3)}
DEVICES = [(1, 8), (4, 2), (2, 4), (2, 3)]


def make_ids(seed, rows=16, names=('encoder', 'decoder')):
  rng = np.random.default_rng(seed)
  popularity = 1 / np.arange(1, EXPERTS + 3)
  popularity = rng.permutation(popularity / popularity.sum())
  return {
    # An id of -1 is padding, and EXPERTS is a word without an expert.
    name: rng.choice(
      np.arange(-1, EXPERTS + 1),
      (rows, SHAPES[name][1]),
      p=popularity,
    ).astype(np.int32)
    for name in names
  }


def make_planner(trials, devices, num_microbatches=1):
  return batch_plans.Planner(
    sharded_plan.profile_ladder(
      trials, EXPERTS, devices=devices, num_microbatches=num_microbatches
    ),
    EXPERTS,
    num_microbatches=num_microbatches,
    make_plan=functools.partial(sharded_plan.make_plan, devices=devices),
  )


def experts_of_slots(classes):
  """The expert of each slot, class after class."""
  return np.concatenate(
    [
      np.repeat(experts, sources.shape[1])
      for experts, sources in zip(*classes, strict=True)
    ]
  )


def on(plan, *index):
  """The part of a plan that has every array at `index`."""
  if isinstance(plan, np.ndarray):
    return plan[index]
  parts = [on(part, *index) for part in plan]
  return type(plan)(*parts) if hasattr(plan, '_fields') else tuple(parts)


def check_stream(stream, ids, devices):
  """Follows each token to its expert; returns what each device received."""
  data, owners = devices
  own = EXPERTS // owners
  # `came` has the number of the token in each row that arrives, or -1.
  tokens = np.arange(ids.size).reshape(*devices, -1)
  capacity = stream.sent.shape[-1]
  came = np.full((*devices, owners, capacity), -1)
  routes = ids.reshape(*devices, -1)
  for i, j in np.ndindex(data, owners):
    sent = stream.sent[i, j]
    filled = sent < tokens.shape[-1]
    for owner in range(owners):
      row = sent[owner][filled[owner]]
      # A buffer is filled from the front, in the order of tokens.
      assert filled[owner][: row.size].all() and (np.diff(row) > 0).all()
      came[i, owner, j, : row.size] = tokens[i, j][row]
    has_expert = (routes[i, j] >= 0) & (routes[i, j] < EXPERTS)
    # Each token with an expert is where the plan says, and no other token is
    # sent.
    assert (stream.places[i, j][~has_expert] == sent.size).all()
    np.testing.assert_array_equal(
      sent.reshape(-1)[stream.places[i, j][has_expert]],
      np.flatnonzero(has_expert),
    )
    assert filled.sum() == has_expert.sum()
  came = came.reshape(*devices, -1)
  for i, owner in np.ndindex(data, owners):
    received = on(stream.received, i, owner)
    of_slot = experts_of_slots(received.classes)
    row = came[i, owner]
    wanted = ids.reshape(-1)[row[row >= 0]] - owner * own
    assert ((wanted >= 0) & (wanted < own)).all()
    np.testing.assert_array_equal(of_slot[received.slots[row >= 0]], wanted)
    assert (received.slots[row < 0] == of_slot.size).all()
  return came


@pytest.mark.parametrize('devices', DEVICES)
@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('num_microbatches', [1, 2])
def test_no_token_is_lost(devices, seed, num_microbatches):
  rows = 2 * devices[0] * devices[1]
  make = functools.partial(make_ids, rows=rows)
  planner = make_planner([make(seed + 100)], devices, num_microbatches)
  batch = make(seed)
  plan = planner(batch)
  came, first = [], 0
  for name in SHAPES:
    stream = getattr(plan, name)
    for part, ids in enumerate(
      batch_plans.microbatches(batch[name], num_microbatches)
    ):
      of_part = stream if num_microbatches == 1 else on(stream, part)
      tokens = check_stream(of_part, ids, devices)
      came.append(np.where(tokens < 0, -1, tokens + first))
      first += ids.size
  # All tokens of all parts are in the order of a plan for one device.
  everything = np.concatenate(
    [
      part.reshape(-1)
      for name in SHAPES
      for part in batch_plans.microbatches(batch[name], num_microbatches)
    ]
  )
  own, updated = EXPERTS // devices[1], set()
  for owner in range(devices[1]):
    rows = np.concatenate([tokens[:, owner].reshape(-1) for tokens in came])
    for experts, sources in zip(*on(plan.updates, owner), strict=True):
      for expert, of_expert in zip(experts, sources, strict=True):
        if expert >= own:
          assert (of_expert >= rows.size).all()
          continue
        tokens = rows[of_expert[of_expert < rows.size]]
        # The expert has all of its tokens, in the order of the batch.
        np.testing.assert_array_equal(
          tokens, np.flatnonzero(everything == owner * own + expert)
        )
        updated.add(owner * own + expert)
  present = everything[(everything >= 0) & (everything < EXPERTS)]
  assert updated == set(present.tolist())
  np.testing.assert_array_equal(
    plan.present_experts(EXPERTS), np.unique(present)
  )
  assert plan.num_tokens() == present.size


def test_a_larger_profile_holds_what_no_trial_had():
  devices = (2, 4)
  trials = [make_ids(seed, rows=8) for seed in range(3)]
  # In this batch all tokens have the same expert.
  hot = {name: np.full_like(ids, 7) for name, ids in trials[0].items()}
  planner = make_planner(trials, devices)
  planner(trials[0])
  check_stream(planner(hot).encoder, hot['encoder'], devices)
  assert set(planner.profiles_used) > {0}


def test_shapes_depend_on_the_profile_alone():
  planner = make_planner([make_ids(seed) for seed in range(4)], (2, 4))
  shapes = set()
  for seed in range(4):
    plan = planner(make_ids(seed))
    # Plans are stacked over devices, so their shapes are equal on all devices.
    assert plan.encoder.sent.shape[:3] == (2, 4, 4)
    assert plan.encoder.received.slots.shape[:2] == (2, 4)
    assert all(x.shape[0] == 4 for x in plan.updates.experts)
    shapes.add(str([x.shape for x in plan.encoder.received.classes.sources]))
  assert len(shapes) == 1 and planner.profiles_used == {0: 4}


def test_a_model_with_one_stream():
  ids = make_ids(0, names=('decoder',))
  plan = make_planner([ids], (2, 4))(ids)
  assert plan.encoder is None
  check_stream(plan.decoder, ids['decoder'], (2, 4))


def test_a_batch_that_fits_nothing_is_refused():
  planner = make_planner([make_ids(0, rows=8)], (2, 4))
  larger = {name: np.full((800, 3), 1) for name in SHAPES}
  with pytest.raises(ValueError, match='shape of the trial batches'):
    planner(larger)


def test_what_cannot_be_split_is_named():
  ladder = sharded_plan.profile_ladder
  with pytest.raises(
    ValueError, match="axis 'expert', 5, .* is 24. Make it 25"
  ):
    ladder([make_ids(0)], EXPERTS, devices=(1, 5))
  with pytest.raises(
    ValueError, match='2 x 4 = 8, but are 12. Change the batch'
  ):
    ladder([make_ids(0, rows=12)], EXPERTS, devices=(2, 4))
  with pytest.raises(ValueError, match='at least one trial batch'):
    ladder([], EXPERTS, devices=(2, 4))
