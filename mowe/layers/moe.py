"""Mixture of experts: a router decides, a dispatch moves, experts compute."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from mowe.layers import (
  dropless_dispatch,
  feed_forward,
  router_losses,
  routing,
  slots,
  token_groups,
  tokens_choose,
)


class ExpertKernels(nn.Module):
  """Kernels of all experts, under flaxformer's names.

  Attributes:
    num_experts: first axis of every kernel.
    embed_dim: width of the model.
    expert_dim: hidden units of one expert.
    activations: as in the dense feed-forward.

  Call: a dict of <float32>[expert, embed, expert_dim] (`wi_0`, `wi_1`, or
    `wi`) and <float32>[expert, expert_dim, embed] (`wo`).
  """

  num_experts: int
  embed_dim: int
  expert_dim: int
  activations: tuple[str, ...]

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    inner = (self.num_experts, self.embed_dim, self.expert_dim)
    outer = (self.num_experts, self.expert_dim, self.embed_dim)
    kernels = {
      name: _Kernel(inner, ('expert', 'embed', 'expert_mlp'), name=name)()
      for name in feed_forward.kernel_names(self.activations)
    }
    wo = _Kernel(outer, ('expert', 'expert_mlp', 'embed'), name='wo')
    return kernels | {'wo': wo()}


class _Kernel(nn.Module):
  """A module of its own for the name, `wi_0/kernel`, as in a dense layer."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]

  @nn.compact
  def __call__(self):
    # Every expert starts as a dense layer of its size would.
    init = nn.initializers.variance_scaling(
      1.0, 'fan_in', 'truncated_normal', batch_axis=(0,)
    )
    return partitioning.param_with_axes(
      'kernel', init, self.shape, jnp.float32, axes=self.axes
    )


class MoeLayer(nn.Module):
  """Feed-forward of many experts, of which each token meets a few.

  Sows `router_losses.RouterStats` as `stats` into the collection
  `router_stats`.

  Attributes:
    num_experts: experts of this layer.
    expert_dim: hidden units of one expert.
    activations: as in the dense feed-forward.
    routing: the router: TokensChoose, ExpertsChoose, HashRouter, ...
    dispatch: DroplessDispatch or CapacityDispatch.
    groups: tokens that are routed together.
    losses: how the router's losses are formed.
    shared_expert_dim: hidden units of a dense feed-forward, `shared_expert`,
      that every token meets besides; 0 has none.
    dropout_rate: dropout of the hidden units.
    expert_dropout_rate: that of the experts where it is another; None: it is
      the same.
    dtype: dtype of the experts' computation; the router's is float32.

  Call: tokens <float>[batch, length, embed] and routing_ids
    <int32>[batch, length] or None, to <dtype>[batch, length, embed]. A negative
    id marks padding, which is not routed and gets zero from the experts;
    without ids all tokens are real. Hash routers look at the other ids.

  Raises:
    ValueError: parts that cannot work together, or ids of another shape.
  """

  num_experts: int
  expert_dim: int
  activations: tuple[str, ...] = ('gelu', 'linear')
  routing: Any = tokens_choose.TokensChoose()
  dispatch: Any = dropless_dispatch.DroplessDispatch()
  groups: Any = token_groups.TokenGroups()
  losses: Any = router_losses.RouterLosses()
  shared_expert_dim: int = 0
  dropout_rate: float = 0.0
  expert_dropout_rate: float | None = None
  dtype: Any = jnp.float32

  def __post_init__(self):
    feed_forward.check_activations(tuple(self.activations))
    if self.num_experts < 1 or self.expert_dim < 1:
      raise ValueError(
        'num_experts and expert_dim must be positive, but are '
        f'{self.num_experts} and {self.expert_dim}. One expert is a dense '
        'feed-forward with a gate.'
      )
    self.routing.check(self.num_experts)
    self.dispatch.check(self.routing)
    super().__post_init__()

  # Without a routing vocabulary, ids of tokens will do: learned routers look
  # only for padding.
  reads_token_ids = True

  @property
  def looks_ahead(self) -> bool:
    """Whether a token's experts may depend on later tokens."""
    return self.routing.looks_ahead

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    batch, length, embed_dim = tokens.shape
    is_valid, ids = self._validity(tokens, routing_ids)
    grouped = self.groups.split(tokens, 0)
    logits, choices = self._choose(grouped, is_valid, ids, deterministic)
    plan = self.dispatch.plan(
      choices,
      self.routing,
      num_experts=self.num_experts,
      training=not deterministic,
    )
    flat = grouped.reshape(-1, embed_dim).astype(self.dtype)
    rows = self._experts(slots.to_slots(flat, plan), plan, deterministic)
    weights = slots.weights_of_slots(
      choices.weights.reshape(-1), plan.pairs, plan.slots_of_pairs
    )
    rows = (rows * weights[:, None]).astype(self.dtype)
    outputs = slots.to_tokens(rows, plan).reshape(grouped.shape)
    outputs = self.groups.merge(outputs, batch, length)
    self._sow(logits, choices, plan, is_valid)
    if self.shared_expert_dim:
      outputs += feed_forward.DenseFeedForward(
        self.shared_expert_dim,
        self.activations,
        self.dropout_rate,
        self.dtype,
        name='shared_expert',
      )(tokens, deterministic=deterministic)
    return outputs

  def _validity(self, tokens, routing_ids):
    if routing_ids is None:
      real = jnp.ones(tokens.shape[:2], bool)
      return self.groups.split(real, self.groups.routes_filling), None
    if routing_ids.shape != tokens.shape[:2]:
      raise ValueError(
        'routing_ids must have the [batch, length] shape of tokens, '
        f'{tokens.shape[:2]}, but has {routing_ids.shape}. Give the ids of the '
        'same tokens, -1 for padding.'
      )
    ids = self.groups.split(routing_ids, -1)
    return ids >= 0, ids

  def _choose(self, tokens, is_valid, ids, deterministic):
    if self.routing.is_learned:
      return routing.LearnedRouting(
        self.routing, self.num_experts, name='router'
      )(tokens, is_valid=is_valid, deterministic=deterministic)
    choices = self.routing(
      None, num_experts=self.num_experts, is_valid=is_valid, routing_ids=ids
    )
    return None, choices

  def _experts(self, rows, plan, deterministic):
    kernels = ExpertKernels(
      self.num_experts,
      rows.shape[-1],
      self.expert_dim,
      self.activations,
      name='expert',
    )()
    kernels = {name: w.astype(self.dtype) for name, w in kernels.items()}
    return self.dispatch.compute(
      rows, kernels, plan, self._keep(rows, deterministic), self.activations
    )

  def _keep(self, rows, deterministic):
    """What hidden units are multiplied with in dropout, or None."""
    rate = self.expert_dropout_rate
    rate = self.dropout_rate if rate is None else rate
    if deterministic or not rate:
      return None
    shape = (rows.shape[0], self.expert_dim)
    kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - rate, shape)
    return kept.astype(self.dtype) / (1 - rate)

  def _sow(self, logits, choices, plan, is_valid):
    stats = router_losses.measure(
      logits,
      choices,
      plan,
      router=self.routing,
      router_losses=self.losses,
      is_valid=is_valid,
    )
    self.sow(
      router_losses.COLLECTION,
      router_losses.NAME,
      stats,
      # A layer that is called twice has the sum of both.
      init_fn=lambda: None,
      reduce_fn=lambda old, new: (
        new if old is None else router_losses.add(old, new)
      ),
    )
