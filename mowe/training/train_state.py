"""What training changes: ordinary parameters, and rows of expert tables."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from mowe.models import initialization, parameters
from mowe.training.optimization import row_optimizers


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint has to hold to continue to the same bits.

  Attributes:
    step: <int32>[], number of updates made.
    params: ordinary parameters, nested as in the model.
    opt_state: the optax state of `params`.
    tables: path of a table, such as `experts` -> its kernels
      [num_experts, ...] by name, <float32> or bits of bfloat16; or the experts
      that are on the device, [num_slots, ...]. Empty when experts are frozen,
      and in checkpoints, which keep experts beside it.
    table_state: path of a table -> state of the row optimizer, every leaf with
      a leading axis of experts.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  tables: parameters.Tables
  table_state: dict[str, Any]


@flax.struct.dataclass
class RememberingState(TrainState):
  """The state of a model with a memory of earlier batches.

  Attributes:
    memory: the collection `model_config.MEMORY`, rows of the next batch.
  """

  memory: Any


def create(
  model: nn.Module,
  key: jax.Array,
  *,
  optimizer: optax.GradientTransformation,
  row_optimizer: row_optimizers.RowOptimizer | None,
) -> TrainState:
  """A fresh state with whole tables; works under `jit` and `eval_shape`, too.

  Args:
    model: the model.
    key: seed of the parameters.
    optimizer: of the ordinary parameters.
    row_optimizer: of the expert tables; None if they are frozen: they have no
      state then, and are to be taken out of the state that is trained.
  """
  params, tables = parameters.split_tables(
    initialization.initial_parameters(model, key)
  )
  return begin(params, tables, optimizer=optimizer, row_optimizer=row_optimizer)


def begin(
  params: Any,
  tables: parameters.Tables,
  *,
  optimizer: optax.GradientTransformation,
  row_optimizer: row_optimizers.RowOptimizer | None,
  shardings: TrainState | None = None,
  make_memory: Callable[[], Any] | None = None,
) -> TrainState:
  """The state at step 0 of training these parameters; see `create`.

  `make_memory` gives the memory before the first batch, if the model has one.
  """

  def make_rest(params, tables):
    kind = TrainState
    if make_memory is not None:
      kind = functools.partial(RememberingState, memory=make_memory())
    return kind(
      step=jnp.zeros((), jnp.int32),
      params={},
      opt_state=optimizer.init(params),
      tables={},
      table_state={
        name: row_optimizer.init(table) for name, table in tables.items()
      }
      if row_optimizer is not None
      else {},
    )

  placed = shardings and shardings.replace(params={}, tables={})
  rest = jax.jit(make_rest, out_shardings=placed)(params, tables)
  return rest.replace(params=params, tables=tables)
