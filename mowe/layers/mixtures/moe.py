"""Mixture of experts: a router decides, a dispatch moves, experts compute."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from mowe.layers import feed_forward, feed_forward_base
from mowe.layers.dispatch import (
  dispatch_base,
  dropless_dispatch,
  expert_dropout,
  expert_parallel,
  token_groups,
)
from mowe.layers.mixtures import experts, initial_experts, mixture
from mowe.layers.routers import router_base, router_losses, tokens_choose


class ExpertKernels(nn.Module):
  """Kernels of all experts, under flaxformer's names.

  Attributes:
    num_experts: first axis of every kernel.
    embed_dim: width of the model.
    expert_dim: hidden units of one expert.
    activations: as in the dense feed-forward.
    initialization: draws them.
    use_bias: with biases of the hidden units.
    output_bias: with biases of the outputs.

  Call: a dict of <float32>[expert, embed, expert_dim] (`wi_0`, `wi_1`, or
    `wi`), <float32>[expert, expert_dim, embed] (`wo`) and perhaps
    <float32>[expert, expert_dim] (`wi_bias` and so on) and <float32>[expert,
    embed] (`wo_bias`).
  """

  num_experts: int
  embed_dim: int
  expert_dim: int
  activations: tuple[str, ...]
  initialization: initial_experts.Initialization = initial_experts.DenseInit()
  use_bias: bool = False
  output_bias: bool = False

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    inner = (self.num_experts, self.embed_dim, self.expert_dim)
    outer = (self.num_experts, self.expert_dim, self.embed_dim)
    arrays = {}
    for name in feed_forward.kernel_names(self.activations):
      arrays[name], bias = mixture.Kernel(
        inner,
        ('expert', 'embed', 'expert_mlp'),
        self.initialization.inner(inner),
        self.use_bias,
        name=name,
      )()
      if self.use_bias:
        arrays[feed_forward.bias_name(name)] = bias
    arrays['wo'], bias = mixture.Kernel(
      outer,
      ('expert', 'expert_mlp', 'embed'),
      self.initialization.outer(outer),
      self.output_bias,
      name='wo',
    )()
    if self.output_bias:
      arrays[feed_forward.bias_name('wo')] = bias
    return arrays


class MoeLayer(feed_forward_base.FeedForward):
  """Feed-forward of many experts, of which each token meets a few.

  Sows `router_losses.RouterStats` as `stats` into the collection
  `router_stats`.

  Attributes:
    num_experts: experts of this layer.
    expert_dim: hidden units of one expert.
    activations: as in the dense feed-forward.
    logits: how the logits of a learned router are formed: LinearLogits, or
      MlpLogits or CentroidLogits of `module_router`.
    routing: the router: TokensChoose, ExpertsChoose, HashRouter, ...
    dispatch: DroplessDispatch or CapacityDispatch.
    groups: tokens that are routed together.
    losses: how the router's losses are formed.
    initialization: draws the kernels: DenseInit, SigmaInit, ...
    use_bias: experts have a bias before the activation, and all of them
      together one after it; padding gets that one as well.
    expert_output_bias: the bias after an expert is its own instead, weighted as
      its output is.
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
  logits: router_base.Logits = router_base.LinearLogits()
  routing: router_base.Router = tokens_choose.TokensChoose()
  dispatch: dispatch_base.Dispatch = dropless_dispatch.DroplessDispatch()
  groups: token_groups.Groups = token_groups.TokenGroups()
  losses: router_losses.RouterLosses = router_losses.RouterLosses()
  initialization: initial_experts.Initialization = initial_experts.DenseInit()
  use_bias: bool = False
  expert_output_bias: bool = False
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
    self.dispatch.check(self.routing, self.groups)
    super().__post_init__()

  # Without a routing vocabulary, ids of tokens will do: learned routers look
  # only for padding.
  reads_token_ids = True

  def kind(self) -> str:
    return f'a MoeLayer with {self.routing}'

  @property
  def looks_ahead(self) -> bool:
    """See `feed_forward_base.FeedForward`."""
    return self.routing.looks_ahead

  def check_mesh(
    self, mesh_shape: Mapping[str, int], batch: int, length: int
  ) -> None:
    if mesh_shape[expert_parallel.EXPERT_AXIS] > 1:
      expert_parallel.check_sizes(
        mesh_shape,
        self.groups.num_groups(batch, length),
        self.num_experts,
        self.expert_dim,
      )

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    batch, length, embed_dim = tokens.shape
    groups = self.groups
    if deterministic and not self.routing.each_token_chooses:
      # An answer must not depend on its neighbours in the batch.
      groups = groups.single()
    is_valid, ids = _validity(groups, tokens, routing_ids)
    grouped = groups.split(tokens, 0)
    logits, bias, excluded = self._logits(grouped, deterministic)
    kernels = ExpertKernels(
      self.num_experts,
      embed_dim,
      self.expert_dim,
      self.activations,
      self.initialization,
      self.use_bias,
      self.expert_output_bias,
      name='expert',
    )()
    kernels = {name: w.astype(self.dtype) for name, w in kernels.items()}
    num_pairs = grouped.shape[0] * self.routing.num_pairs(
      grouped.shape[1], self.num_experts
    )
    outputs, _, _, stats = expert_parallel.run(
      functools.partial(self._stage, not deterministic),
      groups={
        'tokens': grouped.astype(self.dtype),
        'is_valid': is_valid,
        'routing_ids': ids,
        'logits': logits,
        'excluded': excluded,
      },
      kernels=kernels,
      shared={
        'selection_bias': bias,
        'dropout': self._dropout(deterministic, num_pairs, length),
      },
    )
    outputs = groups.merge(outputs, batch, length)
    mixture.sow(self, stats)
    if self.use_bias and not self.expert_output_bias:
      outputs += self._output_bias(embed_dim)[None, None, :]
    if self.shared_expert_dim:
      outputs += feed_forward.DenseFeedForward(
        self.shared_expert_dim,
        self.activations,
        self.dropout_rate,
        self.dtype,
        name='shared_expert',
      )(tokens, deterministic=deterministic)
    return outputs

  @nn.nowrap
  def _stage(self, training, *, tokens, kernels, dropout, **asked):
    """Outputs of the experts for this device's groups, and what was counted."""
    parts = mixture.Mixture(
      self.num_experts,
      self.routing,
      mixture.dispatch_here(self.dispatch, training),
      self.losses,
      training,
    )
    decision, stats = parts.decide(router_base.RouterInputs(**asked))
    flat = tokens.reshape(-1, tokens.shape[-1])
    outputs = parts.transform(
      flat,
      kernels,
      decision,
      experts.FeedForward(tuple(self.activations)),
      dropout,
    )
    return expert_parallel.Stage(
      outputs=outputs.reshape(tokens.shape), sums=stats
    )

  def _logits(self, tokens, deterministic):
    if not self.routing.is_learned:
      return None, None, None
    return router_base.LearnedRouting(
      self.routing,
      self.num_experts,
      self.initialization.router(tokens.shape[-1]),
      self.logits,
      name='router',
    )(tokens, deterministic=deterministic)

  def _dropout(self, deterministic, num_pairs, length):
    rate = self.expert_dropout_rate
    rate = self.dropout_rate if rate is None else rate
    if deterministic or not rate:
      return None
    return expert_dropout.ExpertDropout.draw(
      self.make_rng('dropout'), rate, num_pairs, length, self.expert_dim
    )

  def _output_bias(self, embed_dim):
    zeros = nn.initializers.zeros
    bias = partitioning.param_with_axes(
      'bias', zeros, (embed_dim,), jnp.float32, axes=('embed',)
    )
    return bias.astype(self.dtype)


def _validity(groups, tokens, routing_ids):
  """Which tokens are real, and the ids of all, both [groups, tokens]."""
  if routing_ids is None:
    real = jnp.ones(tokens.shape[:2], bool)
    return groups.split(real, groups.routes_filling), None
  if routing_ids.shape != tokens.shape[:2]:
    raise ValueError(
      'routing_ids must have the [batch, length] shape of tokens, '
      f'{tokens.shape[:2]}, but has {routing_ids.shape}. Give the ids of the '
      'same tokens, -1 for padding.'
    )
  ids = groups.split(routing_ids, -1)
  return ids >= 0, ids
