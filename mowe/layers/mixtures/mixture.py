"""The steps that all mixtures share: decide, move tokens, compute, count.

A feed-forward has one stage: it decides, lets the experts compute, and adds up
their outputs. A mixture of attention heads has two stages, one before the
attention and one after it. The first stage decides and hands its decision to
the second, so that both move rows by the same plan.
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
  """The decision which experts compute which tokens.

  Attributes:
    plan: the plan that says which token is in which slot.
    weights: <float32>[slots], the gate by which the output of each slot is
      multiplied before the outputs of a token are added up; 0 in empty slots.
  """

  plan: slots.SlotPlan
  weights: jax.Array


@dataclasses.dataclass(frozen=True)
class Mixture:
  """The parts of a mixture, put together for one call of its layer.

  Attributes:
    num_experts: number of experts on all devices together.
    router: chooses experts for tokens, or tokens for experts.
    dispatch: gives the choices slots and lets the experts compute these. It
      must be the one that `dispatch_here` returned.
    losses: forms the sums from which the router's losses are computed.
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
    """Asks the router, gives its choices slots, and counts them.

    Args:
      inputs: what the router decides from, for the groups of this device.

    Returns:
      The decision, and the sums that were counted over these groups.
    """
    choices = self.router(
      inputs, num_experts=self.num_experts, training=self.training
    )
    plan = self.dispatch.plan(
      choices, self.router, num_experts=self.num_experts
    )
    # [groups, pairs] -> [slots]. `permute` knows where each pair goes, so that
    # the gradient of the router's weights is a gather instead of a scatter.
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
    """Lets the experts compute rows that already lie in their slots.

    The outputs are not yet weighted; see `add_up`.

    Args:
      rows: <float>[slots, in], in the slots of the decision.
      kernels: arrays <float>[expert, ...] by name, for all experts or for this
        device's part of them.
      decision: the decision that `decide` returned.
      expert: the computation of one expert, such as `experts.project`.
      dropout: dropout of the experts' hidden units; None without dropout.

    Returns:
      <float>[slots, out].
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
    """Computes every token by its experts and adds up the weighted outputs.

    Args:
      tokens: <float>[tokens, in], the tokens of all groups of this device.
      kernels: arrays <float>[expert, ...] by name, for all experts or for this
        device's part of them.
      decision: the decision that `decide` returned.
      expert: the computation of one expert, as `experts.ExpertFeedForward`.
      dropout: dropout of the experts' hidden units; None without dropout.

    Returns:
      <float>[tokens, out], zero for a token without a slot.
    """
    # The dispatch moves the tokens and multiplies by the weights itself, so
    # that it can read tokens where it uses them, without copies in slots.
    rows = self.dispatch.compute_tokens(
      tokens, decision.weights, kernels, decision.plan, dropout, expert
    )
    return slots.to_tokens(rows, decision.plan)


def dispatch_here(
  dispatch: dispatch_base.Dispatch, training: bool
) -> dispatch_base.Dispatch:
  """Returns the form of a dispatch that this call of a layer needs.

  Outside of training it drops no choice, so that no answer depends on its
  neighbours in the batch. If the current mesh splits the experts, it exchanges
  rows between devices.

  Args:
    dispatch: the dispatch that was configured.
    training: whether the layer is called in training.
  """
  if not training:
    dispatch = dispatch.without_drops()
  num_shards = expert_parallel.num_shards()
  return dispatch if num_shards == 1 else dispatch.across(num_shards)


def add_up(rows: jax.Array, decision: Decision) -> jax.Array:
  """Multiplies outputs by their weights and adds up those of each token.

  Args:
    rows: <float>[slots, out], the outputs of the experts.
    decision: the decision by which they were computed.

  Returns:
    <float>[tokens, out], zero for a token without a slot.
  """
  weighted = (rows * decision.weights[:, None]).astype(rows.dtype)
  return slots.to_tokens(weighted, decision.plan)


class Kernel(nn.Module):
  """Declares one kernel of all experts, and perhaps its bias.

  It is a module of its own so that the parameter is called `wi_0/kernel`, as in
  a dense layer.

  Attributes:
    shape: shape of the kernel, (expert, in, out).
    axes: logical name of each axis of the kernel.
    kernel_init: draws the kernel.
    use_bias: whether there is a bias, which starts at zero.

  Call: returns the kernel <float32>[expert, in, out], and the bias
    <float32>[expert, out] or None.
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
  """Leaves the stats of one call in the collection that the trainer reads.

  Args:
    module: the layer that was called, in its bound form.
    stats: what was counted in this call.
  """
  module.sow(
    router_losses.COLLECTION,
    router_losses.NAME,
    stats,
    # If a layer is called twice in one pass, the stats of both calls are added.
    init_fn=lambda: None,
    reduce_fn=lambda old, new: (
      new if old is None else router_losses.add(old, new)
    ),
  )
