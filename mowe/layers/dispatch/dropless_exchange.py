"""Dropless dispatch with experts on several devices.

In this module a *shard* is one of the devices along the mesh axis `expert`.
Experts are split into contiguous blocks, so that an order by expert is an order
by shard as well.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mowe.layers import platforms
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
  """Dispatch that sends pairs to the devices of their experts, in buffers.

  Each device has one buffer for each device. Its slots are these buffers, one
  after another; in a buffer, pairs are sorted by expert, and empty slots come
  last. Buffers have static sizes, so that devices also tell each other how much
  of them is filled. A dispatch of this class works only inside of
  `expert_parallel.run`.

  Attributes:
    num_shards: number of devices along the mesh axis `expert`.
    buffer_factor: size of a buffer, relative to an even share of the rows; None
      for one that holds all rows. See `DroplessDispatch`.
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
    """Gives the pairs of this device slots, see `Dispatch.plan`.

    Slots are [shards, room of a buffer], flattened.

    Args:
      choices: the choices of this device's groups.
      router: the router that made them.
      num_experts: number of experts on all devices together.
    """
    num_pairs = choices.experts.size
    per_shard = num_experts // self.num_shards
    room = self._room(choices, num_pairs, per_shard)
    experts = choices.experts.reshape(1, -1)
    if self.buffer_factor is not None:
      experts = self._that_fit(choices, router, room, num_experts)
    order, places, counts = slots.sort_by_expert(experts, num_experts)
    # [experts] -> [shards, experts of a shard]
    counts = counts.reshape(self.num_shards, per_shard)
    # The pairs of a shard are a contiguous part of the sorted list. Their part
    # is copied to the buffer of the shard: [pairs] -> [shards, room].
    sizes = jnp.sum(counts, axis=1)
    starts = jnp.cumsum(sizes) - sizes
    place = jnp.arange(room, dtype=jnp.int32)[None, :]
    pairs = jnp.where(
      place < sizes[:, None],
      jnp.take(order[0], starts[:, None] + place, mode='clip'),
      num_pairs,
    ).reshape(-1)
    # The slot of each pair, <int32>[pairs]. A pair without an expert reads any
    # start; it gets no slot below.
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
    """Accepts everything: DroplessDispatch accepted it before."""

  def across(self, num_shards: int) -> 'DroplessExchange':
    """Returns this dispatch, as it is one for several devices already."""
    del num_shards
    return self

  def without_drops(self) -> 'DroplessExchange':
    """Returns the same dispatch with room for all rows."""
    return dataclasses.replace(self, buffer_factor=None)

  def _that_fit(self, choices, router, room, num_experts):
    """The experts <int32>[1, pairs] of all pairs, `num_experts` if dropped.

    Buffers are sorted by expert later. Here it is decided which pairs get into
    them, and that must follow another order: in a decoder, earlier tokens come
    first whatever their experts are. Otherwise a later token with a lower
    expert could push an earlier token out of the buffer, and the earlier
    token's output would depend on the later one.
    """
    experts = choices.experts
    # The rank of a pair is its place in the order of priority, or the position
    # of its token where no later token may matter. All arrays are [1, groups *
    # pairs], with the first pairs of all groups before the second ones.
    by_rank = lambda x: x.T.reshape(1, -1)
    rank = jnp.arange(experts.shape[1], dtype=jnp.int32)[None, :]
    if not router.looks_ahead:
      rank = choices.tokens
    rank = by_rank(jnp.broadcast_to(rank, experts.shape))
    order = jnp.argsort(rank, axis=1, stable=True)
    experts = by_rank(experts)
    shards = experts // (num_experts // self.num_shards)
    # Sorted by shard, pairs of one shard keep the order of their ranks. So the
    # position of a pair in its shard's part of the list counts the pairs that
    # come before it in the buffer.
    _, places, counts = slots.sort_by_expert(
      jnp.take_along_axis(shards, order, axis=1), self.num_shards
    )
    starts = jnp.cumsum(counts, axis=1) - counts
    position = jnp.zeros_like(places).at[0, order[0]].set(
      places[0], unique_indices=True
    ) - jnp.take_along_axis(starts, shards, axis=1, mode='clip')
    experts = jnp.where(position < room, experts, num_experts)
    # [1, pairs * groups] -> [1, groups * pairs]
    return experts.reshape(choices.experts.shape[::-1]).T.reshape(1, -1)

  def compute(self, rows, kernels, plan, keep, expert) -> jax.Array:
    """Returns the outputs <float>[slots, out], computed on other devices.

    The rows of all buffers travel to their devices. The received buffers, one
    from each device, are each sorted by expert. They are merged into one list
    sorted by expert, computed as on one device, and sent back the same way.

    Args:
      rows: <float>[slots, in], the inputs in their slots.
      kernels: arrays <float>[own experts, ...] by name, for the experts of this
        device.
      plan: the plan that `plan` returned.
      keep: dropout of the experts' hidden units; None without dropout.
      expert: the computation of one expert.
    """
    num_experts = plan.group_sizes.size
    num_pairs = plan.slots_of_pairs.size
    # [experts] -> [shards, experts of a shard]
    sent = plan.group_sizes.reshape(self.num_shards, -1)
    received = _all_to_all(sent)
    there = jnp.sum(sent, axis=1), jnp.sum(received, axis=1)
    # Counted over the pairs of all senders, so that the batched share of an
    # expert is the one that it has on one device.
    share = sorted_experts.batched_share(
      num_pairs * self.num_shards, num_experts
    )
    index, inverse = _by_expert(
      received,
      rows.shape[0],
      rows.shape[0] + sorted_experts.tile_size(share),
    )
    # Only dropout reads the pairs; without it any array of their shape will do.
    pairs = index
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
    """Slots of one buffer; without a factor, as many as could be needed."""
    # A token meets each expert at most once. So no more pairs of a token go to
    # a shard than the shard has experts.
    num_tokens = math.prod(choices.pairs.shape[:2])
    room = min(num_pairs, num_tokens * experts_per_shard)
    if self.buffer_factor is None:
      return room
    share = math.ceil(self.buffer_factor * num_pairs / self.num_shards)
    return min(room, share)


def _by_expert(counts, num_received, num_rows):
  """Merges the received buffers into one list that is sorted by expert.

  Each buffer is sorted by expert already. So the list consists of segments that
  are contiguous in the buffers, one for each expert and sender, and no sort is
  needed. In the list, segments are ordered by expert and then by sender.

  Args:
    counts: <int32>[shards, experts], rows from each shard for each expert of
      this device.
    num_received: number of slots of all received buffers.
    num_rows: number of rows of the list, empty ones at its end included.

  Returns:
    The slot of each row of the list <int32>[num_rows], `num_received` for an
    empty row; and the row of each slot <int32>[num_received], `num_rows` for an
    empty slot.
  """
  num_shards = counts.shape[0]
  room = num_received // num_shards
  # Where each segment starts in the buffers, [shards, experts].
  first = room * jnp.arange(num_shards, dtype=jnp.int32)[:, None]
  starts = first + jnp.cumsum(counts, axis=1) - counts
  # [shards, experts] -> [experts * shards]
  sizes = counts.T.reshape(-1)
  ends = jnp.cumsum(sizes)
  # How far each segment moves. A row of the list finds its segment, and so its
  # distance, by the ends of the segments.
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
  """Sends buffer i to shard i, and gets one from each shard, in their order.

  The transpose of the exchange is the exchange in the other direction, with
  `sent` and `received` swapped. It is defined as the gradient below.

  Args:
    buffers: [shards * room, ...].
    sent: <int32>[shards], number of filled rows of each buffer.
    received: <int32>[shards], number of filled rows of the buffers that come.

  Returns:
    The received buffers, [shards * room, ...]. Their empty rows are zeros,
    except on CPU, where they are what the sender's buffer had there.
  """
  # CPU has no ragged all-to-all, so that whole buffers travel there. Elsewhere
  # only the filled rows do.
  if platforms.target() == 'cpu':
    return _all_to_all(buffers)
  num_shards = sent.shape[0]
  room = buffers.shape[0] // num_shards
  own = jax.lax.axis_index(expert_parallel.EXPERT_AXIS)
  starts = room * jnp.arange(num_shards, dtype=jnp.int32)
  return jax.lax.ragged_all_to_all(
    buffers,
    jnp.zeros_like(buffers),
    starts,
    sent,
    # On every receiver, the rows of this device start at its own buffer.
    jnp.full_like(sent, 0) + own * room,
    received,
    axis_name=expert_parallel.EXPERT_AXIS,
  )


_exchange.defvjp(
  lambda *args: (_exchange(*args), args[1:]),
  lambda sizes, cotangent: (_exchange(cotangent, *reversed(sizes)), None, None),
)
