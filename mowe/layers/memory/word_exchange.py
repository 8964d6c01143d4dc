"""Word experts on several devices: tokens travel to their experts and back.

The host has planned what is sent where (`words/plans/sharded_plan.py`). One
all-to-all along the mesh axis `expert` brings the tokens to their owners, the
devices that have their experts. A second one brings the results back. Kernels
stay where they are. The mesh is JAX's current one, as in `expert_parallel`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mowe.layers.dispatch import expert_parallel, slots
from mowe.words.plans import sharded_plan

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
  """Runs `experts` on every device, on the tokens that were sent to it.

  On one device, the shapes are these, where capacity is the number of places
  that a sender has for each owner:

  1. The tokens of the device, [tokens, embed], are gathered into one buffer for
     each owner, [owners * capacity, embed].
  2. An all-to-all sends buffer i to owner i. The device now has one buffer from
     each sender, in the order of the senders: rows [owners * capacity, embed].
  3. `experts` computes these rows as if they were a batch of this device.
  4. An all-to-all sends the results back, to the places that the tokens had in
     the buffers, and a gather brings them into the order of the tokens.

  The plan knows the token in each place and the place of each token. So the
  gradients of both gathers are gathers too, see `slots.permute`.

  Args:
    experts: function of rows <float>[rows, embed], their StreamPlan, and by
      name the `kernels`, `factors` and `keep` of the device. It returns
      <float>[rows, embed].
    tokens: <float>[batch, length, embed].
    plan: the plan of these tokens.
    kernels: kernels <float>[num_experts, in, out] by name.
    factors: tree of arrays [data, expert, rows, ...], or None.
    keep: <bool>[batch, length, units], dropout mask of the hidden units, which
      is sent along with the tokens; None to keep all units.

  Returns:
    <float>[batch, length, embed], zeros for tokens without an expert.

  Raises:
    ValueError: the plan was not made for these tokens and this mesh.
  """
  _check(tokens, plan)

  def on_device(tokens, plan, kernels, factors, keep):
    # The axes [data, expert] have size 1 in what one device gets.
    plan, factors = jax.tree.map(lambda x: x[0, 0], (plan, factors))
    sent = plan.sent.reshape(-1)
    flat = lambda x: x.reshape(-1, x.shape[-1])
    rows = _all_to_all(slots.permute(flat(tokens), sent, plan.places))
    if keep is not None:
      # An empty place may get any mask: its hidden units are zeros.
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
    # XLA splits the hidden units over the mesh axis `model`.
    axis_names=set(sharded_plan.DEVICE_AXES),
    # Loops over experts start from zeros. JAX would refuse them, as zeros are
    # the same on all devices and the results of a step are not.
    check_vma=False,
  )(tokens, plan, kernels, factors, keep)


def _all_to_all(rows):
  """Sends part i of the rows to device i, and gets one part from each."""
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
