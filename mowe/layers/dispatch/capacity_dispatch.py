"""Dispatch in which each expert has a fixed number of slots per group."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mowe.layers.dispatch import (
  dispatch_base,
  dropless_dispatch,
  expert_parallel,
  slots,
  sorted_experts,
  token_groups,
)
from mowe.layers.routers import router_base


@dataclasses.dataclass(frozen=True)
class CapacityDispatch(dispatch_base.Dispatch):
  """Dispatch that limits, in training, how many tokens an expert gets.

  In each group of tokens an expert has slots for an even share of the group's
  choices, times a factor. Pairs get slots in order of priority, and a pair that
  finds no slot is dropped. A token whose choices are all dropped gets zeros
  from the layer, so that the residual connection passes it on unchanged.
  Outside of training nothing is dropped.

  Source: Switch, arXiv 2101.03961. The even share grows with the number of
  choices of a token, as it does everywhere but in flaxformer. In evaluation,
  Switch has a larger factor (2.0) and still drops; an answer then depends on
  its neighbors in the batch.

  Attributes:
    factor: number of slots of an expert, relative to an even share of all
      choices.
    min_capacity: smallest number of slots of an expert in a group.

  Raises:
    ValueError: the factor is not positive.
  """

  factor: float = 1.25
  min_capacity: int = 4

  def __post_init__(self):
    if self.factor <= 0:
      raise ValueError(
        f'The capacity factor must be positive, but is {self.factor}. Set it '
        'to 1.0 for an even share; DroplessDispatch has no capacity.'
      )

  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Raises ValueError if a router would always fill more slots than exist.

    Args:
      router: the router of the layer.
      groups: how the layer groups tokens.
    """
    del groups
    if not router.each_token_chooses and self.factor < 1:
      raise ValueError(
        'With ExpertsChoose every expert fills its share, so a capacity factor '
        f'must be at least 1, but is {self.factor}. Set it to 1.0, and factor '
        'of ExpertsChoose to the tokens that experts shall take.'
      )

  def capacity(
    self, router: router_base.Router, group_size: int, num_experts: int
  ) -> int:
    """Returns the number of slots of one expert in one group.

    Args:
      router: the router of the layer.
      group_size: number of tokens of a group.
      num_experts: number of experts on all devices together.
    """
    share = router.num_pairs(group_size, num_experts) / num_experts
    return min(max(round(self.factor * share), self.min_capacity), group_size)

  def plan(
    self,
    choices: router_base.Choices,
    router: router_base.Router,
    *,
    num_experts: int,
  ) -> slots.SlotPlan:
    """Gives the choices slots, see `Dispatch.plan`.

    Slots are [experts, groups, capacity], flattened. As the slots of an expert
    stand together, `compute` can multiply them by its kernel in one batched
    product, after a mere reshape.

    Args:
      choices: the choices of all groups.
      router: the router that made them.
      num_experts: number of experts on all devices together.

    Raises:
      ValueError: the capacity is below one slot.
    """
    num_groups, group_size, _ = choices.pairs.shape
    room = self.capacity(router, group_size, num_experts)
    if room < 1:
      raise ValueError(
        'An expert must have at least one slot in each group, but capacity '
        f'factor {self.factor} gives none for {group_size} tokens and '
        f'{num_experts} experts. Raise min_capacity, the factor or the size of '
        'the groups.'
      )
    # The sort keeps the order of priority among the pairs of an expert, so that
    # those beyond the capacity are the ones of least priority.
    order, places, counts = slots.sort_by_expert(choices.experts, num_experts)
    num_pairs = order.shape[1]
    starts = jnp.cumsum(counts, axis=1) - counts
    group = jnp.arange(num_groups, dtype=jnp.int32)
    # The pair in each slot: the first `room` places of each expert in the
    # sorted list, where it has so many. Pairs are counted over all groups.
    # [groups, experts, capacity] -> [experts, groups, capacity]
    slot = jnp.arange(room, dtype=jnp.int32)[None, None, :]
    at = (starts[:, :, None] + slot).reshape(num_groups, -1)
    pairs = jnp.take_along_axis(order, at, axis=1, mode='clip')
    pairs = pairs.reshape(num_groups, num_experts, room)
    pairs = jnp.where(
      slot < counts[:, :, None],
      pairs + group[:, None, None] * num_pairs,
      num_groups * num_pairs,
    ).swapaxes(0, 1)
    # The slot of each pair, <int32>[groups, pairs], from its position among the
    # pairs of its expert. A pair without an expert reads any start; it gets no
    # slot below.
    own_start = jnp.take_along_axis(
      starts, choices.experts, axis=1, mode='clip'
    )
    position = places - own_start
    slots_of_pairs = jnp.where(
      (choices.experts < num_experts) & (position < room),
      (choices.experts * num_groups + group[:, None]) * room + position,
      pairs.size,
    )
    return slots.make_plan(
      choices,
      pairs.reshape(-1),
      slots_of_pairs.reshape(-1),
      group_sizes=jnp.sum(jnp.minimum(counts, room), axis=0),
      num_slots=pairs.size,
    )

  def compute(
    self,
    rows: jax.Array,
    kernels: dict[str, jax.Array],
    plan: slots.SlotPlan,
    keep: Callable[[jax.Array], jax.Array] | None,
    expert: sorted_experts.Expert,
  ) -> jax.Array:
    """Returns the experts' outputs, see `Dispatch.compute`.

    Each kernel is one batched product over all slots, empty ones included.

    Args:
      rows: <float>[slots, in], the inputs in their slots.
      kernels: arrays <float>[experts, ...] by name.
      plan: the plan that `plan` returned.
      keep: function of pairs <int32>[slots] that returns the dropout masks
        <float32>[slots, hidden units] of these pairs; None without dropout.
      expert: the computation of one expert.

    Returns:
      <float>[slots, out].
    """
    num_experts = next(iter(kernels.values())).shape[0]
    # [slots, embed] -> [experts, groups * capacity, embed]
    by_expert = lambda x: x.reshape(num_experts, -1, x.shape[-1])
    kept = None
    if keep is not None:
      kept = by_expert(keep(plan.pairs)).astype(rows.dtype)
    outputs = expert(by_expert(rows), kernels, kept)
    return outputs.reshape(rows.shape[0], -1)

  def without_drops(self) -> dropless_dispatch.DroplessDispatch:
    """Returns the dropless dispatch."""
    return dropless_dispatch.DroplessDispatch()

  def across(self, num_shards: int) -> 'CapacityExchange':
    """Returns the dispatch that does the same with experts on devices.

    Args:
      num_shards: number of devices that share the experts.
    """
    return CapacityExchange(self, num_shards)


@dataclasses.dataclass(frozen=True)
class SequenceCapacity(CapacityDispatch):
  """CapacityDispatch that drops outside of training as well.

  It works only with SequenceGroups. What is dropped then depends on the
  sequence itself, and not on its neighbors in the batch. The Switch models of
  Hugging Face drop tokens in this way.

  The attributes are those of CapacityDispatch.
  """

  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Raises ValueError if a group may have more than one sequence.

    Args:
      router: the router of the layer.
      groups: how the layer groups tokens.
    """
    super().check(router, groups)
    if not isinstance(groups, token_groups.SequenceGroups):
      raise ValueError(
        'A capacity that holds in evaluation must be that of one sequence, or '
        f'answers would depend on each other, but groups is {groups}. Use '
        'SequenceGroups, or CapacityDispatch.'
      )

  def without_drops(self) -> 'SequenceCapacity':
    """Returns this dispatch, whose drops depend on no other row."""
    return self


@dataclasses.dataclass(frozen=True)
class CapacityExchange(dispatch_base.Dispatch):
  """Capacity dispatch with experts on several devices.

  It works only inside of `expert_parallel.run`. Each device plans the slots of
  its own groups for all experts, and an all-to-all brings the slots of an
  expert to its device.

  Attributes:
    here: the dispatch by which each device plans and computes.
    num_shards: number of devices along the mesh axis `expert`.
  """

  here: CapacityDispatch
  num_shards: int

  def plan(self, choices, router, *, num_experts) -> slots.SlotPlan:
    """Gives the choices of this device's groups slots of all experts."""
    return self.here.plan(choices, router, num_experts=num_experts)

  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Accepts everything: the dispatch `here` was asked before."""

  def across(self, num_shards: int) -> 'CapacityExchange':
    """Returns this dispatch, as it is one for several devices already."""
    del num_shards
    return self

  def without_drops(self) -> dispatch_base.Dispatch:
    """Returns what takes the place of `here`, for several devices."""
    return self.here.without_drops().across(self.num_shards)

  def compute(self, rows, kernels, plan, keep, expert) -> jax.Array:
    """Returns the outputs <float>[slots, out], computed on other devices.

    The arguments are those of `CapacityDispatch.compute`, with the kernels of
    this device's own experts.
    """
    num_experts = plan.group_sizes.size
    own_units = None
    if keep is not None:
      # The masks depend on the pairs, so these travel with the rows. Pairs that
      # come from several devices must be told apart.
      pairs = expert_parallel.number_pairs(plan.pairs, plan.slots_of_pairs.size)
      pairs = self._to_experts(pairs, num_experts)
      plan = plan._replace(pairs=pairs)
      own_units = lambda pairs: expert_parallel.own_units(keep(pairs))
    outputs = self.here.compute(
      self._to_experts(rows, num_experts), kernels, plan, own_units, expert
    )
    # [own experts, shards * slots, out] -> [experts, slots, out]
    width = outputs.shape[1]
    outputs = outputs.reshape(num_experts // self.num_shards, -1, width)
    return _all_to_all(outputs, 1, 0).reshape(-1, width)

  def _to_experts(self, slots, num_experts):
    # [experts, slots, ...] -> [own experts, shards * slots, ...]
    by_expert = slots.reshape(num_experts, -1, *slots.shape[1:])
    return _all_to_all(by_expert, 0, 1).reshape(-1, *slots.shape[1:])


def _all_to_all(array, split_axis, concat_axis):
  return jax.lax.all_to_all(
    array, expert_parallel.EXPERT_AXIS, split_axis, concat_axis, tiled=True
  )
