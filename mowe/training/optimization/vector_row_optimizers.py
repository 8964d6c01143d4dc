"""Row optimizers that need little memory, for tables whose rows are vectors.

They have the clocks of `row_optimizers`: a row is updated only in the steps in
which it is present. Their state is one number per row, or one momentum.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mowe.training.optimization import row_gradients, row_optimizers


class RowScalarAdamState(NamedTuple):
  """State of `RowScalarAdam`.

  Attributes:
    counts: <int32>[num_rows], visits so far.
    nu: parameter name -> <float32>[num_rows], the second moment.
  """

  counts: jax.Array
  nu: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class RowScalarAdam:
  """Adam without a first moment, and with one second moment for a whole row.

  With g, the gradient of a row, and t, its visit:

    nu = b2 nu + (1 - b2) mean(g^2)
    row = row - rate g / (sqrt(nu / (1 - b2^t)) + eps)

  So the direction is that of the gradient, and the state of a row is two
  numbers.

  Source: the host table of karpathy/nanochat, pull request 854, has one second
  moment for each row.

  Attributes:
    learning_rate: a number, or a schedule of the global step.
    b2: decay of the second moment, per visit.
    eps: added to the root of the second moment.
  """

  learning_rate: row_optimizers.LearningRate
  b2: float = 0.99
  eps: float = 1e-8

  def init(self, table: row_optimizers.Table) -> RowScalarAdamState:
    """See `RowOptimizer.init`."""
    num_rows = row_optimizers.check_table(table)
    return RowScalarAdamState(
      jnp.zeros((num_rows,), jnp.int32),
      {name: jnp.zeros((num_rows,), jnp.float32) for name in table},
    )

  def update(
    self,
    gradients: row_optimizers.Gradients,
    state_rows: RowScalarAdamState,
    rows: row_optimizers.Table,
    learning_rate_step: jax.Array,
  ) -> tuple[dict[str, jax.Array], RowScalarAdamState]:
    """See `RowOptimizer.update`."""
    rate = row_optimizers.rate_of(self.learning_rate, learning_rate_step)
    counts = state_rows.counts + 1
    bias = 1.0 - jnp.float32(self.b2) ** counts
    new, moments = {}, {}
    for name, gradient in row_gradients.matrices(gradients).items():
      square = jnp.mean(gradient**2, axis=(1, 2))
      nu = self.b2 * state_rows.nu[name] + (1 - self.b2) * square
      size = rate / (jnp.sqrt(nu / bias) + self.eps)
      old = rows[name].astype(jnp.float32)
      step = size[:, None, None] * gradient
      new[name] = (old - step).astype(rows[name].dtype)
      moments[name] = nu
    return new, RowScalarAdamState(counts, moments)


class RowMomentumState(NamedTuple):
  """State of `RowNormalizedMomentum`.

  Attributes:
    last_visits: parameter name -> <int32>[num_rows, a], the global step of the
      last visit of each part; its value has no meaning before the first.
    momentum: parameter name -> <float32>[num_rows, a, b].
  """

  last_visits: dict[str, jax.Array]
  momentum: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class RowNormalizedMomentum:
  """Momentum whose step has the same size for each row.

  With g, the gradient of a row of n numbers, and m, its momentum:

    m = beta m + (1 - beta) g
    u = beta m + (1 - beta) g
    row = row - scale rate sqrt(n) u / (|u| + eps)

  A row that is absent for some steps has gradients of zero there, so its
  momentum decays by beta for each of them, at the next visit. The dense
  algorithm would also move the row in these steps; here it stays. Each part of
  a row (the last axis) is normalized by itself, and stays where its gradient is
  zero: then no token of its blocks named the row.

  Source: DeepSeek-V4.1, arXiv 2609.19969, algorithm 1 with one iteration (K =
  1) and without its threshold, which needs the norms of all rows.

  Attributes:
    learning_rate: a number, or a schedule of the global step.
    beta: decay of the momentum, per step.
    scale: by which the learning rate is multiplied.
    eps: added to norms.
  """

  learning_rate: row_optimizers.LearningRate
  beta: float = 0.95
  scale: float = 0.18
  eps: float = 1e-8

  def init(self, table: row_optimizers.Table) -> RowMomentumState:
    """See `RowOptimizer.init`."""
    row_optimizers.check_table(table)
    return RowMomentumState(
      {name: jnp.zeros(x.shape[:2], jnp.int32) for name, x in table.items()},
      {name: jnp.zeros(x.shape, jnp.float32) for name, x in table.items()},
    )

  def update(
    self,
    gradients: row_optimizers.Gradients,
    state_rows: RowMomentumState,
    rows: row_optimizers.Table,
    learning_rate_step: jax.Array,
  ) -> tuple[dict[str, jax.Array], RowMomentumState]:
    """See `RowOptimizer.update`."""
    rate = row_optimizers.rate_of(self.learning_rate, learning_rate_step)
    global_step = jnp.asarray(learning_rate_step, jnp.int32)
    new, momentum, last_visits = {}, {}, {}
    for name, gradient in row_gradients.matrices(gradients).items():
      is_here = jnp.any(gradient != 0, axis=-1)
      visits = state_rows.last_visits[name]
      # Before its first visit the momentum of a part is zero, whatever its
      # decay.
      missed = jnp.maximum(global_step - visits - 1, 0)
      faded = jnp.float32(self.beta) ** missed
      added = (1 - self.beta) * gradient
      decayed = faded[..., None] * state_rows.momentum[name]
      moved = self.beta * decayed + added
      ahead = self.beta * moved + added
      norm = jnp.sqrt(jnp.sum(ahead**2, axis=-1, keepdims=True))
      size = self.scale * rate * jnp.sqrt(jnp.float32(ahead.shape[-1]))
      old = rows[name].astype(jnp.float32)
      step = jnp.where(is_here[..., None], size * ahead / (norm + self.eps), 0)
      new[name] = (old - step).astype(rows[name].dtype)
      momentum[name] = jnp.where(
        is_here[..., None], moved, state_rows.momentum[name]
      )
      # See RowAdam for the maximum.
      latest = jnp.maximum(global_step, visits)
      last_visits[name] = jnp.where(is_here, latest, visits)
    return new, RowMomentumState(last_visits, momentum)
