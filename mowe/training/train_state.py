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
  """All that a checkpoint has to hold to continue with the same bits.

  Attributes:
    step: <int32>[], the number of updates made.
    params: the ordinary parameters, nested as in the model.
    opt_state: the optax state of `params`.
    tables: path of a table, such as `experts` -> its kernels by name,
      [num_experts, ...] in float32 or <uint16>, the bits of bfloat16. With
      experts in host memory or on disk, those in the slots of the device,
      [num_slots, ...]. {} if experts are frozen, and in checkpoints, which keep
      experts in a file of their own.
    table_state: path of a table -> the state of the row optimizer, every leaf
      with a leading axis of experts, or of slots.
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
    memory: the collection `model_config.MEMORY` that the next batch reads,
      arrays [batch, ...].
  """

  memory: Any


def not_finite(state: TrainState) -> list[str]:
  """Returns the names of ordinary arrays that hold NaN or infinity.

  These are the parameters, the state of their optimizer and the memory. Rows of
  tables are looked at when they are written.
  """
  ordinary = state.replace(tables={}, table_state={})
  # A program for each shape is compiled sooner than one for all arrays. Each is
  # waited for, because CPU devices that are to exchange the results of many
  # programs at a time may wait for each other without end.
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, leaf in jax.tree_util.tree_leaves_with_path(ordinary)
    if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(_is_finite(leaf))
  ]


@jax.jit
def _is_finite(array):
  return jnp.isfinite(array).all()


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
    key: the random key of the parameters, one of `threefry.key`.
    optimizer: updates the ordinary parameters.
    row_optimizer: updates the expert tables. None if they are frozen: they have
      no state then, and are to be taken out of the state that is trained.
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
  """The state at step 0 of training these parameters.

  Args:
    params: the ordinary parameters.
    tables: the expert tables; {} if there are none, or they are frozen.
    optimizer: updates the ordinary parameters.
    row_optimizer: updates the expert tables; None if they are frozen.
    shardings: a state with the sharding of each array in its place; None leaves
      the places to jax.
    make_memory: returns the memory before the first batch; None for a model
      without a memory.
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
