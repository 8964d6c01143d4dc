"""Tests schedules by hand, and against T5X's factor strings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.training.optimization import schedules

_STEPS = (0, 1, 5, 10, 11, 40, 99, 100)


def _values(schedule, steps=_STEPS):
  return np.array([schedule(step) for step in steps])


# These are the values of create_learning_rate_scheduler(...) of T5X at commit
# cc342d4 with base_learning_rate=0.5 and warmup_steps=10, at _STEPS.
_T5X = {
  'constant': [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
  'constant * rsqrt_decay': [
    0.158113882,
    0.158113882,
    0.158113882,
    0.158113882,
    0.150755674,
    0.079056941,
    0.0502518937,
    0.0500000007,
  ],
  'constant * linear_warmup * rsqrt_decay': [
    9.99999994e-09,
    0.0158113874,
    0.079056941,
    0.158113882,
    0.150755674,
    0.079056941,
    0.0502518937,
    0.0500000007,
  ],
  'linear_decay': [
    9.99999994e-09,
    0.0500000007,
    0.25,
    0.5,
    0.495000005,
    0.350000024,
    0.0550000072,
    0.0500000119,
  ],
  'constant * linear_warmup * cosine_decay': [
    9.99999994e-09,
    0.0500000007,
    0.25,
    0.5,
    0.499876618,
    0.396946311,
    0.0147798061,
    0.0122358799,
  ],
}


def test_rsqrt_by_hand():
  schedule = schedules.warmed_up_rsqrt(1.0, warmup_steps=10_000)
  # Up to step 10000 the rate is 1 / sqrt(10000) = 0.01; at 40000 it is 1 /
  # sqrt(40000) = 0.005.
  np.testing.assert_allclose(
    _values(schedule, (0, 9_999, 10_000, 40_000)), (0.01, 0.01, 0.01, 0.005)
  )


def test_decays_by_hand():
  linear = schedules.linear_warmup_linear_decay(
    2.0, 30, warmup_steps=10, final_fraction=0.5
  )
  cosine = schedules.linear_warmup_cosine_decay(
    2.0, 30, warmup_steps=10, final_fraction=0.5
  )
  steps = (0, 5, 10, 20, 30, 1000)
  # Halfway down, line and cosine meet at (1 + 0.5) / 2 of the base rate.
  expected = (0.0, 1.0, 2.0, 1.5, 1.0, 1.0)
  np.testing.assert_allclose(_values(linear, steps), expected, rtol=1e-6)
  np.testing.assert_allclose(_values(cosine, steps), expected, rtol=1e-6)
  # After a quarter of the cosine the rate is 0.5 + 0.5 * (1 + cos(pi / 4)) / 2
  # of the base rate.
  quarter = 2 * (0.5 + 0.25 * (1 + np.sqrt(0.5)))
  np.testing.assert_allclose(cosine(15), quarter, rtol=1e-6)


@pytest.mark.parametrize(
  'factors, schedule',
  [
    ('constant', schedules.constant(0.5)),
    ('constant * rsqrt_decay', schedules.warmed_up_rsqrt(0.5, warmup_steps=10)),
    (
      'constant * linear_warmup * rsqrt_decay',
      schedules.linear_warmup_rsqrt(0.5, warmup_steps=10),
    ),
    (
      'linear_decay',
      schedules.linear_warmup_linear_decay(0.5, 110, warmup_steps=10),
    ),
    (
      'constant * linear_warmup * cosine_decay',
      schedules.linear_warmup_cosine_decay(0.5, 110, warmup_steps=10),
    ),
  ],
)
def test_equals_t5x(factors, schedule):
  # T5X never goes below 1e-8, and our schedules may start at 0.
  actual = np.maximum(_values(schedule), 1e-8)
  np.testing.assert_allclose(actual, _T5X[factors], rtol=1e-5)


def test_offset_shifts_the_steps():
  shifted = schedules.linear_warmup_rsqrt(0.5, warmup_steps=10, step_offset=100)
  plain = schedules.linear_warmup_rsqrt(0.5, warmup_steps=10)
  np.testing.assert_array_equal(
    _values(shifted, [100 + step for step in _STEPS]), _values(plain)
  )
  assert shifted(3) == 0.0


def test_traced_steps_and_dtype():
  for schedule in (
    schedules.constant(0.1),
    schedules.warmed_up_rsqrt(),
    schedules.linear_warmup_cosine_decay(0.1, 20, warmup_steps=5),
  ):
    traced = jax.jit(schedule)(jnp.int32(7))
    assert traced.dtype == jnp.float32 and traced.shape == ()
    np.testing.assert_allclose(traced, schedule(7), rtol=1e-6)


def test_errors_say_what_to_do():
  with pytest.raises(ValueError, match='optimizers.freeze'):
    schedules.constant(0.0)
  with pytest.raises(ValueError, match='Take 1 for none'):
    schedules.warmed_up_rsqrt(1.0, warmup_steps=0)
  with pytest.raises(ValueError, match='total_steps counts the warm-up'):
    schedules.linear_warmup_linear_decay(1.0, 10, warmup_steps=10)
  with pytest.raises(ValueError, match='relative to base_learning_rate'):
    schedules.linear_warmup_cosine_decay(
      1.0, 10, warmup_steps=1, final_fraction=2.0
    )
