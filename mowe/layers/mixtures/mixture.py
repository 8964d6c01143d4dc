"""What all mixtures share: deciding, moving to experts and back, counting.

A layer with one stage, such as a feed-forward, decides, has its experts compute
and adds up. One with two, such as attention, passes its decision on: both
stages move rows by the same plan.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from mowe.layers import parameter
from mowe.layers.dispatch import (
  dispatch_base,
  expert_dropout,
  expert_parallel,
  slots,
  sorted_experts,
)
from mowe.layers.mixtures import router_statistics
from mowe.layers.routers import router_base, router_losses


class Decision(NamedTuple):
  """Which experts compute for which tokens.

  Attributes:
    plan: of the slots.
    weights: <float32>[slots], of each slot in the sum of its token.
  """

  plan: slots.SlotPlan
  weights: jax.Array


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Parts of a mixture.

  Attributes:
    num_experts: of all devices.
    router: decides.
    dispatch: gives slots, and has them computed; see `dispatch_here`.
    losses: how the router's losses are formed.
    training: whether the router decides as in training.
  """

  num_experts: int
  router: router_base.Router
  dispatch: dispatch_base.Dispatch
  losses: router_losses.RouterLosses
  training: bool

  def decide(
    self, inputs: router_base.RouterInputs
  ) -> tuple[Decision, router_losses.RouterStats]:
    """Returns the router's choices with their slots, and what was counted."""
    choices = self.router(
      inputs, num_experts=self.num_experts, training=self.training
    )
    plan = self.dispatch.plan(
      choices, self.router, num_experts=self.num_experts
    )
    weights = slots.permute(
      choices.weights.reshape(-1), plan.pairs, plan.slots_of_pairs
    )
    stats = router_statistics.measure(
      inputs.logits,
      choices,
      plan,
      router=self.router,
      losses=self.losses,
      is_valid=inputs.is_valid,
    )
    return Decision(plan, weights), stats

  def compute(
    self,
    rows: jax.Array,
    kernels: sorted_experts.Arrays,
    decision: Decision,
    expert: sorted_experts.Expert,
    dropout: expert_dropout.ExpertDropout | None = None,
  ) -> jax.Array:
    """Experts' outputs <float>[slots, out] for rows <float>[slots, in].

    Args:
      rows: in the slots of the decision.
      kernels: of all experts, or this device's part of them.
      decision: of this mixture.
      expert: what each of them does.
      dropout: of hidden units, or None.
    """
    return self.dispatch.compute(rows, kernels, decision.plan, dropout, expert)

  def transform(
    self,
    tokens: jax.Array,
    kernels: sorted_experts.Arrays,
    decision: Decision,
    expert: sorted_experts.Expert,
    dropout: expert_dropout.ExpertDropout | None = None,
  ) -> jax.Array:
    """Weighted sums <float>[tokens, out] of what experts make of their tokens.

    `tokens` are <float>[tokens, in]; see `compute` for the rest.
    """
    rows = self.dispatch.compute_tokens(
      tokens, decision.weights, kernels, decision.plan, dropout, expert
    )
    return slots.to_tokens(rows, decision.plan)


def dispatch_here(
  dispatch: dispatch_base.Dispatch, training: bool
) -> dispatch_base.Dispatch:
  """The dispatch for the devices of this trace; only training drops pairs."""
  if not training:
    dispatch = dispatch.without_drops()
  num_shards = expert_parallel.num_shards()
  return dispatch if num_shards == 1 else dispatch.across(num_shards)


def add_up(rows: jax.Array, decision: Decision) -> jax.Array:
  """Weighted sums <float>[tokens, out] of rows <float>[slots, out]."""
  weighted = (rows * decision.weights[:, None]).astype(rows.dtype)
  return slots.to_tokens(weighted, decision.plan)


class Kernel(nn.Module):
  """A module of its own for the name, `wi_0/kernel`, as in a dense layer.

  Attributes:
    shape: of the kernel; the first axis is that of the experts.
    axes: logical names.
    kernel_init: draws it.
    use_bias: with a bias for each expert and each unit of the last axis.

  Call: the kernel and the bias or None, <float32>.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  kernel_init: parameter.Initializer
  use_bias: bool = False

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array | None]:
    kernel = partitioning.param_with_axes(
      'kernel', self.kernel_init, self.shape, jnp.float32, axes=self.axes
    )
    if not self.use_bias:
      return kernel, None
    return kernel, partitioning.param_with_axes(
      'bias',
      nn.initializers.zeros,
      (self.shape[0], self.shape[2]),
      jnp.float32,
      axes=(self.axes[0], self.axes[2]),
    )


def sow(module: nn.Module, stats: router_losses.RouterStats) -> None:
  """Leaves the stats of one call where the trainer finds them."""
  module.sow(
    router_losses.COLLECTION,
    router_losses.NAME,
    stats,
    # A layer that is called twice has the sum of both.
    init_fn=lambda: None,
    reduce_fn=lambda old, new: (
      new if old is None else router_losses.add(old, new)
    ),
  )
