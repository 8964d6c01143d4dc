"""Plans made on the device equal those of the host, array for array."""

import functools

import jax
import numpy as np
import pytest

from mowe.layers import device_plan
from mowe.words import batch_plans

# (experts, microbatches, lengths of the streams), every batch of 6 rows.
CASES = [
  (1, 1, {'encoder': 3}),
  (7, 2, {'encoder': 11, 'decoder': 4}),
  (50, 1, {'decoder': 31}),
  (300, 3, {'encoder': 40, 'decoder': 17}),
  (100_000, 1, {'encoder': 29, 'decoder': 8}),
]


def draw(rng, num_experts, lengths):
  """Routing ids, skewed or not, with some out of range."""
  kinds = [
    lambda shape: rng.integers(-3, num_experts + 4, shape),
    lambda shape: np.minimum(rng.zipf(1.3, shape) - 2, num_experts),
    lambda shape: np.full(shape, rng.integers(num_experts)),
    lambda shape: np.full(shape, -1),
  ]
  ids = kinds[rng.integers(len(kinds))]
  return {
    name: ids((6, length)).astype(np.int32) for name, length in lengths.items()
  }


@pytest.mark.parametrize('case', CASES)
def test_equals_the_plan_of_the_host(case):
  num_experts, num_microbatches, lengths = case
  rng = np.random.default_rng(num_experts)
  trial = draw(rng, num_experts, lengths)
  ladder = batch_plans.profile_ladder(
    [trial], num_experts, num_microbatches=num_microbatches
  )
  settings = {
    'num_experts': num_experts,
    'num_microbatches': num_microbatches,
  }
  fitted = []
  for profile in (ladder[0], ladder[-1]):
    on_device = jax.jit(
      functools.partial(device_plan.make_plan, profile=profile, **settings)
    )
    for batch in [trial] + [draw(rng, num_experts, lengths) for _ in range(12)]:
      actual, fits = on_device(batch)
      expected = batch_plans.make_plan(batch, profile, **settings)
      assert fits == (expected is not None)
      fitted.append(bool(fits))
      if expected is not None:
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        dtypes = lambda plan: [x.dtype for x in jax.tree.leaves(plan)]
        assert dtypes(actual) == dtypes(expected)
  assert any(fitted)


def test_what_does_not_fit_says_so():
  sizes = batch_plans.ClassSizes(((1, 1), (2, 1)))
  for ids, expected in [
    ([0, 1], True),  # The second moves up to the class of two tokens.
    ([1, 1, 0], True),
    ([0, 1, 2], False),
    ([0, 0, 1, 1], False),
    ([3, 3, 3], False),
  ]:
    _, fits = device_plan.place_tokens(np.array(ids, np.int32), sizes, 5)
    assert fits == expected
