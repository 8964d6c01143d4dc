"""Plans which experts a batch needs and where each of its tokens is computed.

The host decides; the device only moves and multiplies. Experts that are
present are sorted into *size classes* with room for 1, 2, 3, 4, 6, 8, ...
tokens each, so that a class is computed as one batched product. All sizes are
static (a `CapacityProfile`), so that a step is compiled once. A batch that does
not fit takes the next profile of a fixed ladder. The choice depends on the
batch alone, so that a resumed run makes the same one. No token is ever dropped.

Plans are NamedTuples of arrays, which JAX takes as arguments of a step. Every
static size is the shape of an array.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

_logger = logging.getLogger(__name__)

# Tokens that an expert of each size class has room for. The room grows by a
# third to a half from class to class: at most a third of the slots of an
# expert stay empty, and the number of classes grows with the logarithm of the
# number of tokens.
_CAPACITIES = tuple(
  sorted({2**k for k in range(25)} | {3 * 2**k for k in range(24)})
)

# The streams, in the order in which a plan counts their tokens.
STREAMS = ('encoder', 'decoder')

# How much room each profile has, relative to what the trial batches needed. The
# last profile of a ladder, which holds anything, comes after these.
PROFILE_FACTORS = tuple(1.1 * 1.3**k for k in range(6))


class SizeClasses(NamedTuple):
  """The experts of a plan, by the room that their tokens need.

  Attributes:
    experts: one array <int32>[experts] for each size class, the expert in each
      place of the class. Unused places have distinct numbers from
      `num_experts` on, so that a scatter into the table drops them.
    sources: one array <int32>[experts, room] for each size class, the flat
      index of the token in each slot; the number of tokens for an empty slot.
  """

  experts: tuple[np.ndarray, ...]
  sources: tuple[np.ndarray, ...]


class StreamPlan(NamedTuple):
  """The slots of one stream of tokens, the encoder's or the decoder's.

  Attributes:
    classes: the experts of the stream's tokens.
    slots: <int32>[batch, length], the slot of each token, counted over all
      classes; the number of slots for a token without an expert.
  """

  classes: SizeClasses
  slots: np.ndarray


class ExpertPlan(NamedTuple):
  """Everything that a step has to know about the experts of its batch.

  Attributes:
    encoder: the slots of the encoder's tokens; None if the encoder has no
      sparse layers.
    decoder: the slots of the decoder's tokens; None if the decoder has no
      sparse layers.
    updates: the experts of all streams and microbatches, each once; these are
      the rows to be updated. Tokens are counted over the encoder's tokens,
      then the decoder's, in each stream microbatch by microbatch.
  """

  encoder: StreamPlan | None
  decoder: StreamPlan | None
  updates: SizeClasses

  def present_experts(self, num_experts: int) -> np.ndarray:
    """Returns the experts that the batch uses, <int32>[n], ascending."""
    experts = np.concatenate(self.updates.experts)
    return np.sort(experts[experts < num_experts])

  def renumbered(
    self, renumber: Callable[[np.ndarray], np.ndarray]
  ) -> 'ExpertPlan':
    """Returns the same plan with other numbers of experts.

    Args:
      renumber: from numbers of experts <int32>[n] to others.
    """

    def of_classes(classes):
      return classes._replace(experts=tuple(map(renumber, classes.experts)))

    def of_stream(stream):
      if stream is None:
        return None
      return stream._replace(classes=of_classes(stream.classes))

    return ExpertPlan(
      of_stream(self.encoder), of_stream(self.decoder), of_classes(self.updates)
    )

  def num_tokens(self) -> int:
    """Returns the number of tokens that have an expert."""
    return sum(
      count_tokens(stream)
      for stream in (self.encoder, self.decoder)
      if stream is not None
    )


@dataclasses.dataclass(frozen=True)
class ClassSizes:
  """The static sizes of the size classes of a stream.

  Attributes:
    classes: for each class its room, the tokens that one expert can have, and
      its number of places for experts.
  """

  classes: tuple[tuple[int, int], ...]

  @property
  def num_slots(self) -> int:
    """Number of slots of all classes together."""
    return sum(room * count for room, count in self.classes)

  @property
  def num_experts(self) -> int:
    """Number of places for experts in all classes together."""
    return sum(count for _, count in self.classes)


@dataclasses.dataclass(frozen=True)
class CapacityProfile:
  """The static sizes of a plan.

  Attributes:
    streams: the name (`encoder`, `decoder`) and the sizes of each planned
      stream.
    updates: the sizes for the experts of all streams together.
  """

  streams: tuple[tuple[str, ClassSizes], ...]
  updates: ClassSizes


def count_tokens(plan: StreamPlan) -> int:
  """Returns the number of tokens with a slot.

  The arrays of the plan may have leading axes, as for microbatches or devices.
  """
  num_slots = sum(
    int(np.prod(sources.shape[-2:])) for sources in plan.classes.sources
  )
  return int(np.count_nonzero(plan.slots < num_slots))


def count_classes(routing_ids: np.ndarray, num_experts: int) -> np.ndarray:
  """Returns how many present experts each class has, <int64>[classes]."""
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
  """Makes profiles of growing size from trial batches.

  Args:
    batches: trial batches, each as routing ids <int32>[batch, length] by the
      name of the stream.
    num_experts: number of rows of the expert table.
    num_microbatches: number of parts into which a step cuts the batch.

  Returns:
    Profiles of growing size. The first fits all trial batches, and the last
    fits every batch of their shape.

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
  # The last profile holds any batch of this shape. It is slow and hardly ever
  # taken.
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
  """Plans a batch in the sizes of a profile.

  Args:
    batch: routing ids <int32>[batch, length] by the name of the stream.
    profile: the static sizes of the plan.
    num_experts: number of rows of the expert table.
    num_microbatches: number of parts into which the step cuts the batch. With
      more than one, the arrays of the streams get a leading axis
      [num_microbatches].

  Returns:
    The plan, or None if the batch does not fit into the profile. Equal batches
    give equal plans.
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
    streams[name] = parts[0] if num_microbatches == 1 else stack_streams(parts)
  return ExpertPlan(
    streams.get('encoder'), streams.get('decoder'), updates.classes
  )


class Planner:
  """Plans batches by the smallest profile of a ladder that fits.

  The choice depends on the batch alone, so that a resumed run compiles and
  computes the same.

  Args:
    ladder: profiles of growing size, as from `profile_ladder`.
    num_experts: number of rows of the expert table.
    num_microbatches: number of parts into which the step cuts the batch.
    make_plan: function that plans a batch in one of these profiles, with the
      arguments of this module's `make_plan`.

  Attributes:
    profiles_used: the number of batches for which each profile was taken so
      far, by its index in the ladder.
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
    """Plans a batch: routing ids <int32>[batch, length] by stream name."""
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
  """Returns the parts into which the train step cuts a batch.

  Part k has every `number`-th row from row k on.
  """
  return [ids[part::number] for part in range(number)]


def _all_tokens(batch, names, num_microbatches):
  """Returns the routing ids of all tokens, <int32>[tokens], in plan order."""
  return np.concatenate(
    [
      part.reshape(-1)
      for name in names
      for part in microbatches(batch[name], num_microbatches)
    ]
  )


def stack_classes(parts: Sequence[SizeClasses]) -> SizeClasses:
  """Stacks size classes of equal sizes along a new leading axis."""
  experts = zip(*(part.experts for part in parts), strict=True)
  sources = zip(*(part.sources for part in parts), strict=True)
  return SizeClasses(
    tuple(np.stack(arrays) for arrays in experts),
    tuple(np.stack(arrays) for arrays in sources),
  )


def stack_streams(parts: Sequence[StreamPlan]) -> StreamPlan:
  """Stacks plans of equal sizes along a new leading axis."""
  return StreamPlan(
    stack_classes([part.classes for part in parts]),
    np.stack([part.slots for part in parts]),
  )


def _present(routing_ids, num_experts):
  """Returns the present experts, ascending, and their numbers of tokens."""
  ids = routing_ids.reshape(-1)
  ids = ids[(ids >= 0) & (ids < num_experts)]
  return np.unique(ids, return_counts=True)


def largest_sizes(num_tokens: int, num_experts: int) -> ClassSizes:
  """Returns sizes that fit every batch of so many tokens."""
  return ClassSizes(_classes(_largest_counts(num_tokens, num_experts)))


def _largest_counts(num_tokens, num_experts):
  """Returns the most experts that a class can ever need, <int64>[classes]."""
  rooms = np.array(_CAPACITIES, np.int64)
  # An expert of a class has more tokens than the class before has room for.
  smallest = np.concatenate([[1], rooms[:-1] + 1])
  return np.minimum(num_experts, num_tokens // smallest)


def scaled_sizes(
  counts: np.ndarray, factor: float, num_experts: int, num_tokens: int
) -> ClassSizes:
  """Returns sizes for `factor` times the experts that the trial batches had.

  Args:
    counts: <int64>[classes], the most experts of each class that any trial
      batch had, as from `count_classes`.
    factor: how many times as many experts are to fit; at least 1.
    num_experts: number of rows of the expert table.
    num_tokens: number of tokens of one batch.
  """
  wanted = np.ceil(counts * factor).astype(np.int64)
  # Each class up to a few beyond the largest that was seen has at least one
  # place, because a word may be more frequent than in the trial batches. Two
  # more classes double the room.
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
  """Plans tokens, and returns None if they do not fit.

  Args:
    routing_ids: <int32>[...], the expert of each token; a token has none if
      its id is negative, or `num_experts` or more.
    sizes: the static sizes of the plan.
    num_experts: number of rows of the expert table.
  """
  return _stream_plan(
    _sorted(routing_ids.reshape(-1), num_experts),
    sizes,
    num_experts,
    routing_ids.shape,
  )


class _SortedTokens(NamedTuple):
  """Tokens that have an expert, ordered by expert and then by token.

  Attributes:
    tokens: <int64>[routed], the flat index of each token.
    owners: <int32>[routed], the expert of each token.
    number: the number of all tokens, with and without an expert.
  """

  tokens: np.ndarray
  owners: np.ndarray
  number: int

  def part(self, first: int, number: int) -> '_SortedTokens':
    """Returns those of the `number` tokens from `first` on.

    Their flat indices are counted from `first`.
    """
    if number == self.number:
      return self
    here = (self.tokens >= first) & (self.tokens < first + number)
    return _SortedTokens(self.tokens[here] - first, self.owners[here], number)


def _sorted(ids, num_experts):
  """Sorts the tokens of routing ids <int32>[tokens] by their experts."""
  tokens = np.flatnonzero((ids >= 0) & (ids < num_experts))
  owners = ids[tokens]
  # NumPy sorts 16-bit numbers by radix, ten times faster than 32-bit numbers;
  # two stable sorts, low bits first, order numbers of 32 bits.
  low_bits = lambda numbers: numbers.astype(np.uint16)
  order = np.argsort(low_bits(owners), kind='stable')
  if num_experts > 2**16:
    high_bits = low_bits(owners[order] >> 16)
    order = order[np.argsort(high_bits, kind='stable')]
  return _SortedTokens(tokens[order], owners[order], ids.size)


def _stream_plan(tokens, sizes, num_experts, shape):
  """Plans sorted tokens; returns None if they do not fit.

  Args:
    tokens: _SortedTokens.
    sizes: ClassSizes.
    num_experts: number of rows of the expert table.
    shape: shape of the array of slots.
  """
  owners = tokens.owners
  # [experts]: the index in `owners` of each present expert's first token, and
  # its number of tokens.
  first = np.flatnonzero(np.diff(owners, prepend=-1))
  counts = np.diff(first, append=owners.size)
  # [classes]
  rooms = np.array([room for room, _ in sizes.classes], np.int64)
  places = np.array([count for _, count in sizes.classes], np.int64)
  fit = _fit_classes(counts, rooms, places)
  if fit is None:
    return None
  order, class_of, within = fit
  # Places, and slots, are numbered over all classes: [classes], where those of
  # each class begin.
  first_place = np.cumsum(places) - places
  first_slot = np.cumsum(places * rooms) - places * rooms
  num_places = int(places.sum())
  # The numbers of unused places remain what they are here: from `num_experts`
  # on, so that a scatter into the table drops them.
  experts = np.arange(num_experts, num_experts + num_places, dtype=np.int32)
  experts[first_place[class_of] + within] = owners[first[order]]
  # [experts]: the first slot of each expert. Its tokens fill its slots in
  # their own order.
  starts = np.empty(first.size, np.int64)
  starts[order] = first_slot[class_of] + within * rooms[class_of]

  # [routed]: the slot of each token that has an expert. Token i of an expert
  # has slot starts + i, and i is its index in `owners` less `first`.
  taken = np.repeat(starts - first, counts) + np.arange(owners.size)
  slots = np.full(tokens.number, sizes.num_slots, np.int32)
  slots[tokens.tokens] = taken
  sources = np.full(sizes.num_slots, tokens.number, np.int32)
  sources[taken] = tokens.tokens
  # [places] -> [places of class] and [slots] -> [places of class, room]
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


def _fit_classes(counts, rooms, places):
  """Gives each present expert a place in a size class.

  An expert takes the smallest class with room for its tokens. What a class has
  no place for moves up to the next class.

  Args:
    counts: <int64>[experts], the tokens of each present expert.
    rooms: <int64>[classes], the tokens that an expert of a class can have.
    places: <int64>[classes], the number of places in each class.

  Returns:
    order: <int64>[experts], the experts by the class that they wanted.
    class_of: <int64>[experts], the class that each expert in `order` got.
    within: <int64>[experts], the place that it got in the class.
    Or None if an expert does not fit.
  """
  # 8 bits hold every class, and NumPy sorts them by radix, which is fast.
  wanted = np.searchsorted(rooms, counts).astype(np.uint8)
  order = np.argsort(wanted, kind='stable')
  per_class = np.bincount(wanted, minlength=len(rooms) + 1)
  if per_class[-1]:
    return (
      None  # An expert has more tokens than the largest class has room for.
    )
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
  return order, class_of, within
