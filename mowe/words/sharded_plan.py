"""The plan of a batch whose experts are split over devices.

Devices stand in rows and columns, [data, expert]. Device (i, j) has the tokens
of its part of the batch, rows of `data` first, and the experts of block j. It
sends every token to the device (i, owner) that has the expert, in a buffer of
static capacity for each owner, and gets the result back. What is received is
planned as if it were a batch of its own (`words/batch_plans.py`), with experts counted
from the first of the block.

Received rows are in the order of their senders, so that an expert sees its
tokens in the order of the whole batch, and its gradient is summed as on one
device. As there, a batch that does not fit takes the next larger profile.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mowe.words import batch_plans

# Mesh axes of the leading axes of a plan's arrays.
DEVICE_AXES = ('data', 'expert')


class ShardedStreamPlan(NamedTuple):
  """Slots of one stream of tokens, on every device.

  Attributes:
    sent: <int32>[data, expert, owners, capacity], the token in each place of
      the buffers, counted over those of the device; the number of its tokens
      if it is empty.
    places: <int32>[data, expert, tokens], the place of each token in all
      buffers of its device; the number of places for one without an expert.
    received: the plan of what comes, owners * capacity rows; its arrays have
      leading axes [data, expert].
  """

  sent: np.ndarray
  places: np.ndarray
  received: batch_plans.StreamPlan


class ShardedPlan(NamedTuple):
  """As `plans.ExpertPlan`, for experts split over devices.

  Attributes:
    encoder: of the encoder's tokens, or None without sparse layers there.
    decoder: of the decoder's tokens, or None.
    updates: experts of all streams, microbatches and rows of devices, each
      once; arrays have a leading axis [expert]. Tokens count through what the
      owner received: the encoder's, then the decoder's, in each microbatch by
      microbatch, in each of these through the rows of devices.
  """

  encoder: ShardedStreamPlan | None
  decoder: ShardedStreamPlan | None
  updates: batch_plans.SizeClasses

  def present_experts(self, num_experts: int) -> np.ndarray:
    """Experts of the batch, <int32>[n], ascending, counted over all blocks."""
    experts = np.concatenate(self.updates.experts, axis=1)
    own = num_experts // len(experts)
    first = own * np.arange(len(experts), dtype=np.int32)[:, None]
    return np.sort((experts + first)[experts < own])

  def num_tokens(self) -> int:
    """Tokens that have an expert."""
    return sum(
      batch_plans.count_tokens(stream.received)
      for stream in (self.encoder, self.decoder)
      if stream is not None
    )


@dataclasses.dataclass(frozen=True)
class StreamProfile:
  """Static sizes of one stream.

  Attributes:
    capacity: places in the buffer of a sender for one owner.
    classes: of what an owner receives.
  """

  capacity: int
  classes: batch_plans.ClassSizes


@dataclasses.dataclass(frozen=True)
class ShardedProfile:
  """Static sizes of a plan; the same on every device.

  Attributes:
    streams: sizes of each planned stream, by name.
    updates: sizes for the experts of one owner, over all streams.
  """

  streams: tuple[tuple[str, StreamProfile], ...]
  updates: batch_plans.ClassSizes


def check_num_experts(num_experts: int, num_blocks: int) -> None:
  """Raises ValueError unless experts divide evenly into blocks."""
  if num_experts % num_blocks:
    raise ValueError(
      "num_experts must be a multiple of the mesh axis 'expert', "
      f'{num_blocks}, so that every device has a block of as many, but is '
      f'{num_experts}. Make it {-(-num_experts // num_blocks) * num_blocks}, '
      'or change the mesh.'
    )


def profile_ladder(
  batches: Iterable[dict[str, np.ndarray]],
  num_experts: int,
  *,
  devices: tuple[int, int],
  num_microbatches: int = 1,
) -> tuple[ShardedProfile, ...]:
  """As `plans.profile_ladder`, for devices [data, expert]."""
  check_num_experts(num_experts, devices[1])
  need = _Need(num_experts // devices[1])
  for batch in batches:
    _see(need, batch, devices, num_microbatches)
  if not need.capacities:
    raise ValueError(
      'A capacity profile needs at least one trial batch with routing ids, '
      'but there was none. Give batches with encoder_routing_ids.'
    )
  ladder = [need.profile(factor) for factor in batch_plans.PROFILE_FACTORS]
  return (*ladder, need.largest())


def make_plan(
  batch: dict[str, np.ndarray],
  profile: ShardedProfile,
  num_experts: int,
  *,
  devices: tuple[int, int],
  num_microbatches: int = 1,
) -> ShardedPlan | None:
  """As `plans.make_plan`, for devices [data, expert].

  Returns:
    The plan, or None if the batch does not fit. With more than one microbatch,
    the streams' arrays get a leading axis [num_microbatches].
  """
  own = num_experts // devices[1]
  streams, came = {}, []
  for name, sizes in profile.streams:
    parts = []
    for ids in batch_plans.microbatches(batch[name], num_microbatches):
      sending = _send(ids, sizes.capacity, num_experts, devices)
      if sending is None:
        return None
      sent, places, received = sending
      planned = _by_device(received, sizes.classes, own)
      if planned is None:
        return None
      parts.append(ShardedStreamPlan(sent, places, planned))
      came.append(received)
    streams[name] = parts[0] if num_microbatches == 1 else _stack(parts)
  # [data, expert, rows] of each stream and microbatch -> [expert, rows]
  of_owners = np.concatenate(
    [ids.swapaxes(0, 1).reshape(devices[1], -1) for ids in came], axis=1
  )
  updates = [
    batch_plans.place_tokens(ids, profile.updates, own) for ids in of_owners
  ]
  if any(one is None for one in updates):
    return None
  return ShardedPlan(
    streams.get('encoder'),
    streams.get('decoder'),
    _stack([one.classes for one in updates]),
  )


class _Need:
  """The most that trial batches needed, anywhere."""

  def __init__(self, num_experts: int):
    self.num_experts = num_experts
    self.capacities: dict[str, int] = {}
    self.counts: dict[str, np.ndarray] = {}
    self.num_local: dict[str, int] = {}
    self.num_tokens: dict[str, int] = {}

  def see_sent(self, name: str, counts: np.ndarray, num_tokens: int) -> None:
    most = max(self.capacities.get(name, 0), int(counts.max()))
    self.capacities[name] = most
    self.num_local[name] = num_tokens

  def see_experts(self, name: str, ids: np.ndarray) -> None:
    counts = batch_plans.count_classes(ids, self.num_experts)
    self.counts[name] = np.maximum(self.counts.get(name, 0), counts)
    self.num_tokens[name] = ids.size

  def profile(self, factor: float) -> ShardedProfile:
    return self._profile(
      lambda name: min(
        self.num_local[name], max(1, math.ceil(factor * self.capacities[name]))
      ),
      lambda name: batch_plans.scaled_sizes(
        self.counts[name], factor, self.num_experts, self.num_tokens[name]
      ),
    )

  def largest(self) -> ShardedProfile:
    return self._profile(
      lambda name: self.num_local[name],
      lambda name: batch_plans.largest_sizes(
        self.num_tokens[name], self.num_experts
      ),
    )

  def _profile(self, capacity, sizes):
    return ShardedProfile(
      tuple(
        (name, StreamProfile(capacity(name), sizes(name)))
        for name in self.capacities
      ),
      sizes('updates'),
    )


def _see(need, batch, devices, num_microbatches):
  """Takes note of what one trial batch needs."""
  num_owners = devices[1]
  names = tuple(name for name in batch_plans.STREAMS if name in batch)
  for name in names:
    for part in batch_plans.microbatches(batch[name], num_microbatches):
      ids = _split(part, devices)
      owners = _owners(ids, need.num_experts, num_owners)
      counts = [(owners == owner).sum(axis=-1) for owner in range(num_owners)]
      need.see_sent(name, np.stack(counts), ids.shape[-1])
      for row in ids:
        for owner in range(num_owners):
          need.see_experts(name, row - owner * need.num_experts)
  everything = np.concatenate([batch[name].reshape(-1) for name in names])
  for owner in range(num_owners):
    need.see_experts('updates', everything - owner * need.num_experts)


def _split(ids, devices):
  """Tokens of each device: [batch, length] -> [data, expert, tokens]."""
  if ids.shape[0] % math.prod(devices):
    raise ValueError(
      'The rows of a batch must be a multiple of data x expert devices, '
      f'{devices[0]} x {devices[1]} = {math.prod(devices)}, but are '
      f'{ids.shape[0]}. Change the batch size or the mesh.'
    )
  return ids.reshape(*devices, -1)


def _owners(ids, num_own, num_owners):
  """Device of each token's expert; `num_owners` for no expert."""
  has_expert = (ids >= 0) & (ids < num_own * num_owners)
  return np.where(has_expert, ids // num_own, num_owners)


def _send(ids, capacity, num_experts, devices):
  """Buffers of one stream, or None without room.

  Returns:
    `sent` and `places` as in ShardedStreamPlan, and the experts of the rows
    that come, <int32>[data, expert, rows], counted from the first of the
    block; -1 for an empty row.
  """
  num_owners = devices[1]
  num_own = num_experts // num_owners
  ids = _split(ids, devices)
  num_tokens = ids.shape[-1]
  owners = _owners(ids, num_own, num_owners).reshape(-1, num_tokens)
  order = np.argsort(owners, axis=1, kind='stable')
  counts = np.stack(
    [np.bincount(row, minlength=num_owners + 1) for row in owners]
  )
  if counts[:, :-1].max() > capacity:
    return None
  first = np.cumsum(counts, axis=1) - counts
  device = np.arange(len(owners))[:, None]
  by_owner = owners[device, order]
  rank = np.arange(num_tokens) - first[device, by_owner]
  num_places = num_owners * capacity
  place = np.where(
    by_owner < num_owners, by_owner * capacity + rank, num_places
  )
  places = np.empty(owners.shape, np.int32)
  places[device, order] = place
  # One place more, for all tokens that are not sent.
  sent = np.full((len(owners), num_places + 1), num_tokens, np.int32)
  sent[device, place] = order
  sent = sent[:, :-1]
  padded = np.pad(ids.reshape(-1, num_tokens), ((0, 0), (0, 1)))
  experts = np.where(sent < num_tokens, padded[device, sent] % num_own, -1)
  # [data, sender, owner, capacity] -> [data, owner, sender, capacity]
  experts = experts.reshape(*devices, num_owners, capacity).swapaxes(1, 2)
  return (
    sent.reshape(*devices, num_owners, capacity),
    places.reshape(*devices, num_tokens),
    experts.astype(np.int32).reshape(*devices, -1),
  )


def _by_device(received, sizes, num_experts):
  """StreamPlan of the rows that every device receives, or None."""
  rows = []
  for row in received:
    parts = [batch_plans.place_tokens(ids, sizes, num_experts) for ids in row]
    if any(part is None for part in parts):
      return None
    rows.append(_stack(parts))
  return _stack(rows)


def _stack(trees):
  """Stacks the arrays of trees of (named) tuples."""
  first = trees[0]
  if isinstance(first, np.ndarray):
    return np.stack(trees)
  parts = [_stack(same) for same in zip(*trees, strict=True)]
  return type(first)(*parts) if hasattr(first, '_fields') else tuple(parts)
