"""Rows of memories in a training step: gathered before it, updated after it.

A batch names few rows of a memory. They are gathered, the loss is
differentiated with respect to them, and the row optimizer updates them in their
place. No array of the size of a table is made.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mowe.layers.memory import bfloat16_bits, row_table, rows_in_place
from mowe.models import parameters
from mowe.training.optimization import (
  row_gradients,
  row_optimizers,
  table_updates,
)
from mowe.words.plans import row_plans, step_plans

_EXPERT_AXIS = 'expert'


def gather(
  tables: parameters.Tables, plan: step_plans.StepPlan | None
) -> dict[str, dict[str, jax.Array]]:
  """Returns the rows of all memories that a batch names.

  Args:
    tables: the tables, those of word experts among them.
    plan: the plan of the batch, or None.

  Returns:
    The collection `row_table.GATHERED`: name of a memory -> {`row_table.ROWS`:
    <float32>[rows, parts, row]}.
  """
  if plan is None:
    return {}
  return {
    name: {
      row_table.ROWS: bfloat16_bits.to_float(
        _read(tables[name][row_table.ROWS], of_memory.rows)
      ).astype(jnp.float32)
    }
    for name, of_memory in plan.memories.items()
  }


def update(
  row_optimizer: row_optimizers.RowOptimizer,
  rows: table_updates.TableAndState,
  *,
  gradients: dict[str, jax.Array],
  plan: row_plans.RowsPlan,
  step: table_updates.StepValues,
) -> table_updates.TableAndState:
  """Returns a memory's table and its state after one step.

  Args:
    row_optimizer: updates the rows.
    rows: all rows of the table.
    gradients: {`row_table.ROWS`: <float32>[rows, parts, row]}, gradients of the
      gathered rows.
    plan: the plan of the rows.
    step: the values of the step.
  """
  num_parts = _num_parts()
  update_own = functools.partial(_update_own, row_optimizer)
  arguments = (rows, gradients, plan.rows, step)
  if num_parts == 1:
    return update_own(*arguments, first=0)
  split, whole = PartitionSpec(_EXPERT_AXIS), PartitionSpec()

  def on_device(*arguments):
    size = jax.tree.leaves(arguments[0])[0].shape[0]
    first = jax.lax.axis_index(_EXPERT_AXIS) * size
    return update_own(*arguments, first=first)

  # Every device computes the updates of all rows, and writes its own.
  return jax.shard_map(
    on_device,
    in_specs=(split, whole, whole, whole),
    out_specs=split,
    axis_names={_EXPERT_AXIS},
    check_vma=False,
  )(*arguments)


def _update_own(row_optimizer, rows, gradients, numbers, step, *, first):
  """Updates those rows that lie in a block of the table, from `first` on."""
  size = rows.table[row_table.ROWS].shape[0]
  own = numbers - first
  is_own = (own >= 0) & (own < size)
  of_kernels = {
    name: row_gradients.Matrix(gradient) for name, gradient in gradients.items()
  }
  return table_updates.write_rows(
    rows,
    table_updates.RowGradients(jnp.clip(own, 0, size - 1), is_own, of_kernels),
    row_optimizer=row_optimizer,
    step=step,
  )


def _read(table, numbers):
  """Rows of a table, which may be split over devices: any for no row."""
  if _num_parts() == 1:
    return rows_in_place.read(table, numbers)

  def on_device(block, numbers):
    own = numbers - jax.lax.axis_index(_EXPERT_AXIS) * block.shape[0]
    is_own = (own >= 0) & (own < block.shape[0])
    rows = rows_in_place.read(block, jnp.clip(own, 0, block.shape[0] - 1))
    # One device has each row, and the others add zeros.
    rows = jnp.where(is_own[:, None, None], rows, 0)
    return jax.lax.psum(rows, _EXPERT_AXIS)

  return jax.shard_map(
    on_device,
    in_specs=(PartitionSpec(_EXPERT_AXIS), PartitionSpec()),
    out_specs=PartitionSpec(),
    axis_names={_EXPERT_AXIS},
    check_vma=False,
  )(table, numbers)


def _num_parts() -> int:
  """Into how many blocks tables are split on the current mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(_EXPERT_AXIS, 1)
