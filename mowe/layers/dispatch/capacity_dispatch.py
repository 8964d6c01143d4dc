"""In training, each expert has a fixed number of slots per group of tokens."""

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
  """Slots for an even share of the choices, times a factor, in training.

  Pairs get slots in order of priority. A token whose choices are all dropped
  gets zero from the layer: only the residual remains. Outside of training
  nothing is dropped.

  Source: Switch, arXiv 2101.03961. The share grows with the choices of a token,
  as everywhere but in flaxformer. Switch has a larger factor in evaluation
  (2.0) instead of none; then an answer depends on its neighbours in the batch.

  Attributes:
    factor: slots of an expert relative to an even share of all choices.
    min_capacity: slots of an expert in a group at least.

  Raises:
    ValueError: the factor is not positive.
  """

  factor: float = 1.25
  min_capacity: int = 4

  def __post_init__(self):
    if self.factor <= 0:
      raise ValueError(
        f'The capacity factor must be positive, but is {self.factor}. 1.0 is '
        'an even share; DroplessDispatch has no capacity.'
      )

  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Raises ValueError if slots would be fewer than a router always fills."""
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
    """Slots of one expert in one group."""
    share = router.num_pairs(group_size, num_experts) / num_experts
    return min(max(round(self.factor * share), self.min_capacity), group_size)

  def plan(
    self,
    choices: router_base.Choices,
    router: router_base.Router,
    *,
    num_experts: int,
  ) -> slots.SlotPlan:
    """Slots <int32>[experts * groups * capacity], those of an expert together.

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
    order, places, counts = slots.sort_by_expert(choices.experts, num_experts)
    num_pairs = order.shape[1]
    starts = jnp.cumsum(counts, axis=1) - counts
    group = jnp.arange(num_groups, dtype=jnp.int32)
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
    # The sentinel of pairs without an expert reads any start.
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
    """Experts' outputs <float>[slots, out], one batched product per kernel."""
    num_experts = next(iter(kernels.values())).shape[0]
    # [slots, embed] -> [experts, groups * capacity, embed]
    by_expert = lambda x: x.reshape(num_experts, -1, x.shape[-1])
    kept = None
    if keep is not None:
      kept = by_expert(keep(plan.pairs)).astype(rows.dtype)
    outputs = expert(by_expert(rows), kernels, kept)
    return outputs.reshape(rows.shape[0], -1)

  def without_drops(self) -> dropless_dispatch.DroplessDispatch:
    """As many slots as there are choices."""
    return dropless_dispatch.DroplessDispatch()

  def across(self, num_shards: int) -> 'CapacityExchange':
    """The same with experts on several devices."""
    return CapacityExchange(self, num_shards)


@dataclasses.dataclass(frozen=True)
class SequenceCapacity(CapacityDispatch):
  """The same, but the capacity holds outside of training, too.

  For SequenceGroups alone: what is dropped depends on the sequence itself then,
  and on no neighbour in the batch. So are Switch checkpoints of Hugging Face.
  """

  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Raises ValueError if a group may have more than one sequence."""
    super().check(router, groups)
    if not isinstance(groups, token_groups.SequenceGroups):
      raise ValueError(
        'A capacity that holds in evaluation must be that of one sequence, or '
        f'answers would depend on each other, but groups is {groups}. Use '
        'SequenceGroups, or CapacityDispatch.'
      )

  def without_drops(self) -> 'SequenceCapacity':
    """This one: it drops by design."""
    return self


@dataclasses.dataclass(frozen=True)
class CapacityExchange(dispatch_base.Dispatch):
  """Capacity dispatch over devices, only inside of `expert_parallel.run`.

  Attributes:
    here: the dispatch of each device.
    num_shards: devices along the mesh axis `expert`.
  """

  here: CapacityDispatch
  num_shards: int

  def plan(self, choices, router, *, num_experts) -> slots.SlotPlan:
    """Slots of this device's groups, for all experts."""
    return self.here.plan(choices, router, num_experts=num_experts)

  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Accepts what the dispatch accepted that this one was made from."""

  def across(self, num_shards: int) -> 'CapacityExchange':
    """Returns this dispatch, which knows of its devices already."""
    del num_shards
    return self

  def without_drops(self) -> dispatch_base.Dispatch:
    """As many slots as there are choices, on all devices."""
    return self.here.without_drops().across(self.num_shards)

  def compute(self, rows, kernels, plan, keep, expert) -> jax.Array:
    """Experts' outputs <float>[slots, out], by way of their devices."""
    num_experts = plan.group_sizes.size
    own_units = None
    if keep is not None:
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
