"""Optimizers for the rows of expert tables: lazy and row-sparse.

A table is a dict of parameters <float>[num_experts, a, b]; row e of all of them
is one expert. A batch touches few experts, and only their rows, gradients and
row state come in here: the caller gathers them and scatters the results.

Each expert has a clock of its own. It is updated only in the steps in which it
is present, its *visits*, and has its own count of them. So its trajectory is
that of the dense optimizer, run on this expert alone over those steps. (With
one count for all experts, Adam's step at a first visit late in training would
be 3.2 times too large.) The learning rate alone follows the global step.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from mowe.training.optimization import adafactor_transform, row_gradients

Table = Mapping[str, jax.Array]
Gradients = Mapping[str, row_gradients.Gradient]
RowState = Any
LearningRate = float | Callable[[jax.Array], jax.Array]


class RowOptimizer(Protocol):
  """What the training step needs of an optimizer of table rows.

  Attributes:
    learning_rate: a number, or a schedule of the global step.
  """

  learning_rate: LearningRate

  def init(self, table: Table) -> RowState:
    """Returns the state of a whole table before the first update: zeros.

    Args:
      table: kernel name -> <float>[num_experts, a, b], or anything with such a
        shape.

    Returns:
      A pytree whose leaves all have the leading axis num_experts.

    Raises:
      ValueError: a parameter does not have three axes.
    """

  def update(
    self,
    gradients: Gradients,
    state_rows: RowState,
    rows: Table,
    learning_rate_step: jax.Array,
  ) -> tuple[Table, RowState]:
    """Returns the next rows and their state.

    Args:
      gradients: kernel name -> gradients of all rows, whose arrays have the
        axis [rows] before those of a single gradient.
      state_rows: the state of these rows, with the leading axis [rows].
      rows: kernel name -> <float>[rows, a, b].
      learning_rate_step: <int32>[], the global step, from 0.
    """


class RowAdafactorState(NamedTuple):
  """State of `RowAdafactor`.

  Attributes:
    counts: <int32>[num_experts], visits so far.
    v_row: kernel name -> <float32>[num_experts, a], mean of squares over b.
    v_col: kernel name -> <float32>[num_experts, b], mean of squares over a.
  """

  counts: jax.Array
  v_row: dict[str, jax.Array]
  v_col: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class RowAdafactor:
  """Adafactor for rows: a factored second moment per expert, of any size.

  Attributes:
    learning_rate: a number, or a schedule of the global step.
    decay_rate: visit n has second moment decay `1 - n^-decay_rate`.
    clipping_threshold: largest root mean square of the update of one parameter
      of one expert before it is scaled; None for no clipping.
    multiply_by_parameter_scale: learning rate relative to the root mean square
      of the parameter of this expert (and never below `epsilon2`).
    epsilon1: added to squared gradients.
    epsilon2: smallest parameter scale.
  """

  learning_rate: LearningRate
  decay_rate: float = 0.8
  clipping_threshold: float | None = 1.0
  multiply_by_parameter_scale: bool = True
  epsilon1: float = 1e-30
  epsilon2: float = 1e-3

  def init(self, table: Table) -> RowAdafactorState:
    """See `RowOptimizer.init`."""
    num_experts = check_table(table)

    def zeros(axis):
      return {
        name: jnp.zeros((num_experts, param.shape[axis]), jnp.float32)
        for name, param in table.items()
      }

    counts = jnp.zeros((num_experts,), jnp.int32)
    return RowAdafactorState(counts, zeros(1), zeros(2))

  def update(
    self,
    gradients: Gradients,
    state_rows: RowAdafactorState,
    rows: Table,
    learning_rate_step: jax.Array,
  ) -> tuple[dict[str, jax.Array], RowAdafactorState]:
    """See `RowOptimizer.update`."""
    rate = rate_of(self.learning_rate, learning_rate_step)

    def update_expert(gradient, state, param):
      count = state.counts + 1
      decay = adafactor_transform.second_moment_decay(count, self.decay_rate)
      results = {
        name: self._update_kernel(
          gradient[name],
          param[name],
          state.v_row[name],
          state.v_col[name],
          decay,
          rate,
        )
        for name in param
      }
      new, v_row, v_col = (
        {name: result[i] for name, result in results.items()} for i in range(3)
      )
      return new, RowAdafactorState(count, v_row, v_col)

    return jax.vmap(update_expert)(dict(gradients), state_rows, dict(rows))

  def _update_kernel(self, gradient, param, v_row, v_col, decay, rate):
    """Returns the next kernel [a, b], v_row [a] and v_col [b] of one expert."""
    matrix = adafactor_transform.Factoring(
      averaged=(0, 1), rows=(0,), columns=(1,)
    )
    over_columns, over_rows = gradient.mean_squares()
    v_row = decay * v_row + (1.0 - decay) * (over_columns + self.epsilon1)
    v_col = decay * v_col + (1.0 - decay) * (over_rows + self.epsilon1)
    row, column = adafactor_transform.inverse_roots(v_row, v_col, matrix)
    row, column = row[:, 0], column[0]
    old = param.astype(jnp.float32)
    size = rate
    if self.clipping_threshold is not None:
      rms = jnp.sqrt(gradient.mean_square_times(row, column))
      size = size / jnp.maximum(1.0, rms / self.clipping_threshold)
    if self.multiply_by_parameter_scale:
      scale = adafactor_transform.parameter_scale(old, self.epsilon2, (0, 1))
      size = size * scale[0, 0]
    # An outer product stays one up to here, where it meets the kernel.
    step = gradient.times(size * row, column).matrix()
    return (old - step).astype(param.dtype), v_row, v_col


class RowAdamState(NamedTuple):
  """State of `RowAdam`.

  Attributes:
    counts: <int32>[num_experts], visits so far.
    last_visits: <int32>[num_experts], global step of the last visit; its value
      has no meaning while the count is 0.
    mu: kernel name -> <float32>[num_experts, a, b], first moment.
    nu: kernel name -> <float32>[num_experts, a, b], second moment.
  """

  counts: jax.Array
  last_visits: jax.Array
  mu: dict[str, jax.Array]
  nu: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class RowAdam:
  """Adam for rows, with weight decay that makes up for the steps missed.

  Moments do not decay while an expert is absent. Weights do, all at once at the
  next visit: by `(1 - rate * weight_decay)^gap`, where gap is the number of
  global steps since the last visit and the rate is that of the present step. A
  first visit has gap 1, so that a fresh state late in training does not erase
  the expert.

  Attributes:
    learning_rate: a number, or a schedule of the global step.
    b1: decay of the first moment, per visit.
    b2: decay of the second moment, per visit.
    eps: added to the root of the second moment.
    weight_decay: multiplied by the learning rate, as in optax.adamw.
    max_norm: largest norm of the gradient of one expert; a larger gradient is
      shrunk to it. None for no clipping. There is no clipping by the norm of
      all gradients, as those of tables are formed a few experts at a time.
  """

  learning_rate: LearningRate
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  max_norm: float | None = None

  def init(self, table: Table) -> RowAdamState:
    """See `RowOptimizer.init`."""
    num_experts = check_table(table)

    def zeros():
      return {
        name: jnp.zeros(param.shape, jnp.float32)
        for name, param in table.items()
      }

    # Two arrays, not one twice: the state is donated to the training step.
    counts = jnp.zeros((num_experts,), jnp.int32)
    last_visits = jnp.zeros((num_experts,), jnp.int32)
    return RowAdamState(counts, last_visits, zeros(), zeros())

  def update(
    self,
    gradients: Gradients,
    state_rows: RowAdamState,
    rows: Table,
    learning_rate_step: jax.Array,
  ) -> tuple[dict[str, jax.Array], RowAdamState]:
    """See `RowOptimizer.update`."""
    rate = rate_of(self.learning_rate, learning_rate_step)
    global_step = jnp.asarray(learning_rate_step, jnp.int32)
    update_expert = functools.partial(self._update_expert, rate, global_step)
    return jax.vmap(update_expert)(
      row_gradients.matrices(gradients), state_rows, dict(rows)
    )

  def _update_expert(self, rate, global_step, gradient, state, param):
    """Returns the next kernels of one expert, each [a, b], and its state."""
    count = state.counts + 1
    gap = jnp.where(state.counts == 0, 1, global_step - state.last_visits)
    keep = (1.0 - rate * self.weight_decay) ** gap
    if self.max_norm is not None:
      shrink = self.max_norm / jnp.maximum(
        optax.global_norm(gradient), self.max_norm
      )
      gradient = jax.tree.map(lambda g: g * shrink, gradient)
    mu = jax.tree.map(
      lambda m, g: self.b1 * m + (1 - self.b1) * g, state.mu, gradient
    )
    nu = jax.tree.map(
      lambda n, g: self.b2 * n + (1 - self.b2) * g**2, state.nu, gradient
    )
    mu_bias = 1.0 - jnp.float32(self.b1) ** count
    nu_bias = 1.0 - jnp.float32(self.b2) ** count

    def update_kernel(param, mu, nu):
      step = (mu / mu_bias) / (jnp.sqrt(nu / nu_bias) + self.eps)
      new = keep * param.astype(jnp.float32) - rate * step
      return new.astype(param.dtype)

    new = jax.tree.map(update_kernel, param, mu, nu)
    # No visit is later than the present step. The maximum says so to XLA, which
    # would otherwise write this step before it has read the last visits, and
    # copy all of them to do so.
    last_visit = jnp.maximum(global_step, state.last_visits)
    return new, RowAdamState(count, last_visit, mu, nu)


def rate_of(learning_rate: LearningRate, step: jax.Array) -> jax.Array:
  """The learning rate of a global step, <float32>[]."""
  rate = learning_rate(step) if callable(learning_rate) else learning_rate
  return jnp.asarray(rate, jnp.float32)


def check_table(table: Table) -> int:
  """Returns num_experts, after a check of all shapes."""
  shapes = {name: tuple(param.shape) for name, param in table.items()}
  num_experts = {shape[:1] for shape in shapes.values()}
  ranks = {len(shape) for shape in shapes.values()}
  if ranks != {3} or len(num_experts) != 1:
    raise ValueError(
      'Parameters of an expert table must be [num_experts, a, b] with the '
      f'same num_experts, but are {shapes}. Keep other parameters out of '
      'the module called experts.'
    )
  return num_experts.pop()[0]
