"""Dropless dispatch over several devices: rows sorted for each of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mowe.layers.dispatch import (
  dispatch_base,
  expert_parallel,
  slots,
  sorted_experts,
  token_groups,
)
from mowe.layers.routers import router_base


@dataclasses.dataclass(frozen=True)
class DroplessExchange(dispatch_base.Dispatch):
  """Pairs sorted by the device of their expert, in a buffer for each device.

  Buffers have static sizes; how much of them is filled is exchanged with them.
  Only inside of `expert_parallel.run`.

  Attributes:
    num_shards: devices along the mesh axis `expert`.
    buffer_factor: as in DroplessDispatch.
  """

  num_shards: int
  buffer_factor: float | None

  def plan(
    self,
    choices: router_base.Choices,
    router: router_base.Router,
    *,
    num_experts: int,
  ) -> slots.SlotPlan:
    """Slots <int32>[shards * buffer], in each buffer in order of experts."""
    num_pairs = choices.experts.size
    per_shard = num_experts // self.num_shards
    room = self._room(choices, num_pairs, per_shard)
    experts = choices.experts.reshape(1, -1)
    if self.buffer_factor is not None:
      experts = self._that_fit(choices, router, room, num_experts)
    order, places, counts = slots.sort_by_expert(experts, num_experts)
    # [experts] -> [shards, experts of a shard]
    counts = counts.reshape(self.num_shards, per_shard)
    sizes = jnp.sum(counts, axis=1)
    starts = jnp.cumsum(sizes) - sizes
    place = jnp.arange(room, dtype=jnp.int32)[None, :]
    pairs = jnp.where(
      place < sizes[:, None],
      jnp.take(order[0], starts[:, None] + place, mode='clip'),
      num_pairs,
    ).reshape(-1)
    # The sentinel of pairs without an expert reads any start.
    own_shard = experts[0] // per_shard
    position = places[0] - jnp.take(starts, own_shard, mode='clip')
    slots_of_pairs = jnp.where(
      experts[0] < num_experts, own_shard * room + position, pairs.size
    )
    group_sizes = counts.reshape(-1)
    return slots.make_plan(
      choices,
      pairs,
      slots_of_pairs,
      group_sizes=group_sizes,
      num_slots=jnp.sum(group_sizes),
    )

  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Accepts what the dispatch accepted that this one was made from."""

  def across(self, num_shards: int) -> 'DroplessExchange':
    """Returns this dispatch, which knows of its devices already."""
    del num_shards
    return self

  def without_drops(self) -> 'DroplessExchange':
    """The same with room for all."""
    return dataclasses.replace(self, buffer_factor=None)

  def _that_fit(self, choices, router, room, num_experts):
    """The experts <int32>[1, pairs] of pairs that fit; `num_experts` of others.

    In a decoder earlier tokens must be first, whatever their experts: if
    buffers were filled in order of experts, a later token that has a lower one
    would push an earlier token out, which would so learn of it.
    """
    experts = choices.experts
    # [groups, pairs] -> [groups * pairs], by rank first and then by group.
    by_rank = lambda x: x.T.reshape(1, -1)
    rank = jnp.arange(experts.shape[1], dtype=jnp.int32)[None, :]
    if not router.looks_ahead:
      rank = choices.tokens
    rank = by_rank(jnp.broadcast_to(rank, experts.shape))
    order = jnp.argsort(rank, axis=1, stable=True)
    experts = by_rank(experts)
    shards = experts // (num_experts // self.num_shards)
    _, places, counts = slots.sort_by_expert(
      jnp.take_along_axis(shards, order, axis=1), self.num_shards
    )
    starts = jnp.cumsum(counts, axis=1) - counts
    position = jnp.zeros_like(places).at[0, order[0]].set(
      places[0], unique_indices=True
    ) - jnp.take_along_axis(starts, shards, axis=1, mode='clip')
    experts = jnp.where(position < room, experts, num_experts)
    return experts.reshape(choices.experts.shape[::-1]).T.reshape(1, -1)

  def compute(self, rows, kernels, plan, keep, expert) -> jax.Array:
    """Experts' outputs <float>[slots, out], by way of their devices."""
    num_experts = plan.group_sizes.size
    num_pairs = plan.slots_of_pairs.size
    # [experts] -> [shards, experts of a shard]
    sent = plan.group_sizes.reshape(self.num_shards, -1)
    received = _all_to_all(sent)
    there = jnp.sum(sent, axis=1), jnp.sum(received, axis=1)
    # Over all senders, so that an expert has the share it has on one device.
    share = sorted_experts.batched_share(
      num_pairs * self.num_shards, num_experts
    )
    index, inverse = _by_expert(
      received,
      rows.shape[0],
      rows.shape[0] + sorted_experts.tile_size(share),
    )
    pairs = index  # Only dropout asks for pairs.
    if keep is not None:
      pairs = _exchange(
        expert_parallel.number_pairs(plan.pairs, num_pairs)[:, None], *there
      )
      pairs = slots.permute(pairs[:, 0], index, inverse)
      own_masks = expert_parallel.own_units(keep.masks)
      keep = dataclasses.replace(keep, masks=own_masks)
    outputs = sorted_experts.by_expert(
      slots.permute(_exchange(rows, *there), index, inverse),
      kernels,
      None,
      sorted_experts.Rows(jnp.sum(received, axis=0), pairs),
      keep,
      expert,
      share,
    )
    back = slots.permute(outputs, inverse, index)
    return _exchange(back, *reversed(there))

  def _room(self, choices, num_pairs, experts_per_shard):
    """Slots for each shard: without a factor, for all that can ever be."""
    # A token meets an expert once, so no shard more often than it has experts.
    num_tokens = math.prod(choices.pairs.shape[:2])
    room = min(num_pairs, num_tokens * experts_per_shard)
    if self.buffer_factor is None:
      return room
    share = math.ceil(self.buffer_factor * num_pairs / self.num_shards)
    return min(room, share)


def _by_expert(counts, num_received, num_rows):
  """Where the rows sorted by expert lie in the buffers, and the inverse.

  `counts` [shards, experts] are the rows from each shard for each expert.
  """
  num_shards = counts.shape[0]
  room = num_received // num_shards
  # A segment is what one shard sends to one expert.
  first = room * jnp.arange(num_shards, dtype=jnp.int32)[:, None]
  starts = first + jnp.cumsum(counts, axis=1) - counts
  # [shards, experts] -> [experts * shards]
  sizes = counts.T.reshape(-1)
  ends = jnp.cumsum(sizes)
  distance = starts.T.reshape(-1) - (ends - sizes)
  row = jnp.arange(num_rows, dtype=jnp.int32)
  segment = jnp.searchsorted(ends, row, side='right')
  index = jnp.where(
    row < ends[-1],
    row + jnp.take(distance, segment, mode='clip'),
    num_received,
  )
  inverse = jnp.full_like(index, num_rows, shape=(num_received,))
  return index, inverse.at[index].set(row, mode='drop', unique_indices=True)


def _all_to_all(parts):
  return jax.lax.all_to_all(
    parts, expert_parallel.EXPERT_AXIS, 0, 0, tiled=True
  )


@jax.custom_vjp
def _exchange(buffers, sent, received):
  """Gives buffer i to shard i, and gets one from each, in their order.

  Args:
    buffers: [shards * room, ...].
    sent: <int32>[shards], filled rows of each buffer.
    received: <int32>[shards], those of the buffers that come.
  """
  if jax.default_backend() == 'cpu':
    return _all_to_all(buffers)
  # Only what is filled travels; the rest is zero.
  num_shards = sent.shape[0]
  room = buffers.shape[0] // num_shards
  own = jax.lax.axis_index(expert_parallel.EXPERT_AXIS)
  starts = room * jnp.arange(num_shards, dtype=jnp.int32)
  return jax.lax.ragged_all_to_all(
    buffers,
    jnp.zeros_like(buffers),
    starts,
    sent,
    jnp.full_like(sent, 0) + own * room,
    received,
    axis_name=expert_parallel.EXPERT_AXIS,
  )


_exchange.defvjp(
  lambda *args: (_exchange(*args), args[1:]),
  lambda sizes, cotangent: (_exchange(cotangent, *reversed(sizes)), None, None),
)
