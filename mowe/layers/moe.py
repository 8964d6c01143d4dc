"""Mixture of experts: a router decides, a dispatch moves, experts compute."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from mowe.layers import (
  dropless_dispatch,
  expert_dropout,
  expert_parallel,
  feed_forward,
  initial_experts,
  parameter,
  router_losses,
  routing,
  slots,
  token_groups,
  tokens_choose,
)


def mix(
  *,
  tokens: jax.Array,
  is_valid: jax.Array,
  ids: jax.Array | None,
  logits: jax.Array | None,
  bias: jax.Array | None,
  excluded: jax.Array | None,
  dropout: expert_dropout.ExpertDropout | None,
  kernels: dict[str, jax.Array],
  num_experts: int,
  router: routing.Router,
  dispatch: Any,
  losses: router_losses.RouterLosses,
  activations: tuple[str, ...],
  training: bool,
) -> tuple[jax.Array, router_losses.RouterStats]:
  """Outputs of the experts for groups of tokens, and what was counted.

  Args:
    tokens: <float>[groups, tokens, embed].
    is_valid: <bool>[groups, tokens], False for padding.
    ids: <int32>[groups, tokens], or None.
    logits: <float32>[groups, tokens, experts]; None if nothing is learned.
    bias: <float32>[experts] for the selection of experts, or None.
    excluded: <bool>[groups, tokens, experts] that no token may have, or None.
    dropout: of hidden units, or None.
    kernels: as ExpertKernels gives them, or this device's part of them.
    num_experts: of all devices.
    router: decides.
    dispatch: gives slots, and has them computed.
    losses: how the router's losses are formed.
    activations: as in the dense feed-forward.
    training: how the router decides, and which capacity there is.
  """
  choices = router(
    logits,
    num_experts=num_experts,
    is_valid=is_valid,
    routing_ids=ids,
    selection_bias=bias,
    excluded=excluded,
    training=training,
  )
  plan = dispatch.plan(
    choices, router, num_experts=num_experts, training=training
  )
  flat = tokens.reshape(-1, tokens.shape[-1])
  rows = dispatch.compute(
    slots.to_slots(flat, plan), kernels, plan, dropout, activations
  )
  weights = slots.permute(
    choices.weights.reshape(-1), plan.pairs, plan.slots_of_pairs
  )
  rows = (rows * weights[:, None]).astype(tokens.dtype)
  outputs = slots.to_tokens(rows, plan).reshape(tokens.shape)
  stats = router_losses.measure(
    logits,
    choices,
    plan,
    router=router,
    router_losses=losses,
    is_valid=is_valid,
  )
  return outputs, stats


class ExpertKernels(nn.Module):
  """Kernels of all experts, under flaxformer's names.

  Attributes:
    num_experts: first axis of every kernel.
    embed_dim: width of the model.
    expert_dim: hidden units of one expert.
    activations: as in the dense feed-forward.
    initialization: draws them.
    use_bias: with biases of the hidden units.

  Call: a dict of <float32>[expert, embed, expert_dim] (`wi_0`, `wi_1`, or
    `wi`), <float32>[expert, expert_dim, embed] (`wo`) and perhaps
    <float32>[expert, expert_dim] (`wi_bias` and so on).
  """

  num_experts: int
  embed_dim: int
  expert_dim: int
  activations: tuple[str, ...]
  initialization: Any = initial_experts.DenseInit()
  use_bias: bool = False

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    inner = (self.num_experts, self.embed_dim, self.expert_dim)
    outer = (self.num_experts, self.expert_dim, self.embed_dim)
    arrays = {}
    for name in feed_forward.kernel_names(self.activations):
      arrays[name], bias = _Projection(
        inner,
        ('expert', 'embed', 'expert_mlp'),
        self.initialization.inner(inner),
        self.use_bias,
        name=name,
      )()
      if self.use_bias:
        arrays[feed_forward.bias_name(name)] = bias
    arrays['wo'], _ = _Projection(
      outer,
      ('expert', 'expert_mlp', 'embed'),
      self.initialization.outer(outer),
      name='wo',
    )()
    return arrays


class _Projection(nn.Module):
  """A module of its own for the name, `wi_0/kernel`, as in a dense layer."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  kernel_init: parameter.Initializer
  use_bias: bool = False

  @nn.compact
  def __call__(self):
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


class MoeLayer(nn.Module):
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
  # Before the field that has the module's name.
  logits: Any = routing.LinearLogits()
  routing: Any = tokens_choose.TokensChoose()
  dispatch: Any = dropless_dispatch.DroplessDispatch()
  groups: Any = token_groups.TokenGroups()
  losses: Any = router_losses.RouterLosses()
  initialization: Any = initial_experts.DenseInit()
  use_bias: bool = False
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

  def check_mesh(
    self, mesh_shape: Mapping[str, int], batch: int, length: int
  ) -> None:
    """Raises ValueError if [batch, length] tokens cannot go over the mesh."""
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
    is_valid, ids = self._validity(tokens, routing_ids)
    grouped = self.groups.split(tokens, 0)
    logits, bias, excluded = self._logits(grouped, deterministic)
    kernels = ExpertKernels(
      self.num_experts,
      embed_dim,
      self.expert_dim,
      self.activations,
      self.initialization,
      self.use_bias,
      name='expert',
    )()
    kernels = {name: w.astype(self.dtype) for name, w in kernels.items()}
    num_shards = expert_parallel.num_shards()
    mixture = functools.partial(
      mix,
      num_experts=self.num_experts,
      router=self.routing,
      dispatch=(
        self.dispatch if num_shards == 1 else self.dispatch.across(num_shards)
      ),
      losses=self.losses,
      activations=self.activations,
      training=not deterministic,
    )
    groups = {
      'tokens': grouped.astype(self.dtype),
      'is_valid': is_valid,
      'ids': ids,
      'logits': logits,
      'excluded': excluded,
    }
    num_pairs = grouped.shape[0] * self.routing.num_pairs(
      grouped.shape[1], self.num_experts
    )
    shared = {
      'bias': bias,
      'dropout': self._dropout(deterministic, num_pairs, length),
    }
    if num_shards == 1:
      outputs, stats = mixture(**groups, kernels=kernels, **shared)
    else:
      outputs, stats = expert_parallel.shard(
        mixture, groups=groups, kernels=kernels, shared=shared
      )
    outputs = self.groups.merge(outputs, batch, length)
    self._sow(stats)
    if self.use_bias:
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

  def _logits(self, tokens, deterministic):
    if not self.routing.is_learned:
      return None, None, None
    return routing.LearnedRouting(
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

  def _sow(self, stats):
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
