"""Every choice is computed: pairs are sorted by expert."""

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
  """Slots in order of the experts, as many for each as it was chosen.

  Source: MegaBlocks, arXiv 2211.15841. Groups play no part in it.

  Attributes:
    buffer_factor: with experts on several devices, rows that each of them has
      room for from each other, relative to an even share. None has room for
      all, so that nothing is ever dropped; memory then grows with the devices.
      With a factor, what does not fit is dropped in training, and counted.

  Raises:
    ValueError: the factor is not positive.
  """

  buffer_factor: float | None = None

  def __post_init__(self):
    if self.buffer_factor is not None and self.buffer_factor <= 0:
      raise ValueError(
        f'buffer_factor must be positive, but is {self.buffer_factor}. 1.0 is '
        'an even share; leave it out to drop nothing.'
      )

  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Accepts any router and any groups."""

  def plan(
    self,
    choices: router_base.Choices,
    router: router_base.Router,
    *,
    num_experts: int,
  ) -> slots.SlotPlan:
    """One slot for each pair, and empty ones up to the size of a tile."""
    del router
    experts = choices.experts.reshape(1, -1)
    num_pairs = experts.size
    order, places, counts = slots.sort_by_expert(experts, num_experts)
    counts = counts[0]
    share = sorted_experts.batched_share(num_pairs, num_experts)
    num_slots = num_pairs + sorted_experts.tile_size(share)
    # Pairs without an expert were sorted behind all others.
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
    """Experts' outputs <float>[slots, out]."""
    given = sorted_experts.Rows(plan.group_sizes, plan.pairs)
    return sorted_experts.by_expert(
      rows, kernels, None, given, keep, expert, _share(plan)
    )

  def compute_tokens(self, tokens, weights, kernels, plan, keep, expert):
    """The same, see Dispatch; no copies of tokens are kept for the gradient."""
    read = sorted_experts.Rows(plan.group_sizes, plan.pairs, plan)
    return sorted_experts.by_expert(
      tokens, kernels, weights, read, keep, expert, _share(plan)
    )

  def without_drops(self) -> 'DroplessDispatch':
    """The same with room for all."""
    return DroplessDispatch()

  def across(self, num_shards: int) -> dropless_exchange.DroplessExchange:
    """The same with experts on several devices."""
    return dropless_exchange.DroplessExchange(num_shards, self.buffer_factor)


def _share(plan):
  return sorted_experts.batched_share(
    plan.slots_of_pairs.size, plan.group_sizes.size
  )
