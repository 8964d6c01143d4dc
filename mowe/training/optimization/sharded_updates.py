"""Updating expert tables that are split over devices, each on its owner.

The factors of the gradients lie where the experts are, but along the mesh axis
`data` each device has those of its own tokens only. They are gathered along it,
and every row of devices computes the same update: what travels grows with the
tokens, not with the table.
"""

import functools

import jax
from jax.sharding import PartitionSpec

from mowe.models import parameters
from mowe.training.optimization import row_optimizers, table_updates
from mowe.words.plans import batch_plans, sharded_plan

_DATA_AXIS, _EXPERT_AXIS = sharded_plan.DEVICE_AXES


def update_table(
  row_optimizer: row_optimizers.RowOptimizer,
  rows: table_updates.TableAndState,
  *,
  factors: parameters.TableFactors,
  plan: sharded_plan.ShardedPlan,
  step: table_updates.StepValues,
) -> table_updates.TableAndState:
  """As `table_updates.update_table`, on the current mesh.

  Factors have axes [data, expert, rows, width], and with more than one
  microbatch another one before them.
  """
  num_tokens = tuple(
    0 if stream is None else stream.received.slots.size // _num_owners(stream)
    for stream in (plan.encoder, plan.decoder)
  )
  # [microbatches, data, expert, rows, width]
  factors = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-4:]), factors)
  # Each owner rounds by a key of its own, the same in all rows of devices.
  keys = jax.random.split(step.key, plan.updates.experts[0].shape[0])
  by_expert = PartitionSpec(_EXPERT_AXIS)
  everywhere = PartitionSpec()
  return jax.shard_map(
    functools.partial(_update_own_rows, row_optimizer, num_tokens),
    in_specs=(
      table_updates.TableAndState(by_expert, by_expert),
      PartitionSpec(None, _DATA_AXIS, _EXPERT_AXIS),
      by_expert,
      table_updates.StepValues(everywhere, everywhere, by_expert),
    ),
    out_specs=table_updates.TableAndState(by_expert, by_expert),
    # Parts of a row along the axis `model` are left to XLA.
    axis_names=set(sharded_plan.DEVICE_AXES),
    # Rows of devices compute the same, which jax does not see.
    check_vma=False,
  )(
    rows,
    factors,
    plan.updates,
    step._replace(key=keys),
  )


def _update_own_rows(
  row_optimizer: row_optimizers.RowOptimizer,
  num_tokens: tuple[int, int],
  rows: table_updates.TableAndState,
  factors: parameters.TableFactors,
  updates: batch_plans.SizeClasses,
  step: table_updates.StepValues,
) -> table_updates.TableAndState:
  """Updates the experts of one device.

  Args:
    row_optimizer: updates the rows.
    num_tokens: tokens that an owner receives from the encoder, and from the
      decoder.
    rows: the experts of this device.
    factors: arrays [microbatches, 1, 1, rows, width], those of this device.
    updates: the plan of this device, with a leading axis [1].
    step: the values of the step, with the key [1] of this device.
  """
  gathered = jax.tree.map(_of_all_rows, factors)
  own_updates = jax.tree.map(lambda x: x[0], updates)
  return table_updates.update_rows(
    row_optimizer,
    rows,
    factors=table_updates.BatchFactors(gathered, own_updates, num_tokens),
    step=step._replace(key=step.key[0]),
  )


def _of_all_rows(own: jax.Array) -> jax.Array:
  """Gathers the factors of the same experts from all rows of devices.

  [microbatches, 1, 1, rows, width] -> [microbatches * data * rows, width]
  """
  rows = jax.lax.all_gather(own[:, 0, 0], _DATA_AXIS, axis=1)
  return rows.reshape(-1, rows.shape[-1])


def _num_owners(stream: sharded_plan.ShardedStreamPlan) -> int:
  """Parts of the mesh axis `expert`, each of which owns a block of experts."""
  return stream.sent.shape[-2]
