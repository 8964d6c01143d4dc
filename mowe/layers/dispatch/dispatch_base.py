"""The base class of all dispatches."""

import abc

import jax

from mowe.layers.dispatch import (
  expert_dropout,
  slots,
  sorted_experts,
  token_groups,
)
from mowe.layers.routers import router_base


class Dispatch(abc.ABC):
  """Gives pairs of a token and an expert slots, and has these computed.

  A dispatch may drop pairs in training, which bounds memory and communication.
  Which pairs are dropped depends on the other rows of the batch, and an answer
  must not depend on them. So evaluation and generation use `without_drops`.
  """

  @abc.abstractmethod
  def plan(
    self,
    choices: router_base.Choices,
    router: router_base.Router,
    *,
    num_experts: int,
  ) -> slots.SlotPlan:
    """Gives the choices of all groups slots.

    Args:
      choices: the choices of all groups, as the router answered.
      router: the router that made them.
      num_experts: number of experts on all devices together.

    Returns:
      The plan, which says which pair is computed in which slot.
    """

  @abc.abstractmethod
  def compute(
    self,
    rows: jax.Array,
    kernels: sorted_experts.Arrays,
    plan: slots.SlotPlan,
    keep: expert_dropout.ExpertDropout | None,
    expert: sorted_experts.Expert,
  ) -> jax.Array:
    """Lets the experts compute the rows in all slots.

    Args:
      rows: <float>[slots, in], the inputs in their slots.
      kernels: arrays <float>[experts, ...] by name, for the experts of this
        device.
      plan: the plan that `plan` returned.
      keep: dropout of the experts' hidden units; None without dropout.
      expert: the computation of one expert.

    Returns:
      The experts' outputs <float>[slots, out].
    """

  @abc.abstractmethod
  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Raises ValueError if the dispatch cannot work with a router and groups.

    Args:
      router: the router of the layer.
      groups: how the layer groups tokens.
    """

  @abc.abstractmethod
  def across(self, num_shards: int) -> 'Dispatch':
    """Returns the dispatch that does the same with experts on several devices.

    Args:
      num_shards: number of devices that share the experts.
    """

  @abc.abstractmethod
  def without_drops(self) -> 'Dispatch':
    """Returns the dispatch that takes this one's place outside of training.

    It may drop pairs only if the drops do not depend on other rows of the
    batch.
    """

  def compute_tokens(
    self,
    tokens: jax.Array,
    weights: jax.Array,
    kernels: sorted_experts.Arrays,
    plan: slots.SlotPlan,
    keep: expert_dropout.ExpertDropout | None,
    expert: sorted_experts.Expert,
  ) -> jax.Array:
    """Lets the experts compute tokens, and multiplies by the gates.

    Args:
      tokens: <float>[tokens, in], counted over all groups.
      weights: <float32>[slots], the gate of the pair in each slot.
      kernels: arrays <float>[experts, ...] by name, for the experts of this
        device.
      plan: the plan that `plan` returned.
      keep: dropout of the experts' hidden units; None without dropout.
      expert: the computation of one expert.

    Returns:
      The experts' outputs times their gates, <float>[slots, out].
    """
    rows = slots.to_slots(tokens, plan)
    outputs = self.compute(rows, kernels, plan, keep, expert)
    return (outputs * weights[:, None]).astype(outputs.dtype)
