"""Plans batches whose experts are split over devices.

The devices form a mesh [data, expert]. Device (i, j) holds the experts of block
j, and the tokens of part i * num_expert_devices + j of the batch. It sends each
token to the device (i, owner) that holds its expert, in a buffer of static
capacity for each owner, and gets the result back. The owner plans what it
receives as if it were a batch of its own (`words/plans/batch_plans.py`), with experts
counted from the first of its block.

Received tokens are in the order of their senders, so that an expert sees its
tokens in the order of the whole batch, and its gradient is summed as on one
device. As on one device, a batch that does not fit takes the next larger
profile.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mowe.words.plans import batch_plans

# The mesh axes over which the leading axes of a plan's arrays are split.
DEVICE_AXES = ('data', 'expert')


class ShardedStreamPlan(NamedTuple):
  """The slots of one stream of tokens, on every device.

  Attributes:
    sent: <int32>[data, expert, owners, capacity], the token in each place of
      the buffers of a device, counted over the tokens of the device; the
      number of its tokens for an empty place.
    places: <int32>[data, expert, tokens], the place of each token, counted
      over all buffers of its device; the number of places for a token without
      an expert.
    received: the plan of the owners * capacity places that a device receives.
      Its arrays have leading axes [data, expert].
  """

  sent: np.ndarray
  places: np.ndarray
  received: batch_plans.StreamPlan


class ShardedPlan(NamedTuple):
  """The counterpart of `batch_plans.ExpertPlan` for experts split over devices.

  Attributes:
    encoder: the plan of the encoder's tokens; None if the encoder has no
      sparse layers.
    decoder: the plan of the decoder's tokens; None if the decoder has no
      sparse layers.
    updates: the experts that all streams, microbatches and rows of devices
      use, each once; arrays have a leading axis [expert]. Tokens are counted
      over what the owner received: the encoder's tokens, then the decoder's,
      in each stream microbatch by microbatch, and in each microbatch along the
      mesh axis `data`.
  """

  encoder: ShardedStreamPlan | None
  decoder: ShardedStreamPlan | None
  updates: batch_plans.SizeClasses

  def present_experts(self, num_experts: int) -> np.ndarray:
    """Returns the experts that the batch uses, <int32>[n], ascending.

    Experts are counted over all blocks.
    """
    # [expert, places]; numbers from `own` on are unused places.
    experts = np.concatenate(self.updates.experts, axis=1)
    own = num_experts // len(experts)
    first = own * np.arange(len(experts), dtype=np.int32)[:, None]
    return np.sort((experts + first)[experts < own])

  def num_tokens(self) -> int:
    """Returns the number of tokens that have an expert."""
    return sum(
      batch_plans.count_tokens(stream.received)
      for stream in (self.encoder, self.decoder)
      if stream is not None
    )


@dataclasses.dataclass(frozen=True)
class StreamProfile:
  """The static sizes of one stream.

  Attributes:
    capacity: number of places in the buffer of a sender for one owner.
    classes: the sizes for what an owner receives.
  """

  capacity: int
  classes: batch_plans.ClassSizes


@dataclasses.dataclass(frozen=True)
class ShardedProfile:
  """The static sizes of a plan, which are the same on every device.

  Attributes:
    streams: the name and the sizes of each planned stream.
    updates: the sizes for the experts of one owner, over all streams.
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
  """Makes profiles of growing size from trial batches.

  Args:
    batches: trial batches, each as routing ids <int32>[batch, length] by the
      name of the stream.
    num_experts: number of experts of all devices together.
    devices: number of devices along the mesh axes (data, expert).
    num_microbatches: number of parts into which a step cuts the batch.

  Returns:
    Profiles as from `batch_plans.profile_ladder`: the first fits all trial
    batches, and the last fits every batch of their shape.

  Raises:
    ValueError: there is no trial batch, or its rows or the experts do not
      divide evenly.
  """
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
  """Plans a batch in the sizes of a profile.

  Args:
    batch: routing ids <int32>[batch, length] by the name of the stream.
    profile: the static sizes of the plan.
    num_experts: number of experts of all devices together.
    devices: number of devices along the mesh axes (data, expert).
    num_microbatches: number of parts into which the step cuts the batch.

  Returns:
    The plan, or None if the batch does not fit. With more than one microbatch,
    the arrays of the streams get a leading axis [num_microbatches].
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
    streams[name] = parts[0] if num_microbatches == 1 else _stack_streams(parts)
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
    batch_plans.stack_classes([one.classes for one in updates]),
  )


class _Need:
  """The most that any device needed for any of the trial batches.

  Args:
    num_experts: number of experts of one owner.

  Attributes:
    capacities: the most tokens of a stream that one device sends to one owner,
      by the name of the stream.
    counts: the most experts in each size class that one owner needs,
      <int64>[classes], by the name of the stream, or 'updates'.
    num_local: number of tokens of a stream on one device, by its name.
    num_tokens: number of tokens of which an owner may receive all, by the name
      of the stream, or 'updates'.
  """

  def __init__(self, num_experts: int):
    self.num_experts = num_experts
    self.capacities: dict[str, int] = {}
    self.counts: dict[str, np.ndarray] = {}
    self.num_local: dict[str, int] = {}
    self.num_tokens: dict[str, int] = {}

  def see_sent(self, name: str, counts: np.ndarray, num_tokens: int) -> None:
    """Takes note of how many tokens devices send to each owner."""
    most = max(self.capacities.get(name, 0), int(counts.max()))
    self.capacities[name] = most
    self.num_local[name] = num_tokens

  def see_experts(self, name: str, ids: np.ndarray) -> None:
    """Takes note of the tokens that an owner receives, by its own experts."""
    counts = batch_plans.count_classes(ids, self.num_experts)
    self.counts[name] = np.maximum(self.counts.get(name, 0), counts)
    self.num_tokens[name] = ids.size

  def profile(self, factor: float) -> ShardedProfile:
    """Returns the profile with `factor` times the room that was needed."""
    return self._profile(
      lambda name: min(
        self.num_local[name], max(1, math.ceil(factor * self.capacities[name]))
      ),
      lambda name: batch_plans.scaled_sizes(
        self.counts[name], factor, self.num_experts, self.num_tokens[name]
      ),
    )

  def largest(self) -> ShardedProfile:
    """Returns the profile that fits every batch of this shape."""
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
  """Takes note in `need` of what one trial batch needs."""
  num_owners = devices[1]
  names = tuple(name for name in batch_plans.STREAMS if name in batch)
  for name in names:
    for part in batch_plans.microbatches(batch[name], num_microbatches):
      ids = _split(part, devices)  # [data, expert, tokens]
      owners = _owners(ids, need.num_experts, num_owners)
      counts = [(owners == owner).sum(axis=-1) for owner in range(num_owners)]
      need.see_sent(name, np.stack(counts), ids.shape[-1])
      # An owner receives tokens from the devices of its own row alone. Ids
      # that fall below 0 belong to experts of the blocks before.
      for row in ids:
        for owner in range(num_owners):
          need.see_experts(name, row - owner * need.num_experts)
  everything = np.concatenate([batch[name].reshape(-1) for name in names])
  for owner in range(num_owners):
    need.see_experts('updates', everything - owner * need.num_experts)


def _split(ids, devices):
  """Gives each device its tokens: [batch, length] -> [data, expert, tokens]."""
  if ids.shape[0] % math.prod(devices):
    raise ValueError(
      'The rows of a batch must be a multiple of data x expert devices, '
      f'{devices[0]} x {devices[1]} = {math.prod(devices)}, but are '
      f'{ids.shape[0]}. Change the batch size or the mesh.'
    )
  return ids.reshape(*devices, -1)


def _owners(ids, num_own, num_owners):
  """Returns the owner of each token's expert, `num_owners` if it has none."""
  has_expert = (ids >= 0) & (ids < num_own * num_owners)
  return np.where(has_expert, ids // num_own, num_owners)


def _send(ids, capacity, num_experts, devices):
  """Puts the tokens of one stream into the buffers for their owners.

  Returns:
    None if an owner gets more than `capacity` tokens of one device; otherwise
    sent: as in ShardedStreamPlan.
    places: as in ShardedStreamPlan.
    received: <int32>[data, expert, owners * capacity], the experts of the
      places that a device receives, counted from the first of its block; -1
      for an empty place.
  """
  num_owners = devices[1]
  num_own = num_experts // num_owners
  ids = _split(ids, devices)
  num_tokens = ids.shape[-1]
  # [data, expert, tokens] -> [devices, tokens]. A stable sort keeps the tokens
  # for one owner in the order of the batch.
  owners = _owners(ids, num_own, num_owners).reshape(-1, num_tokens)
  order = np.argsort(owners, axis=1, kind='stable')
  # [devices, owners + 1]; the last column counts tokens without an expert.
  counts = np.stack(
    [np.bincount(row, minlength=num_owners + 1) for row in owners]
  )
  if counts[:, :-1].max() > capacity:
    return None
  # Within its buffer, a token has the place of its rank among the tokens for
  # the same owner.
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
  # A place more than there are takes all tokens that are not sent.
  sent = np.full((len(owners), num_places + 1), num_tokens, np.int32)
  sent[device, place] = order
  sent = sent[:, :-1]
  # A column more than there are tokens, because empty places point to it.
  padded = np.pad(ids.reshape(-1, num_tokens), ((0, 0), (0, 1)))
  experts = np.where(sent < num_tokens, padded[device, sent] % num_own, -1)
  # This is what the all-to-all does along the axis `expert`:
  # [data, sender, owner, capacity] -> [data, owner, sender, capacity]
  experts = experts.reshape(*devices, num_owners, capacity).swapaxes(1, 2)
  return (
    sent.reshape(*devices, num_owners, capacity),
    places.reshape(*devices, num_tokens),
    experts.astype(np.int32).reshape(*devices, -1),
  )


def _by_device(received, sizes, num_experts):
  """Plans what every device receives; returns None if it does not fit."""
  rows = []
  for row in received:
    parts = [batch_plans.place_tokens(ids, sizes, num_experts) for ids in row]
    if any(part is None for part in parts):
      return None
    rows.append(batch_plans.stack_streams(parts))
  return batch_plans.stack_streams(rows)


def _stack_streams(parts):
  """Stacks plans of microbatches along a new leading axis."""
  return ShardedStreamPlan(
    np.stack([part.sent for part in parts]),
    np.stack([part.places for part in parts]),
    batch_plans.stack_streams([part.received for part in parts]),
  )
