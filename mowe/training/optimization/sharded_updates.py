"""Updating expert tables that are split over devices, each on its owner.

The factors of the gradients lie where the experts are, but along the mesh axis
`data` each device has those of its own tokens only. They are gathered along it,
and every row of devices computes the same update: what travels grows with the
tokens, not with the table.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from mowe.models import parameters
from mowe.training.optimization import row_optimizers, table_updates
from mowe.words import sharded_plan

_DATA_AXIS, _EXPERT_AXIS = sharded_plan.DEVICE_AXES


def update_table(
  row_optimizer: row_optimizers.RowOptimizer,
  table: dict[str, jax.Array],
  table_state: Any,
  factors: parameters.TableFactors,
  plan: sharded_plan.ShardedPlan,
  usable: jax.Array,
  learning_rate_step: jax.Array,
  key: jax.Array,
) -> tuple[dict[str, jax.Array], Any]:
  """As `table_updates.update_table`, on the current mesh.

  Factors have axes [data, expert, rows, width], with more than one microbatch
  another one before them.
  """
  num_tokens = tuple(
    0 if stream is None else stream.received.slots.size // _num_owners(stream)
    for stream in (plan.encoder, plan.decoder)
  )
  # [microbatches, data, expert, rows, width]
  factors = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-4:]), factors)

  def on_owner(table, table_state, factors, updates, usable, step, keys):
    def of_all_rows(own):
      # [microbatches, 1, 1, rows, width] -> [microbatches, data, rows, width]
      rows = jax.lax.all_gather(own[:, 0, 0], _DATA_AXIS, axis=1)
      return rows.reshape(-1, rows.shape[-1])

    return table_updates.update_rows(
      row_optimizer,
      table,
      table_state,
      jax.tree.map(of_all_rows, factors),
      jax.tree.map(lambda x: x[0], updates),
      num_tokens,
      usable,
      step,
      keys[0],
    )

  # Each owner rounds by a key of its own, the same in all rows of devices.
  keys = jax.random.split(key, plan.updates.experts[0].shape[0])
  by_expert = PartitionSpec(_EXPERT_AXIS)
  everywhere = PartitionSpec()
  return jax.shard_map(
    on_owner,
    in_specs=(
      by_expert,
      by_expert,
      PartitionSpec(None, _DATA_AXIS, _EXPERT_AXIS),
      by_expert,
      everywhere,
      everywhere,
      by_expert,
    ),
    out_specs=(by_expert, by_expert),
    # Parts of a row along the axis `model` are left to XLA.
    axis_names=set(sharded_plan.DEVICE_AXES),
    # Rows of devices compute the same, which jax does not see.
    check_vma=False,
  )(table, table_state, factors, plan.updates, usable, learning_rate_step, keys)


def _num_owners(stream):
  return stream.sent.shape[-2]
