"""Learning rate schedules: functions of the step, as optax expects them.

`warmed_up_rsqrt` and `constant` are T5's own. Where T5X's
`create_learning_rate_scheduler` has the same schedule, values agree with it,
and the docstring names its factors there. All schedules take Python integers
and traced steps, and compute in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[int | jax.Array], jax.Array]


def constant(base_learning_rate: float) -> Schedule:
  """The same value at every step, 'constant' in T5X; T5 finetunes with 0.001.

  Raises:
    ValueError: `base_learning_rate` is not positive.
  """
  _check_positive('base_learning_rate', base_learning_rate)
  return lambda step: jnp.asarray(base_learning_rate, jnp.float32)


def warmed_up_rsqrt(
  base_learning_rate: float = 1.0,
  *,
  warmup_steps: int = 10_000,
  step_offset: int = 0,
) -> Schedule:
  """`base / sqrt(max(step, warmup_steps))`, T5's pretraining schedule.

  The warm-up is flat: the value of step `warmup_steps` holds before it.
  In T5X: 'constant * rsqrt_decay'.

  Args:
    base_learning_rate: the numerator; T5 takes 1.0, so that the rate is 0.01
      during a warm-up of 10,000 steps.
    warmup_steps: steps before the decay starts, at least 1.
    step_offset: the step at which this schedule starts to count.

  Raises:
    ValueError: `base_learning_rate` or `warmup_steps` is not positive.
  """
  _check_positive('base_learning_rate', base_learning_rate)
  _check_positive('warmup_steps', warmup_steps)

  def schedule(step):
    step = _steps_since(step, step_offset)
    return base_learning_rate / jnp.sqrt(jnp.maximum(step, warmup_steps))

  return schedule


def linear_warmup_rsqrt(
  base_learning_rate: float = 0.5,
  *,
  warmup_steps: int = 1_000,
  step_offset: int = 0,
) -> Schedule:
  """As `warmed_up_rsqrt`, but rising from 0 over the warm-up.

  In T5X: 'constant * linear_warmup * rsqrt_decay', its default.

  Args:
    base_learning_rate: the numerator of `base / sqrt(step)`.
    warmup_steps: steps over which the rate rises linearly from 0, at least 1.
    step_offset: the step at which this schedule starts to count.

  Raises:
    ValueError: `base_learning_rate` or `warmup_steps` is not positive.
  """
  rsqrt = warmed_up_rsqrt(
    base_learning_rate, warmup_steps=warmup_steps, step_offset=step_offset
  )

  def schedule(step):
    since = _steps_since(step, step_offset)
    return jnp.minimum(1.0, since / warmup_steps) * rsqrt(step)

  return schedule


def linear_warmup_linear_decay(
  base_learning_rate: float,
  total_steps: int,
  *,
  warmup_steps: int = 0,
  final_fraction: float = 0.0,
  step_offset: int = 0,
) -> Schedule:
  """Rises linearly to the base rate, then falls linearly to a part of it.

  In T5X: 'linear_decay' with decay_factor `1 / (total_steps - warmup_steps)`,
  but T5X goes on falling below `final_fraction`.

  Args:
    base_learning_rate: the highest value, reached at `warmup_steps`.
    total_steps: the step at which the decay ends, warm-up included.
    warmup_steps: length of the rise from 0; 0 starts at the base rate.
    final_fraction: value from `total_steps` on, relative to the base rate.
    step_offset: the step at which this schedule starts to count.

  Raises:
    ValueError: a rate is not positive, or the decay has no steps left.
  """
  _check_positive('base_learning_rate', base_learning_rate)
  _check_decay(total_steps, warmup_steps, final_fraction)

  def schedule(step):
    warmup, progress = _phases(step, step_offset, warmup_steps, total_steps)
    decay = 1.0 - (1.0 - final_fraction) * progress
    return base_learning_rate * warmup * decay

  return schedule


def linear_warmup_cosine_decay(
  base_learning_rate: float,
  total_steps: int,
  *,
  warmup_steps: int = 0,
  final_fraction: float = 0.0,
  step_offset: int = 0,
) -> Schedule:
  """Rises linearly to the base rate, then falls along half a cosine.

  In T5X: 'constant * linear_warmup * cosine_decay' with steps_per_cycle
  `total_steps - warmup_steps`, but T5X starts a new cycle after that.

  Args:
    base_learning_rate: the highest value, reached at `warmup_steps`.
    total_steps: the step at which the decay ends, warm-up included.
    warmup_steps: length of the rise from 0; 0 starts at the base rate.
    final_fraction: value from `total_steps` on, relative to the base rate.
    step_offset: the step at which this schedule starts to count.

  Raises:
    ValueError: a rate is not positive, or the decay has no steps left.
  """
  _check_positive('base_learning_rate', base_learning_rate)
  _check_decay(total_steps, warmup_steps, final_fraction)

  def schedule(step):
    warmup, progress = _phases(step, step_offset, warmup_steps, total_steps)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    decay = final_fraction + (1.0 - final_fraction) * cosine
    return base_learning_rate * warmup * decay

  return schedule


def _steps_since(step: int | jax.Array, step_offset: int) -> jax.Array:
  """Steps since the offset, <float32>[], 0 before it."""
  return jnp.maximum(jnp.asarray(step, jnp.float32) - step_offset, 0.0)


def _phases(step, step_offset, warmup_steps, total_steps):
  """Returns how far warm-up and decay have come, both 0 to 1."""
  step = _steps_since(step, step_offset)
  warmup = jnp.minimum(1.0, step / warmup_steps) if warmup_steps else 1.0
  progress = (step - warmup_steps) / (total_steps - warmup_steps)
  return warmup, jnp.clip(progress, 0.0, 1.0)


def _check_positive(name: str, value: float) -> None:
  if not value > 0:
    raise ValueError(
      f'{name} must be positive, but is {value}. Freeze parameters with '
      'optimizers.freeze instead of a rate of 0.'
      if name == 'base_learning_rate'
      else f'{name} must be positive, but is {value}. Take 1 for none.'
    )


def _check_decay(
  total_steps: int, warmup_steps: int, final_fraction: float
) -> None:
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      'warmup_steps must be at least 0 and below total_steps, but they are '
      f'{warmup_steps} and {total_steps}. total_steps counts the warm-up: '
      'raise it, or shorten the warm-up.'
    )
  if not 0 <= final_fraction <= 1:
    raise ValueError(
      'final_fraction must lie between 0 and 1, but is '
      f'{final_fraction}. It is relative to base_learning_rate.'
    )
