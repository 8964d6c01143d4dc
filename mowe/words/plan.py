"""Which experts a batch needs, and where each of its tokens is computed.

The host decides; the device only moves and multiplies. Experts that are
present are sorted into *size classes* with room for 1, 2, 3, 4, 6, 8, ...
tokens each, so that a class is one contiguous slice of the compact table and
one batched product. All sizes are static (a `CapacityProfile`): a step is
compiled once. A batch that does not fit takes the next profile of a fixed
ladder, so that the choice depends on the batch alone and a resumed run makes
the same one. No token is ever dropped.

A plan's pieces are NamedTuples of arrays: jax takes them as step arguments.
All static sizes are shapes.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Room of a class grows by a third to a half: at most a third of all slots
# stay empty, and the number of classes stays logarithmic.
_CAPACITIES = tuple(
  sorted({2**k for k in range(25)} | {3 * 2**k for k in range(24)})
)

# Rows come in such multiples: a step may work on equal parts of them.
_ROWS_UNIT = 64

# Profiles of growing size before the one that holds anything.
_NUM_SCALED_PROFILES = 6


class StreamPlan(NamedTuple):
  """Slots of one stream of tokens (the encoder's or the decoder's).

  Attributes:
    sources: one array <int32>[experts, room] for each size class: the flat
      index of the token in each slot; `batch * length` if the slot is empty.
    slots: <int32>[batch, length], the slot of each token, counted over all
      classes; the number of slots for a token without an expert.
    rows: <int32>[experts of all classes], the row of the compact table of each
      expert; None where it is the expert's own position.
  """

  sources: tuple[np.ndarray, ...]
  slots: np.ndarray
  rows: np.ndarray | None


class ExpertPlan(NamedTuple):
  """All that a step has to know about the experts of its batch.

  Attributes:
    experts: <int32>[planned], expert of each row of the compact table; unused
      rows have distinct numbers from `num_experts` on, so that a gather fills
      and a scatter drops them.
    encoder: slots of the encoder's tokens, or None without sparse layers there.
    decoder: slots of the decoder's tokens, or None.
  """

  experts: np.ndarray
  encoder: StreamPlan | None
  decoder: StreamPlan | None


@dataclasses.dataclass(frozen=True)
class StreamProfile:
  """Static sizes of a stream: (room, number of experts) of each size class."""

  classes: tuple[tuple[int, int], ...]

  @property
  def num_experts(self) -> int:
    return sum(count for _, count in self.classes)

  @property
  def num_slots(self) -> int:
    return sum(room * count for room, count in self.classes)


@dataclasses.dataclass(frozen=True)
class CapacityProfile:
  """Static sizes of a plan.

  Attributes:
    streams: sizes of each planned stream, by name (`encoder`, `decoder`).
    num_rows: rows of the compact table, for the union of all streams.
  """

  streams: tuple[tuple[str, StreamProfile], ...]
  num_rows: int


def count_classes(routing_ids: np.ndarray, num_experts: int) -> np.ndarray:
  """Number of present experts in each size class, <int64>[classes]."""
  _, counts = _present(routing_ids, num_experts)
  return np.bincount(
    np.searchsorted(_CAPACITIES, counts), minlength=len(_CAPACITIES)
  )


def profile_ladder(
  batches: Iterable[dict[str, np.ndarray]],
  num_experts: int,
  *,
  num_microbatches: int = 1,
  slack: float = 1.1,
  growth: float = 1.3,
) -> tuple[CapacityProfile, ...]:
  """Profiles from trial batches: the first holds them all, the last anything.

  Args:
    batches: dictionaries stream name -> routing ids <int32>[batch, length].
    num_experts: rows of the expert table.
    num_microbatches: parts into which a step cuts the batch.
    slack: room beyond what the trial batches needed.
    growth: factor from one profile to the next.

  Returns:
    Profiles of growing size. The last fits every batch of this shape.

  Raises:
    ValueError: there is no trial batch.
  """
  largest: dict[str, np.ndarray] = {}
  num_tokens: dict[str, int] = {}
  num_rows = 0
  for batch in batches:
    union = [_present(ids, num_experts)[0] for ids in batch.values()]
    num_rows = max(num_rows, np.unique(np.concatenate(union)).size)
    for name, ids in batch.items():
      for part in microbatches(ids, num_microbatches):
        counts = count_classes(part, num_experts)
        largest[name] = np.maximum(largest.get(name, 0), counts)
        num_tokens[name] = part.size
  if not largest:
    raise ValueError(
      'A capacity profile needs at least one trial batch with routing ids, '
      'but there was none. Give batches with encoder_routing_ids.'
    )
  ladder = []
  for factor in slack * growth ** np.arange(_NUM_SCALED_PROFILES):
    streams = tuple(
      (name, _scaled(counts, factor, num_experts, num_tokens[name]))
      for name, counts in largest.items()
    )
    ladder.append(_profile(streams, int(np.ceil(num_rows * factor)) + 1))
  # Slow, and hardly ever taken: holds whatever a batch of this shape can be.
  streams = tuple(
    (name, StreamProfile(_classes(_largest_counts(tokens, num_experts))))
    for name, tokens in num_tokens.items()
  )
  most_rows = num_microbatches * sum(num_tokens.values())
  ladder.append(_profile(streams, min(num_experts, most_rows)))
  return tuple(ladder)


def _profile(streams, num_rows):
  # The first stream's classes are slices of the compact table.
  num_rows = max(num_rows, streams[0][1].num_experts)
  return CapacityProfile(streams, -(-num_rows // _ROWS_UNIT) * _ROWS_UNIT)


def make_plan(
  batch: dict[str, np.ndarray],
  profile: CapacityProfile,
  num_experts: int,
  *,
  num_microbatches: int = 1,
) -> ExpertPlan | None:
  """Plan of a batch in the sizes of `profile`, or None if it does not fit.

  Args:
    batch: stream name -> routing ids <int32>[batch, length].
    profile: static sizes.
    num_experts: rows of the expert table.
    num_microbatches: parts into which the step cuts the batch. With more than
      one, the streams' arrays get a leading axis [num_microbatches]; all parts
      share one compact table.

  Returns:
    The plan; equal batches give equal plans.
  """
  placed: dict[str, list[_Placed]] = {}
  for name, stream in profile.streams:
    placed[name] = []
    for part in microbatches(batch[name], num_microbatches):
      one = _place(part, stream, num_experts)
      if one is None:
        return None
      placed[name].append(one)

  first = placed[profile.streams[0][0]]
  slices = len(first) == 1
  row_of_expert = _lay_out_rows(
    fixed=first[0] if slices else None,
    present=np.unique(
      np.concatenate([one.present for ones in placed.values() for one in ones])
    ),
    num_rows=profile.num_rows,
  )
  if row_of_expert is None:
    return None
  present, rows = row_of_expert
  experts = np.arange(
    num_experts, num_experts + profile.num_rows, dtype=np.int32
  )
  experts[rows] = present

  plans = {}
  for name, stream in profile.streams:
    parts = []
    for one in placed[name]:
      stream_rows = np.zeros(stream.num_experts, np.int32)
      stream_rows[one.positions] = rows[np.searchsorted(present, one.present)]
      parts.append(StreamPlan(one.sources, one.slots, stream_rows))
    if num_microbatches == 1:
      plans[name] = parts[0]
      if placed[name] is first:
        plans[name] = parts[0]._replace(rows=None)
    else:
      plans[name] = StreamPlan(
        tuple(
          np.stack(arrays)
          for arrays in zip(*(p.sources for p in parts), strict=True)
        ),
        np.stack([p.slots for p in parts]),
        np.stack([p.rows for p in parts]),
      )
  return ExpertPlan(experts, plans.get('encoder'), plans.get('decoder'))


class Planner:
  """Plans batches by the smallest profile of a ladder that fits.

  The choice depends on the batch alone, so that a resumed run compiles and
  computes the same.

  Attributes:
    profiles_used: for each profile taken so far, the number of batches.
  """

  def __init__(
    self,
    ladder: tuple[CapacityProfile, ...],
    num_experts: int,
    *,
    num_microbatches: int = 1,
  ):
    self._ladder = ladder
    self._num_experts = num_experts
    self._num_microbatches = num_microbatches
    self.profiles_used: dict[int, int] = {}

  def __call__(self, batch: dict[str, np.ndarray]) -> ExpertPlan:
    """Plan of stream name -> routing ids <int32>[batch, length]."""
    for k, profile in enumerate(self._ladder):
      plan = make_plan(
        batch,
        profile,
        self._num_experts,
        num_microbatches=self._num_microbatches,
      )
      if plan is not None:
        self.profiles_used[k] = self.profiles_used.get(k, 0) + 1
        return plan
    shapes = {name: ids.shape for name, ids in batch.items()}
    raise ValueError(
      'Every batch must have the shape of the trial batches from which the '
      f'capacity profiles were made, but one with {shapes} fits none of '
      'them. Make the ladder with profile_ladder from batches of this shape.'
    )


def microbatches(ids: np.ndarray, number: int) -> list[np.ndarray]:
  """Parts of a batch as the train step cuts it: every `number`-th row."""
  return [ids[part::number] for part in range(number)]


class _Placed(NamedTuple):
  """A stream's experts, their positions, and the slots of its tokens."""

  present: np.ndarray
  positions: np.ndarray
  sources: tuple[np.ndarray, ...]
  slots: np.ndarray


def _lay_out_rows(fixed, present, num_rows):
  """Row of each present expert; experts of `fixed` sit at their positions."""
  if fixed is None:
    if present.size > num_rows:
      return None
    return present, np.arange(present.size)
  rows = np.empty(present.size, np.int64)
  is_fixed = np.isin(present, fixed.present, assume_unique=True)
  rows[is_fixed] = fixed.positions
  spare = np.setdiff1d(np.arange(num_rows), fixed.positions, assume_unique=True)
  num_new = present.size - fixed.present.size
  if num_new > spare.size:
    return None
  rows[~is_fixed] = spare[:num_new]
  return present, rows


def _present(routing_ids, num_experts):
  """Experts of a stream, ascending, and how many tokens each has."""
  ids = routing_ids.reshape(-1)
  ids = ids[(ids >= 0) & (ids < num_experts)]
  return np.unique(ids, return_counts=True)


def _largest_counts(num_tokens, num_experts):
  """Most experts that each size class can ever have, <int64>[classes]."""
  rooms = np.array(_CAPACITIES, np.int64)
  smallest = np.concatenate([[1], rooms[:-1] + 1])
  return np.minimum(num_experts, num_tokens // smallest)


def _scaled(counts, factor, num_experts, num_tokens):
  """Sizes for `factor` times the experts that the trial batches had."""
  wanted = np.ceil(counts * factor).astype(np.int64)
  # Room for one expert in each larger class: a word may be hotter than seen.
  hottest = int(np.flatnonzero(counts)[-1]) if counts.any() else 0
  reach = hottest + 2 + int(2 * np.log2(factor))
  wanted[:reach] = np.maximum(wanted[:reach], 1)
  return StreamProfile(
    _classes(np.minimum(wanted, _largest_counts(num_tokens, num_experts)))
  )


def _classes(counts):
  pairs = zip(_CAPACITIES, counts.tolist(), strict=True)
  return tuple((room, count) for room, count in pairs if count)


def _place(routing_ids, stream, num_experts):
  """Positions and slots of a stream's experts, or None without room."""
  present, counts = _present(routing_ids, num_experts)
  rooms = np.array([room for room, _ in stream.classes], np.int64)
  sizes = np.array([count for _, count in stream.classes], np.int64)
  wanted = np.searchsorted(rooms, counts)
  # Ordered by class; what a class cannot hold moves up to the next one.
  order = np.argsort(wanted, kind='stable')
  per_class = np.bincount(wanted, minlength=len(rooms) + 1)
  if per_class[-1]:
    return None
  carried = 0
  for k, size in enumerate(sizes):
    waiting = per_class[k] + carried
    per_class[k] = min(waiting, size)
    carried = waiting - per_class[k]
  if carried:
    return None
  per_class = per_class[:-1]
  class_of = np.repeat(np.arange(len(rooms)), per_class)
  within = np.arange(class_of.size) - np.repeat(
    np.cumsum(per_class) - per_class, per_class
  )
  first_position = np.cumsum(sizes) - sizes
  first_slot = np.cumsum(sizes * rooms) - sizes * rooms
  positions = np.empty(present.size, np.int64)
  starts = np.empty(present.size, np.int64)
  positions[order] = first_position[class_of] + within
  starts[order] = first_slot[class_of] + within * rooms[class_of]

  flat = routing_ids.reshape(-1)
  num_slots = stream.num_slots
  token = np.flatnonzero((flat >= 0) & (flat < num_experts))
  token = token[np.argsort(flat[token], kind='stable')]
  rank = np.arange(token.size) - np.repeat(np.cumsum(counts) - counts, counts)
  slots = np.full(flat.size, num_slots, np.int32)
  slots[token] = np.repeat(starts, counts) + rank
  sources = np.full(num_slots, flat.size, np.int32)
  sources[slots[token]] = token
  per_class_sources, at = [], 0
  for room, size in zip(rooms.tolist(), sizes.tolist(), strict=True):
    per_class_sources.append(sources[at : at + room * size].reshape(size, room))
    at += room * size
  return _Placed(
    present,
    positions,
    tuple(per_class_sources),
    slots.reshape(routing_ids.shape),
  )
