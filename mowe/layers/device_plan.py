"""The plan of a batch on the device: the same arrays as `words/batch_plans.py` makes.

For steps whose routing ids the host never sees. The sizes are static, so that
the caller has to look whether the batch did fit them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mowe.words import batch_plans


def make_plan(
  batch: dict[str, jax.Array],
  profile: batch_plans.CapacityProfile,
  num_experts: int,
  *,
  num_microbatches: int = 1,
) -> tuple[batch_plans.ExpertPlan, jax.Array]:
  """Twin of `plan.make_plan`.

  Args:
    batch: stream name -> routing ids <int32>[batch, length].
    profile: static sizes.
    num_experts: rows of the expert table.
    num_microbatches: parts into which the step cuts the batch. With more than
      one, the streams' arrays get a leading axis [num_microbatches].

  Returns:
    The plan, and whether the batch fits <bool>[]: without, the plan is
    meaningless.
  """
  streams, all_fit, tokens = {}, [], []
  for name, sizes in profile.streams:
    ids = batch[name]
    # Every num_microbatches-th row: [microbatch, row, length].
    parts = ids.reshape(-1, num_microbatches, ids.shape[1]).swapaxes(0, 1)
    tokens.append(parts.reshape(-1))
    place = lambda part, sizes=sizes: place_tokens(part, sizes, num_experts)
    if num_microbatches == 1:
      streams[name], fits = place(ids)
    else:
      streams[name], fits = jax.vmap(place)(parts)
    all_fit.append(fits.all())
  updates, fits = place_tokens(
    jnp.concatenate(tokens), profile.updates, num_experts
  )
  plan = batch_plans.ExpertPlan(
    streams.get('encoder'), streams.get('decoder'), updates.classes
  )
  return plan, jnp.stack([fits, *all_fit]).all()


def place_tokens(
  routing_ids: jax.Array, sizes: batch_plans.ClassSizes, num_experts: int
) -> tuple[batch_plans.StreamPlan, jax.Array]:
  """Twin of `plan.place_tokens`: StreamPlan, and whether it fits <bool>[]."""
  flat = routing_ids.reshape(-1)
  every = jnp.arange(flat.size, dtype=jnp.int32)
  # Tokens in the order of their experts; those without one come last.
  flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
  token = jnp.argsort(flat, stable=True).astype(jnp.int32)
  owners = flat[token]
  routed = owners < num_experts
  is_first = routed & jnp.append(True, owners[1:] != owners[:-1])
  expert = jnp.cumsum(is_first, dtype=jnp.int32) - 1  # As it is numbered below.

  # Experts that are present, ascending; unused numbers have no token.
  (first,) = jnp.nonzero(
    is_first, size=min(flat.size, num_experts), fill_value=flat.size
  )
  num_routed = routed.sum(dtype=jnp.int32)
  counts = jnp.diff(jnp.minimum(first, num_routed), append=num_routed)
  places, starts, fits = _room_for(counts, sizes)

  num_places = sum(count for _, count in sizes.classes)
  experts = num_experts + jnp.arange(num_places, dtype=jnp.int32)
  experts = experts.at[places].set(
    jnp.take(owners, first, mode='clip'), mode='drop'
  )
  taken = jnp.where(
    routed, starts[expert] + every - first[expert], sizes.num_slots
  )
  slots = jnp.zeros_like(token).at[token].set(taken, unique_indices=True)
  sources = jnp.full(sizes.num_slots, flat.size, jnp.int32)
  sources = sources.at[taken].set(token, mode='drop')
  classes = batch_plans.SizeClasses(
    tuple(_cut(experts, [count for _, count in sizes.classes])),
    tuple(
      part.reshape(-1, room)
      for part, (room, _) in zip(
        _cut(sources, [room * count for room, count in sizes.classes]),
        sizes.classes,
        strict=True,
      )
    ),
  )
  return batch_plans.StreamPlan(classes, slots.reshape(routing_ids.shape)), fits


def _room_for(counts, sizes):
  """Gives a place to each expert that has tokens.

  Args:
    counts: <int32>[experts], tokens of each.
    sizes: ClassSizes.

  Returns:
    Places <int32>[experts], out of range for experts without tokens; first
    slots <int32>[experts]; and whether all fit <bool>[].
  """
  rooms, places = np.array(sizes.classes, np.int32).T
  num_classes = len(rooms)
  wanted = jnp.searchsorted(jnp.asarray(rooms), counts)
  wanted = jnp.where(counts > 0, wanted, num_classes + 1)
  # Ordered by class; what a class cannot hold moves up to the next one.
  order = jnp.argsort(wanted, stable=True)
  waiting = jnp.bincount(wanted, length=num_classes + 2)[: num_classes + 1]

  def fill(carried, of_class):
    number, size = of_class
    taken = jnp.minimum(carried + number, size)
    return carried + number - taken, taken

  carried, per_class = jax.lax.scan(
    fill, jnp.zeros_like(waiting[0]), (waiting[:-1], jnp.asarray(places))
  )
  ends = jnp.cumsum(per_class)
  number = jnp.arange(counts.size, dtype=jnp.int32)
  of_class = jnp.searchsorted(ends, number, side='right')
  is_placed = of_class < num_classes
  of_class = jnp.minimum(of_class, num_classes - 1)
  at = lambda array: jnp.asarray(array, jnp.int32)[of_class]
  within = number - at(ends - per_class)
  place = at(np.cumsum(places) - places) + within
  start = at(np.cumsum(places * rooms) - places * rooms) + within * at(rooms)
  in_order = lambda array: jnp.zeros_like(number).at[order].set(array)
  return (
    in_order(jnp.where(is_placed, place, int(places.sum()))),
    in_order(start),
    (carried == 0) & (waiting[-1] == 0),
  )


def _cut(array, lengths):
  return jnp.split(array, np.cumsum(lengths)[:-1])
