"""Which experts a batch needs, and where each of its tokens is computed.

The host decides; the device only moves and multiplies. Experts that are
present are sorted into *size classes* with room for 1, 2, 3, 4, 6, 8, ...
tokens each, so that a class is one batched product. All sizes are static (a
`CapacityProfile`): a step is compiled once. A batch that does not fit takes the
next profile of a fixed ladder, so that the choice depends on the batch alone
and a resumed run makes the same one. No token is ever dropped.

A plan's pieces are NamedTuples of arrays: jax takes them as step arguments.
All static sizes are shapes.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

_logger = logging.getLogger(__name__)

# Room of a class grows by a third to a half: at most a third of all slots
# stay empty, and the number of classes stays logarithmic.
_CAPACITIES = tuple(
  sorted({2**k for k in range(25)} | {3 * 2**k for k in range(24)})
)

# In the order in which a plan counts their tokens.
STREAMS = ('encoder', 'decoder')

# Room of the profiles before the last one, which holds anything, relative to
# what the trial batches needed: some slack, then ever more.
PROFILE_FACTORS = tuple(1.1 * 1.3**k for k in range(6))


class SizeClasses(NamedTuple):
  """Experts by the room that their tokens need.

  Attributes:
    experts: one array <int32>[experts] for each size class; unused places
      have distinct numbers from `num_experts` on, so that a scatter drops
      them.
    sources: one array <int32>[experts, room] for each size class: the flat
      index of the token in each slot; the number of tokens if it is empty.
  """

  experts: tuple[np.ndarray, ...]
  sources: tuple[np.ndarray, ...]


class StreamPlan(NamedTuple):
  """Slots of one stream of tokens (the encoder's or the decoder's).

  Attributes:
    classes: experts of the stream's tokens.
    slots: <int32>[batch, length], the slot of each token, counted over all
      classes; the number of slots for a token without an expert.
  """

  classes: SizeClasses
  slots: np.ndarray


class ExpertPlan(NamedTuple):
  """All that a step has to know about the experts of its batch.

  Attributes:
    encoder: slots of the encoder's tokens, or None without sparse layers there.
    decoder: slots of the decoder's tokens, or None.
    updates: experts of all streams and microbatches, each once: what is to be
      updated. Tokens count through the encoder's, then the decoder's, in each
      microbatch by microbatch.
  """

  encoder: StreamPlan | None
  decoder: StreamPlan | None
  updates: SizeClasses

  def present_experts(self, num_experts: int) -> np.ndarray:
    """Experts of the batch, <int32>[n], ascending."""
    experts = np.concatenate(self.updates.experts)
    return np.sort(experts[experts < num_experts])

  def num_tokens(self) -> int:
    """Tokens that have an expert."""
    return sum(
      count_tokens(stream)
      for stream in (self.encoder, self.decoder)
      if stream is not None
    )


@dataclasses.dataclass(frozen=True)
class ClassSizes:
  """Static sizes: (room, number of experts) of each size class."""

  classes: tuple[tuple[int, int], ...]

  @property
  def num_slots(self) -> int:
    return sum(room * count for room, count in self.classes)

  @property
  def num_experts(self) -> int:
    return sum(count for _, count in self.classes)


@dataclasses.dataclass(frozen=True)
class CapacityProfile:
  """Static sizes of a plan.

  Attributes:
    streams: sizes of each planned stream, by name (`encoder`, `decoder`).
    updates: sizes for the experts of all streams together.
  """

  streams: tuple[tuple[str, ClassSizes], ...]
  updates: ClassSizes


def count_tokens(plan: StreamPlan) -> int:
  """Tokens with a slot; the arrays may have leading axes."""
  num_slots = sum(
    int(np.prod(sources.shape[-2:])) for sources in plan.classes.sources
  )
  return int(np.count_nonzero(plan.slots < num_slots))


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
) -> tuple[CapacityProfile, ...]:
  """Profiles from trial batches: the first holds them all, the last anything.

  Args:
    batches: dictionaries stream name -> routing ids <int32>[batch, length].
    num_experts: rows of the expert table.
    num_microbatches: parts into which a step cuts the batch.

  Returns:
    Profiles of growing size. The last fits every batch of this shape.

  Raises:
    ValueError: there is no trial batch.
  """
  largest: dict[str, np.ndarray] = {}
  num_tokens: dict[str, int] = {}

  def see(name, ids):
    counts = count_classes(ids, num_experts)
    largest[name] = np.maximum(largest.get(name, 0), counts)
    num_tokens[name] = ids.size

  names: tuple[str, ...] = ()
  for batch in batches:
    names = tuple(name for name in STREAMS if name in batch)
    for name in names:
      for part in microbatches(batch[name], num_microbatches):
        see(name, part)
    see('updates', _all_tokens(batch, names, num_microbatches))
  if not names:
    raise ValueError(
      'A capacity profile needs at least one trial batch with routing ids, '
      'but there was none. Give batches with encoder_routing_ids.'
    )
  ladder = []
  for factor in PROFILE_FACTORS:
    sizes = {
      name: scaled_sizes(counts, factor, num_experts, num_tokens[name])
      for name, counts in largest.items()
    }
    ladder.append(_profile(sizes, names))
  # Slow, and hardly ever taken: holds whatever a batch of this shape can be.
  sizes = {
    name: largest_sizes(tokens, num_experts)
    for name, tokens in num_tokens.items()
  }
  ladder.append(_profile(sizes, names))
  return tuple(ladder)


def _profile(sizes, names):
  streams = tuple((name, sizes[name]) for name in names)
  return CapacityProfile(streams, sizes['updates'])


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
      one, the streams' arrays get a leading axis [num_microbatches].

  Returns:
    The plan; equal batches give equal plans.
  """
  names = tuple(name for name, _ in profile.streams)
  tokens = _sorted(_all_tokens(batch, names, num_microbatches), num_experts)
  updates = _stream_plan(tokens, profile.updates, num_experts, (tokens.number,))
  if updates is None:
    return None
  streams = {}
  first = 0
  for name, sizes in profile.streams:
    parts = []
    for ids in microbatches(batch[name], num_microbatches):
      of_part = tokens.part(first, ids.size)
      first += ids.size
      parts.append(_stream_plan(of_part, sizes, num_experts, ids.shape))
    if any(part is None for part in parts):
      return None
    streams[name] = parts[0] if num_microbatches == 1 else _stack(parts)
  return ExpertPlan(
    streams.get('encoder'), streams.get('decoder'), updates.classes
  )


class Planner:
  """Plans batches by the smallest profile of a ladder that fits.

  The choice depends on the batch alone, so that a resumed run compiles and
  computes the same.

  Args:
    ladder: profiles, as of `profile_ladder`.
    num_experts: rows of the expert table.
    num_microbatches: parts into which the step cuts the batch.
    make_plan: as the function of this name; gives plans for these profiles.

  Attributes:
    profiles_used: for each profile taken so far, the number of batches.
  """

  def __init__(
    self,
    ladder: tuple[Any, ...],
    num_experts: int,
    *,
    num_microbatches: int = 1,
    make_plan: Callable[..., Any] = make_plan,
  ):
    self._ladder = ladder
    self._make_plan = functools.partial(
      make_plan, num_experts=num_experts, num_microbatches=num_microbatches
    )
    self.profiles_used: dict[int, int] = {}

  def __call__(self, batch: dict[str, np.ndarray]) -> Any:
    """Plan of stream name -> routing ids <int32>[batch, length]."""
    for k, profile in enumerate(self._ladder):
      plan = self._make_plan(batch, profile)
      if plan is not None:
        if k and k not in self.profiles_used:
          _logger.warning(
            'A batch has more experts than the trial batches: the step is '
            'compiled for capacity profile %d of %d.',
            k + 1,
            len(self._ladder),
          )
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


def _all_tokens(batch, names, num_microbatches):
  """Routing ids of all tokens, <int32>[tokens], in the order of a plan."""
  return np.concatenate(
    [
      part.reshape(-1)
      for name in names
      for part in microbatches(batch[name], num_microbatches)
    ]
  )


def _stack(parts):
  classes = [
    tuple(np.stack(arrays) for arrays in zip(*same_field, strict=True))
    for same_field in zip(*(part.classes for part in parts), strict=True)
  ]
  return StreamPlan(
    SizeClasses(*classes), np.stack([part.slots for part in parts])
  )


def _present(routing_ids, num_experts):
  """Experts of a stream, ascending, and how many tokens each has."""
  ids = routing_ids.reshape(-1)
  ids = ids[(ids >= 0) & (ids < num_experts)]
  return np.unique(ids, return_counts=True)


def largest_sizes(num_tokens: int, num_experts: int) -> ClassSizes:
  """Sizes that hold whatever so many tokens can be."""
  return ClassSizes(_classes(_largest_counts(num_tokens, num_experts)))


def _largest_counts(num_tokens, num_experts):
  """Most experts that each size class can ever have, <int64>[classes]."""
  rooms = np.array(_CAPACITIES, np.int64)
  smallest = np.concatenate([[1], rooms[:-1] + 1])
  return np.minimum(num_experts, num_tokens // smallest)


def scaled_sizes(
  counts: np.ndarray, factor: float, num_experts: int, num_tokens: int
) -> ClassSizes:
  """Sizes for `factor` times the experts that the trial batches had.

  Args:
    counts: <int64>[classes], the most that a batch had; see `count_classes`.
    factor: at least 1.
    num_experts: that there are.
    num_tokens: of one batch.
  """
  wanted = np.ceil(counts * factor).astype(np.int64)
  # Room for one expert in each larger class: a word may be hotter than seen.
  hottest = int(np.flatnonzero(counts)[-1]) if counts.any() else 0
  reach = hottest + 2 + int(2 * np.log2(factor))
  wanted[:reach] = np.maximum(wanted[:reach], 1)
  return ClassSizes(
    _classes(np.minimum(wanted, _largest_counts(num_tokens, num_experts)))
  )


def _classes(counts):
  pairs = zip(_CAPACITIES, counts.tolist(), strict=True)
  return tuple((room, count) for room, count in pairs if count)


def place_tokens(
  routing_ids: np.ndarray, sizes: ClassSizes, num_experts: int
) -> StreamPlan | None:
  """StreamPlan of these tokens, or None without room."""
  return _stream_plan(
    _sorted(routing_ids.reshape(-1), num_experts),
    sizes,
    num_experts,
    routing_ids.shape,
  )


class _SortedTokens(NamedTuple):
  """Tokens with an expert, in the order of experts, then of tokens.

  Attributes:
    tokens: <int64>[routed], which token.
    owners: <int32>[routed], its expert.
    number: all tokens, also those without an expert.
  """

  tokens: np.ndarray
  owners: np.ndarray
  number: int

  def part(self, first: int, number: int) -> '_SortedTokens':
    """Those of `number` tokens from `first` on, counted from there."""
    if number == self.number:
      return self
    here = (self.tokens >= first) & (self.tokens < first + number)
    return _SortedTokens(self.tokens[here] - first, self.owners[here], number)


def _sorted(ids, num_experts):
  """_SortedTokens of routing ids <int32>[tokens]."""
  tokens = np.flatnonzero((ids >= 0) & (ids < num_experts))
  owners = ids[tokens]
  # numpy has a radix sort for 16 bits, ten times faster than that of 32.
  low_bits = lambda numbers: numbers.astype(np.uint16)
  order = np.argsort(low_bits(owners), kind='stable')
  if num_experts > 2**16:
    high_bits = low_bits(owners[order] >> 16)
    order = order[np.argsort(high_bits, kind='stable')]
  return _SortedTokens(tokens[order], owners[order], ids.size)


def _stream_plan(tokens, sizes, num_experts, shape):
  """StreamPlan of sorted tokens, slots in `shape`, or None without room."""
  owners = tokens.owners
  first = np.flatnonzero(np.diff(owners, prepend=-1))  # Of each expert.
  counts = np.diff(first, append=owners.size)
  rooms = np.array([room for room, _ in sizes.classes], np.int64)
  places = np.array([count for _, count in sizes.classes], np.int64)
  wanted = np.searchsorted(rooms, counts).astype(np.uint8)
  # Ordered by class; what a class cannot hold moves up to the next one.
  order = np.argsort(wanted, kind='stable')
  per_class = np.bincount(wanted, minlength=len(rooms) + 1)
  if per_class[-1]:
    return None
  carried = 0
  for k, size in enumerate(places):
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
  first_place = np.cumsum(places) - places
  first_slot = np.cumsum(places * rooms) - places * rooms
  num_places = int(places.sum())
  experts = np.arange(num_experts, num_experts + num_places, dtype=np.int32)
  experts[first_place[class_of] + within] = owners[first[order]]
  starts = np.empty(first.size, np.int64)
  starts[order] = first_slot[class_of] + within * rooms[class_of]

  taken = np.repeat(starts - first, counts) + np.arange(owners.size)
  slots = np.full(tokens.number, sizes.num_slots, np.int32)
  slots[tokens.tokens] = taken
  sources = np.full(sizes.num_slots, tokens.number, np.int32)
  sources[taken] = tokens.tokens
  cut = lambda whole, ends: tuple(np.split(whole, ends[:-1]))
  classes = SizeClasses(
    cut(experts, np.cumsum(places)),
    tuple(
      part.reshape(-1, room)
      for part, room in zip(
        cut(sources, np.cumsum(places * rooms)), rooms.tolist(), strict=True
      )
    ),
  )
  return StreamPlan(classes, slots.reshape(shape))
