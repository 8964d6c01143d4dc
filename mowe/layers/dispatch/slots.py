"""Moves tokens to slots and back, by gathers alone.

The gradient that JAX forms of a gather is a scatter-add. On GPU that adds in
any order, so that results would differ from run to run. A plan knows both the
token in each slot and the slots of each token. So `to_slots` and `to_tokens`
are gathers, each of them is the transpose of the other, and each is defined as
the gradient of the other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mowe.layers.routers import router_base

# For up to this many slots per token, the sum over them is written out.
_FEW = 8


class SlotPlan(NamedTuple):
  """The plan of a mixture: which pair is computed in which slot.

  Tokens and pairs are counted over all groups. An index that stands for nothing
  is one beyond the last, so that a gather can fill it with zeros.

  Attributes:
    sources: <int32>[slots], the token in each slot; the number of tokens for an
      empty slot.
    pairs: <int32>[slots], the pair in each slot; the number of pairs for an
      empty slot.
    slots_of_pairs: <int32>[pairs], the slot of each pair; the number of slots
      for a pair without a slot.
    slots_of_tokens: <int32>[tokens, width], the slots of each token's pairs;
      the number of slots for a pair without a slot. `width` is the largest
      number of pairs that a token can have.
    group_sizes: <int32>[experts], number of filled slots of each expert.
    num_slots: number of slots that are computed, filled or not; an int or
      <int32>[].
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
  """Sorts the pairs of each group by expert.

  Pairs of one expert keep their order. Pairs without an expert come last.

  Args:
    experts: <int32>[groups, pairs], the expert of each pair; `num_experts` for
      a pair without an expert.
    num_experts: number of experts.

  Returns:
    order: <int32>[groups, pairs], the pair at each place of the sorted list.
    places: <int32>[groups, pairs], the place of each pair in the sorted list.
    counts: <int32>[groups, experts], the number of pairs of each expert.
  """
  order = jnp.argsort(experts, axis=1, stable=True).astype(jnp.int32)
  group = jnp.arange(experts.shape[0])[:, None]
  place = jnp.broadcast_to(
    jnp.arange(experts.shape[1], dtype=jnp.int32), experts.shape
  )
  # A scatter gives the inverse of the permutation, without a second sort.
  places = (
    jnp.zeros_like(order).at[group, order].set(place, unique_indices=True)
  )
  return order, places, count_choices(experts, num_experts)


def count_choices(experts: jax.Array, num_experts: int) -> jax.Array:
  """Counts the pairs of each expert.

  Args:
    experts: <int32>[groups, pairs], the expert of each pair. Numbers from
      `num_experts` on are not counted.
    num_experts: number of experts.

  Returns:
    <int32>[groups, experts].
  """
  numbers = jnp.arange(num_experts)[None, None, :]
  return jnp.sum(experts[:, :, None] == numbers, axis=1, dtype=jnp.int32)


def make_plan(
  choices: router_base.Choices,
  pairs: jax.Array,
  slots_of_pairs: jax.Array,
  group_sizes: jax.Array,
  num_slots: jax.Array | int,
) -> SlotPlan:
  """Completes a plan from the pair of each slot and the slot of each pair.

  Args:
    choices: the choices of all groups.
    pairs: <int32>[slots], see `SlotPlan`.
    slots_of_pairs: <int32>[pairs], see `SlotPlan`.
    group_sizes: <int32>[experts], number of filled slots of each expert.
    num_slots: number of slots that are computed.
  """
  num_groups, num_tokens, width = choices.pairs.shape
  pairs_per_group = choices.tokens.shape[1]
  group = jnp.arange(num_groups, dtype=jnp.int32)[:, None]
  tokens = (choices.tokens + group * num_tokens).reshape(-1)
  # The pairs of each token, counted over all groups: [groups, tokens, width].
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
    # `to_tokens` reads no further than the busiest token's last slot, so that
    # the slots that stand for nothing must come last. They are the largest.
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
  """Copies tokens to their slots.

  Args:
    tokens: <float>[tokens, embed].
    plan: which token is in which slot.

  Returns:
    <float>[slots, embed], zeros in empty slots.
  """
  return _rows(tokens, plan.sources)


@jax.custom_vjp
def to_tokens(slots: jax.Array, plan: SlotPlan) -> jax.Array:
  """Adds up the slots of each token.

  Args:
    slots: <float>[slots, embed].
    plan: which token is in which slot.

  Returns:
    <float>[tokens, embed], zeros for a token without a slot.
  """
  own = plan.slots_of_tokens
  if own.shape[1] <= _FEW:
    return sum(_rows(slots, own[:, i]) for i in range(own.shape[1]))
  # Where experts choose, the width is the number of experts, but few of a
  # token's slots are filled. So there are only as many rounds as the busiest
  # token of this batch has filled slots.
  rounds = jnp.max(jnp.sum(own < slots.shape[0], axis=1))
  zeros = jnp.zeros_like(slots, shape=(own.shape[0], slots.shape[1]))
  add = lambda i, total: total + _rows(slots, own[:, i])
  return jax.lax.fori_loop(0, rounds, add, zeros)


def to_choices(slots: jax.Array, plan: SlotPlan) -> jax.Array:
  """Gathers the slots of each token.

  Args:
    slots: <float>[slots, ...].
    plan: which token is in which slot.

  Returns:
    <float>[tokens, width, ...], zeros where a token has no slot. The slots of a
    token are in no particular order, but `from_choices` expects the same one.
  """
  index, inverse = _places_of_choices(plan)
  rows = permute(slots, index, inverse)
  return rows.reshape(*plan.slots_of_tokens.shape, *slots.shape[1:])


def from_choices(choices: jax.Array, plan: SlotPlan) -> jax.Array:
  """Copies the choices of each token to their slots; inverts `to_choices`.

  Args:
    choices: <float>[tokens, width, ...].
    plan: which token is in which slot.

  Returns:
    <float>[slots, ...], zeros in empty slots.
  """
  index, inverse = _places_of_choices(plan)
  return permute(choices.reshape(-1, *choices.shape[2:]), inverse, index)


def _places_of_choices(plan):
  """Slot of each choice <int32>[tokens * width], choice of each slot [slots].

  An index out of range stands for a choice without a slot, or an empty slot.
  """
  index = plan.slots_of_tokens.reshape(-1)
  choices = jnp.arange(index.size, dtype=jnp.int32)
  inverse = jnp.full_like(plan.sources, index.size)
  return index, inverse.at[index].set(choices, mode='drop')


@jax.custom_vjp
def permute(rows: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
  """Gathers rows, each of which goes to one place at most.

  Args:
    rows: [from, ...].
    index: <int32>[to], the row that each place reads; out of range for zeros.
    inverse: <int32>[from], the place that each row goes to; out of range if it
      goes nowhere. With it, the gradient is a gather as well.

  Returns:
    [to, ...].
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
