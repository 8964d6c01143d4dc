"""What all dispatches share."""

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

  A dispatch may drop pairs in training, where that bounds memory and
  communication. Evaluation and generation use `without_drops`: which pairs are
  dropped depends on the other rows of the batch, and an answer must not.
  """

  @abc.abstractmethod
  def plan(
    self,
    choices: router_base.Choices,
    router: router_base.Router,
    *,
    num_experts: int,
  ) -> slots.SlotPlan:
    """Slots for the choices of all groups; see `slots.SlotPlan`."""

  @abc.abstractmethod
  def compute(
    self,
    rows: jax.Array,
    kernels: sorted_experts.Arrays,
    plan: slots.SlotPlan,
    keep: expert_dropout.ExpertDropout | None,
    expert: sorted_experts.Expert,
  ) -> jax.Array:
    """Experts' outputs <float>[slots, out] for rows <float>[slots, in]."""

  @abc.abstractmethod
  def check(
    self, router: router_base.Router, groups: token_groups.Groups
  ) -> None:
    """Raises ValueError if this dispatch cannot serve a router and groups."""

  @abc.abstractmethod
  def across(self, num_shards: int) -> 'Dispatch':
    """Returns the dispatch that does the same with experts on several devices.

    Args:
      num_shards: the number of devices that share the experts.
    """

  @abc.abstractmethod
  def without_drops(self) -> 'Dispatch':
    """The dispatch that takes this one's place outside of training.

    Nothing that it drops may depend on another row of the batch.
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
    """The same for tokens <float>[tokens, in], outputs times their weights.

    `weights` are <float32>[slots].
    """
    rows = slots.to_slots(tokens, plan)
    outputs = self.compute(rows, kernels, plan, keep, expert)
    return (outputs * weights[:, None]).astype(outputs.dtype)
