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
  """Kernels of all experts of a MoeLayer, under flaxformer's names.

  Attributes:
    num_experts: number of experts, the first axis of every kernel.
    embed_dim: width of the model.
    expert_dim: number of hidden units of one expert.
    activations: names of the activations, as in DenseFeedForward.
    initialization: draws the kernels.
    use_bias: whether the hidden units of each expert have biases.
    output_bias: whether the outputs of each expert have a bias.

  Call: returns a dict with `wi`, or `wi_0` and `wi_1` if gated,
    <float32>[expert, embed, expert_mlp], and `wo` <float32>[expert, expert_mlp,
    embed]. With `use_bias` it also has `wi_bias` (or `wi_0_bias` and
    `wi_1_bias`) <float32>[expert, expert_mlp], with `output_bias` also
    `wo_bias` <float32>[expert, embed].
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

  The layer sows its `router_losses.RouterStats` under the name `stats` into the
  collection `router_stats`.

  Attributes:
    num_experts: number of experts of the layer.
    expert_dim: number of hidden units of one expert.
    activations: names of the activations, as in DenseFeedForward.
    logits: forms the logits of a learned router: LinearLogits, or MlpLogits or
      CentroidLogits of `module_router`.
    routing: the router, such as TokensChoose, ExpertsChoose or HashRouter.
    dispatch: gives choices slots: DroplessDispatch or CapacityDispatch.
    groups: divides the tokens into groups that are routed together.
    losses: forms the sums from which the router's losses are computed.
    initialization: draws the kernels, such as DenseInit or SigmaInit.
    use_bias: whether each expert has a bias before its activation. Unless
      `expert_output_bias` is set, one bias is also added to all outputs of the
      layer, including those of padding.
    expert_output_bias: whether each expert has a bias of its own after its last
      kernel. The bias is multiplied by the gate, as the output is.
    shared_expert_dim: number of hidden units of `shared_expert`, a dense
      feed-forward that every token meets in addition; 0 is no such layer.
    dropout_rate: dropout probability of the hidden units.
    expert_dropout_rate: dropout probability of the experts' hidden units; None
      if it is `dropout_rate`.
    dtype: dtype in which the experts compute; the router computes in float32.

  Call: tokens <float>[batch, length, embed] and routing_ids
    <int32>[batch, length] or None, to <dtype>[batch, length, embed]. A negative
    id marks padding, which gets zero from the experts and is not routed unless
    `routing` routes padding. Without ids all tokens are real. Only hash routers
    read the ids that are not negative.

  Raises:
    ValueError: parts cannot work together, or ids have another shape than the
      tokens.
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
        'num_experts and expert_dim must be positive, but they are '
        f'{self.num_experts} and {self.expert_dim}. Set both to at least 1, or '
        'use DenseFeedForward for a layer without experts.'
      )
    self.routing.check(self.num_experts)
    self.dispatch.check(self.routing, self.groups)
    super().__post_init__()

  # Token ids can serve as routing ids: learned routers only look for padding in
  # them, and hash routers hash them.
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
      # Tokens of a group compete for experts. Outside of training each sequence
      # is a group, so that no answer depends on its neighbours in the batch.
      groups = groups.single()
    # 1. Tokens are put into groups: [batch, length, embed] -> [groups, tokens,
    # embed].
    is_valid, ids = _validity(groups, tokens, routing_ids)
    grouped = groups.split(tokens, 0)
    # 2. The router scores every expert for every token. Everything random
    # (jitter, excluded experts, dropout) is drawn here for all devices at once,
    # so that it does not depend on the mesh.
    scores = self._scores(grouped, deterministic)
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
    # 3. Each device routes its groups (`_stage`). Tokens travel to the devices
    # of their experts, are computed there, and travel back.
    results = expert_parallel.run(
      functools.partial(self._stage, not deterministic),
      groups={
        'tokens': grouped.astype(self.dtype),
        'is_valid': is_valid,
        'routing_ids': ids,
        'logits': scores.logits,
        'excluded': scores.excluded,
      },
      kernels=kernels,
      shared={
        'selection_bias': scores.bias,
        'dropout': self._dropout(deterministic, num_pairs, length),
      },
    )
    # 4. Tokens return to their places, and what all tokens share is added.
    outputs = groups.merge(results.outputs, batch, length)
    mixture.sow(self, results.sums)
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
    """Routes and computes the groups of one device.

    Args:
      training: whether to route and drop as in training.
      tokens: <dtype>[groups, tokens, embed], the groups of this device.
      kernels: this device's part of the kernels, by name.
      dropout: an ExpertDropout, or None.
      **asked: the fields of `router_base.RouterInputs`.

    Returns:
      StageResults with outputs <dtype>[groups, tokens, embed] and with the
      RouterStats of these groups as its sums.
    """
    parts = mixture.Mixture(
      self.num_experts,
      self.routing,
      mixture.dispatch_here(self.dispatch, training),
      self.losses,
      training,
    )
    decision, stats = parts.decide(router_base.RouterInputs(**asked))
    # [groups, tokens, embed] -> [tokens, embed]: a plan counts tokens over all
    # groups.
    flat = tokens.reshape(-1, tokens.shape[-1])
    outputs = parts.transform(
      flat,
      kernels,
      decision,
      experts.ExpertFeedForward(tuple(self.activations)),
      dropout,
    )
    return expert_parallel.StageResults(
      outputs=outputs.reshape(tokens.shape), sums=stats
    )

  def _scores(self, tokens, deterministic):
    if not self.routing.is_learned:
      return router_base.RouterScores()
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
  """Returns which tokens are routed, and the routing ids of all of them.

  Both are [groups, tokens], <bool> and <int32>; the ids may be None.
  """
  if routing_ids is None:
    real = jnp.ones(tokens.shape[:2], bool)
    # Groups may be filled up with rows that are not in the batch.
    return groups.split(real, groups.routes_filling), None
  if routing_ids.shape != tokens.shape[:2]:
    raise ValueError(
      'routing_ids must have the [batch, length] shape of tokens, '
      f'{tokens.shape[:2]}, but they have {routing_ids.shape}. Give the ids of '
      'the same tokens, with -1 for padding.'
    )
  ids = groups.split(routing_ids, -1)
  return ids >= 0, ids
