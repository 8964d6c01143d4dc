"""Word experts on several devices: tokens travel to their experts and back.

The host has planned what is sent where (`words/sharded_plan.py`). One
all-to-all along the mesh axis `expert` brings the tokens to the devices that
have their experts, a second one brings the results back; kernels stay where
they are. The mesh is jax's current one, as in `expert_parallel`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mowe.layers.dispatch import expert_parallel, slots
from mowe.words import sharded_plan

_ON_DEVICES = PartitionSpec(*sharded_plan.DEVICE_AXES)
_BATCH = PartitionSpec(expert_parallel.TOKEN_AXES)


def on_owners(
  experts: Callable[..., jax.Array],
  tokens: jax.Array,
  plan: sharded_plan.ShardedStreamPlan,
  *,
  kernels: dict[str, jax.Array],
  factors: Any,
  keep: jax.Array | None,
) -> jax.Array:
  """Runs `experts` where the experts are, on the tokens that come there.

  Args:
    experts: takes rows <float>[rows, embed], their StreamPlan, `kernels`,
      `factors` and `keep` of this device; gives <float>[rows, embed].
    tokens: <float>[batch, length, embed].
    plan: of these tokens.
    kernels: name -> <float>[num_experts, in, out].
    factors: tree of arrays [data, expert, rows, ...], or None.
    keep: <bool>[batch, length, units], mask of the hidden units; it travels
      with the tokens. None: all are kept.

  Returns:
    <float>[batch, length, embed], zeros for tokens without an expert.

  Raises:
    ValueError: the plan is not for these tokens or this mesh.
  """
  _check(tokens, plan)

  def on_device(tokens, plan, kernels, factors, keep):
    plan, factors = jax.tree.map(lambda x: x[0, 0], (plan, factors))
    sent = plan.sent.reshape(-1)
    flat = lambda x: x.reshape(-1, x.shape[-1])
    rows = _all_to_all(slots.permute(flat(tokens), sent, plan.places))
    if keep is not None:
      keep = _all_to_all(jnp.take(flat(keep), sent, axis=0, mode='clip'))
    outputs = experts(
      rows, plan.received, kernels=kernels, factors=factors, keep=keep
    )
    back = slots.permute(_all_to_all(outputs), plan.places, sent)
    return back.reshape(tokens.shape)

  return jax.shard_map(
    on_device,
    in_specs=(
      _BATCH,
      _ON_DEVICES,
      PartitionSpec(expert_parallel.EXPERT_AXIS),
      _ON_DEVICES,
      _BATCH,
    ),
    out_specs=_BATCH,
    # Hidden units are split over the axis `model` by XLA.
    axis_names=set(sharded_plan.DEVICE_AXES),
    # Loops over experts begin with zeros, which are the same on all devices.
    check_vma=False,
  )(tokens, plan, kernels, factors, keep)


def _all_to_all(rows):
  """Gives part i of the rows to owner i, and gets one from each sender."""
  return jax.lax.all_to_all(rows, expert_parallel.EXPERT_AXIS, 0, 0, tiled=True)


def _check(tokens, plan):
  shape = jax.sharding.get_abstract_mesh().shape
  mesh = tuple(shape.get(axis, 1) for axis in sharded_plan.DEVICE_AXES)
  planned = (*plan.places.shape[:2], plan.places.size)
  found = (*mesh, tokens.shape[0] * tokens.shape[1])
  if planned != found:
    raise ValueError(
      'A sharded plan must be for the mesh and the tokens of its step: it is '
      f'for data x expert = {planned[0]} x {planned[1]} devices and '
      f'{planned[2]} tokens, but there are {found[0]} x {found[1]} and '
      f'{found[2]}. Plan this batch for this mesh, and run the step under '
      'partitioning.on_mesh.'
    )
