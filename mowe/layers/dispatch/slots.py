"""Moving tokens to slots and back, by gathers alone.

`to_slots` and `to_tokens` are transposes of each other, so each is the other's
gradient and no scatter-add is left, which on GPU would add in any order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mowe.layers.routers import router_base

# Up to this many slots per token they are added up one after another.
_FEW = 8


class SlotPlan(NamedTuple):
  """Which pair is computed in which slot; tokens count over all groups.

  Attributes:
    sources: <int32>[slots], the token in each slot; the number of tokens in an
      empty one.
    pairs: <int32>[slots], the pair in each slot, counted over all groups; the
      number of pairs in an empty one.
    slots_of_pairs: <int32>[pairs]; the number of slots for a pair without one.
    slots_of_tokens: <int32>[tokens, width]; the number of slots for none.
    group_sizes: <int32>[experts], filled slots of each expert.
    num_slots: slots that are computed, filled or not; an int or <int32>[].
  """

  sources: jax.Array
  pairs: jax.Array
  slots_of_pairs: jax.Array
  slots_of_tokens: jax.Array
  group_sizes: jax.Array
  num_slots: jax.Array | int


def sort_by_expert(
  experts: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Order of pairs by expert; pairs of one expert keep their order.

  Args:
    experts: <int32>[groups, pairs], `num_experts` for none.
    num_experts: experts.

  Returns:
    order: <int32>[groups, pairs], pair at each place of the sorted list.
    places: <int32>[groups, pairs], place of each pair.
    counts: <int32>[groups, experts], pairs of each expert.
  """
  order = jnp.argsort(experts, axis=1, stable=True).astype(jnp.int32)
  group = jnp.arange(experts.shape[0])[:, None]
  place = jnp.broadcast_to(
    jnp.arange(experts.shape[1], dtype=jnp.int32), experts.shape
  )
  places = (
    jnp.zeros_like(order).at[group, order].set(place, unique_indices=True)
  )
  return order, places, count_choices(experts, num_experts)


def count_choices(experts: jax.Array, num_experts: int) -> jax.Array:
  """Pairs of each expert: [groups, pairs] to <int32>[groups, experts]."""
  numbers = jnp.arange(num_experts)[None, None, :]
  return jnp.sum(experts[:, :, None] == numbers, axis=1, dtype=jnp.int32)


def make_plan(
  choices: router_base.Choices,
  pairs: jax.Array,
  slots_of_pairs: jax.Array,
  group_sizes: jax.Array,
  num_slots: jax.Array | int,
) -> SlotPlan:
  """Completes a plan from the pair of each slot and the slot of each pair."""
  num_groups, num_tokens, width = choices.pairs.shape
  pairs_per_group = choices.tokens.shape[1]
  group = jnp.arange(num_groups, dtype=jnp.int32)[:, None]
  tokens = (choices.tokens + group * num_tokens).reshape(-1)
  own_pairs = jnp.where(
    choices.pairs < pairs_per_group,
    choices.pairs + group[:, :, None] * pairs_per_group,
    num_groups * pairs_per_group,
  )
  take = lambda array, index, fill: jnp.take(
    array, index, mode='fill', fill_value=fill
  )
  slots_of_tokens = take(slots_of_pairs, own_pairs, pairs.size)
  slots_of_tokens = slots_of_tokens.reshape(-1, width)
  if width > _FEW:
    slots_of_tokens = jnp.sort(slots_of_tokens, axis=1)
  return SlotPlan(
    sources=take(tokens, pairs, num_groups * num_tokens),
    pairs=pairs,
    slots_of_pairs=slots_of_pairs,
    slots_of_tokens=slots_of_tokens,
    group_sizes=group_sizes,
    num_slots=num_slots,
  )


@jax.custom_vjp
def to_slots(tokens: jax.Array, plan: SlotPlan) -> jax.Array:
  """Copies tokens <float>[tokens, embed] to slots, zeros in empty ones."""
  return _rows(tokens, plan.sources)


@jax.custom_vjp
def to_tokens(slots: jax.Array, plan: SlotPlan) -> jax.Array:
  """Adds up the slots <float>[slots, embed] of each token, zero for none."""
  own = plan.slots_of_tokens
  if own.shape[1] <= _FEW:
    return sum(_rows(slots, own[:, i]) for i in range(own.shape[1]))
  # As many rounds as the busiest token has slots, the filled ones first.
  rounds = jnp.max(jnp.sum(own < slots.shape[0], axis=1))
  zeros = jnp.zeros_like(slots, shape=(own.shape[0], slots.shape[1]))
  add = lambda i, total: total + _rows(slots, own[:, i])
  return jax.lax.fori_loop(0, rounds, add, zeros)


def to_choices(slots: jax.Array, plan: SlotPlan) -> jax.Array:
  """Slots <float>[slots, ...] of each token, [tokens, width, ...].

  Zeros where a token has no slot. Those of a token are in any order, but the
  one of `from_choices`.
  """
  index, inverse = _places_of_choices(plan)
  rows = permute(slots, index, inverse)
  return rows.reshape(*plan.slots_of_tokens.shape, *slots.shape[1:])


def from_choices(choices: jax.Array, plan: SlotPlan) -> jax.Array:
  """Inverse of `to_choices`, zeros in empty slots."""
  index, inverse = _places_of_choices(plan)
  return permute(choices.reshape(-1, *choices.shape[2:]), inverse, index)


def _places_of_choices(plan):
  """Slot of each choice <int32>[tokens * width], and choice of each slot."""
  index = plan.slots_of_tokens.reshape(-1)
  choices = jnp.arange(index.size, dtype=jnp.int32)
  inverse = jnp.full_like(plan.sources, index.size)
  return index, inverse.at[index].set(choices, mode='drop')


@jax.custom_vjp
def permute(rows: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
  """Rows [from, ...] at `index` <int32>[to], zero where it is out of range.

  `inverse` <int32>[from] is where each row goes; out of range for nowhere.
  """
  del inverse
  return _rows(rows, index)


def _rows(rows, index):
  return jnp.take(rows, index, axis=0, mode='fill', fill_value=0)


to_slots.defvjp(
  lambda tokens, plan: (to_slots(tokens, plan), plan),
  lambda plan, cotangent: (to_tokens(cotangent, plan), None),
)
to_tokens.defvjp(
  lambda slots, plan: (to_tokens(slots, plan), plan),
  lambda plan, cotangent: (to_slots(cotangent, plan), None),
)
permute.defvjp(
  lambda *args: (permute(*args), args[1:]),
  lambda places, cotangent: (
    permute(cotangent, *reversed(places)),
    None,
    None,
  ),
)
