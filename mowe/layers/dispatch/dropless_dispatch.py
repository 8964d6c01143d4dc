"""Dispatch that sorts pairs by expert and drops none of them."""

import dataclasses

import jax
import jax.numpy as jnp

from mowe.layers.dispatch import (
  dispatch_base,
  dropless_exchange,
  expert_dropout,
  slots,
  sorted_experts,
  token_groups,
)
from mowe.layers.routers import router_base


@dataclasses.dataclass(frozen=True)
class DroplessDispatch(dispatch_base.Dispatch):
  """Dispatch in which an expert has as many slots as it was chosen.

  Slots are in the order of the experts, over all groups together.

  Source: MegaBlocks, arXiv 2211.15841.

  Attributes:
    buffer_factor: number of rows that a device has room for from each other
      device, relative to an even share, where experts are on several devices.
      None makes room for all rows, so that nothing is ever dropped; memory then
      grows with the number of devices. With a factor, training drops and counts
      the rows that do not fit.

  Raises:
    ValueError: the factor is not positive.
  """

  buffer_factor: float | None = None

  def __post_init__(self):
    if self.buffer_factor is not None and self.buffer_factor <= 0:
      raise ValueError(
        f'buffer_factor must be positive, but is {self.buffer_factor}. Set it '
        'to 1.0 for an even share, or leave it out to drop nothing.'
      )

  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Accepts every router and all groups."""

  def plan(
    self,
    choices: router_base.Choices,
    router: router_base.Router,
    *,
    num_experts: int,
  ) -> slots.SlotPlan:
    """Gives each pair with an expert a slot, see `Dispatch.plan`.

    Slots are <int32>[pairs + tile]: those of expert 0, then those of expert 1,
    and so on, then empty ones. There are at least as many empty slots as a tile
    of `sorted_experts` has rows, so that a tile never ends beyond the array.

    Args:
      choices: the choices of all groups.
      router: the router that made them.
      num_experts: number of experts.
    """
    del router
    experts = choices.experts.reshape(1, -1)
    num_pairs = experts.size
    order, places, counts = slots.sort_by_expert(experts, num_experts)
    counts = counts[0]
    share = sorted_experts.batched_share(num_pairs, num_experts)
    num_slots = num_pairs + sorted_experts.tile_size(share)
    # Pairs without an expert are the last of the sorted list, so that the slots
    # from the sum of all counts on are empty.
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    pairs = jnp.where(
      slot < jnp.sum(counts),
      jnp.take(order[0], slot, mode='clip'),
      num_pairs,
    )
    slots_of_pairs = jnp.where(experts < num_experts, places, num_slots)
    return slots.make_plan(
      choices,
      pairs,
      slots_of_pairs.reshape(-1),
      group_sizes=counts,
      num_slots=jnp.sum(counts),
    )

  def compute(
    self,
    rows: jax.Array,
    kernels: dict[str, jax.Array],
    plan: slots.SlotPlan,
    keep: expert_dropout.ExpertDropout | None,
    expert: sorted_experts.Expert,
  ) -> jax.Array:
    """Returns the experts' outputs <float>[slots, out], see `Dispatch`."""
    given = sorted_experts.Rows(plan.group_sizes, plan.pairs)
    return sorted_experts.by_expert(
      rows, kernels, None, given, keep, expert, _share(plan)
    )

  def compute_tokens(self, tokens, weights, kernels, plan, keep, expert):
    """Returns the weighted outputs, see `Dispatch`.

    Unlike the method of the base class, it does not copy tokens to slots: a
    copy of each token for each of its pairs would be kept for the gradient.
    """
    read = sorted_experts.Rows(plan.group_sizes, plan.pairs, plan)
    return sorted_experts.by_expert(
      tokens, kernels, weights, read, keep, expert, _share(plan)
    )

  def without_drops(self) -> 'DroplessDispatch':
    """Returns the dropless dispatch with room for all rows."""
    return DroplessDispatch()

  def across(self, num_shards: int) -> dropless_exchange.DroplessExchange:
    """Returns the dispatch that does the same with experts on devices.

    Args:
      num_shards: number of devices that share the experts.
    """
    return dropless_exchange.DroplessExchange(num_shards, self.buffer_factor)


def _share(plan):
  return sorted_experts.batched_share(
    plan.slots_of_pairs.size, plan.group_sizes.size
  )
