"""Mixture of attention heads: modules of queries and outputs, shared memory.

A router gives each token k of many modules. Each has a query and an output
projection of its own; keys and values are those of the layer. Deciding, moving
and counting are those of MoeLayer (`mixture.py`); both projections move tokens
by the same plan.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import linear, parameter
from mowe.layers.attention import (
  inner_attention,
  multi_head,
  self_attention,
  stick_breaking,
)
from mowe.layers.dispatch import (
  dispatch_base,
  dropless_dispatch,
  expert_parallel,
  slots,
  token_groups,
)
from mowe.layers.mixtures import experts, initial_experts, mixture
from mowe.layers.routers import router_base, router_losses, tokens_choose


class ModuleKernels(nn.Module):
  """Query and output kernels of all modules.

  Attributes:
    num_experts: first axis of both kernels.
    embed_dim: width of the model.
    joined_dim: width of all heads of one module.
    initialization: draws them.

  Call: `query` <float32>[expert, embed, joined_kv] and `out`
    <float32>[expert, joined_kv, embed].
  """

  num_experts: int
  embed_dim: int
  joined_dim: int
  initialization: initial_experts.Initialization

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    inner = (self.num_experts, self.embed_dim, self.joined_dim)
    outer = (self.num_experts, self.joined_dim, self.embed_dim)
    query, _ = mixture.Kernel(
      inner,
      ('expert', 'embed', 'joined_kv'),
      self.initialization.inner(inner),
      name='query',
    )()
    out, _ = mixture.Kernel(
      outer,
      ('expert', 'joined_kv', 'embed'),
      self.initialization.outer(outer),
      name='out',
    )()
    return query, out


class MixtureOfAttentionHeads(multi_head.MultiHeadAttention):
  """Attention of many modules, of which each query meets a few.

  Sows `router_losses.RouterStats` as `stats` into the collection
  `router_stats`. A query that sees no key is padding: it is not routed and gets
  zero.

  Source: ModuleFormer, arXiv 2306.04640; MoA, arXiv 2210.05144. Weights are not
  renormalised unless `routing` does so.

  Attributes:
    num_heads: heads of one module.
    head_dim: size of one head.
    dropout_rate: of the attention's weights, if `inner` has dropout.
    num_experts: modules of this layer.
    logits: how the router's logits are formed, as in MoeLayer.
    routing: the router: a TokensChoose.
    dispatch: DroplessDispatch or CapacityDispatch.
    groups: tokens that are routed together.
    losses: how the router's losses are formed.
    initialization: draws the kernels of modules.
    inner: attention in a module: Softmax, StickBreaking or NearestFirst of
      `inner_attention`.
    use_bias: keys and values have biases, as in ModuleFormer.
    identity_memory: the layer's inputs are keys and values as they are, as in
      MoLM; for one head as wide as the model.
    routes_padding: padding is routed and counted as other tokens are, as in
      ModuleFormer's code.
    dtype: dtype of the computation; the router's is float32.

  Call: as MultiHeadAttention.

  Raises:
    ValueError: parts that cannot work together.
  """

  num_experts: int = 16
  logits: router_base.Logits = router_base.LinearLogits()
  routing: router_base.Router = tokens_choose.TokensChoose(2)
  dispatch: dispatch_base.Dispatch = dropless_dispatch.DroplessDispatch()
  groups: token_groups.Groups = token_groups.TokenGroups()
  losses: router_losses.RouterLosses = router_losses.RouterLosses()
  initialization: initial_experts.Initialization = initial_experts.DenseInit()
  inner: inner_attention.InnerAttention = inner_attention.Softmax()
  use_bias: bool = False
  identity_memory: bool = False
  routes_padding: bool = False

  def __post_init__(self):
    if not (self.routing.is_learned and self.routing.each_token_chooses):
      raise ValueError(
        'Every query must choose modules by what it is, so routing of a mixture '
        f'of heads must be a TokensChoose, but is {self.routing}. Use '
        'TokensChoose(2).'
      )
    if self.num_experts < 1:
      raise ValueError(
        f'num_experts must be positive, but is {self.num_experts}. It is the '
        'number of modules; MoLM has 16.'
      )
    self.routing.check(self.num_experts)
    self.dispatch.check(self.routing, self.groups)
    if self.identity_memory and self.num_heads != 1:
      raise ValueError(
        'With identity_memory the tokens are keys and values as they are, so '
        f'num_heads must be 1, but is {self.num_heads}. Use one head as wide as '
        'the model, or leave identity_memory out.'
      )
    super().__post_init__()

  @property
  def looks_ahead(self) -> bool:
    """See `attention_base.Attention`."""
    return self.routing.looks_ahead

  @property
  def looks_back_only(self) -> bool:
    """See `attention_base.Attention`."""
    return self.inner.looks_back_only

  @property
  def needs_all_queries(self) -> bool:
    """See `attention_base.Attention`."""
    return self.inner.needs_all_queries

  def kind(self) -> str:
    return f'a mixture of heads with {self.routing} and {self.inner}'

  def check_width(self, embed_dim: int) -> None:
    if self.identity_memory and self.head_dim != embed_dim:
      raise ValueError(
        'With identity_memory the tokens are keys and values as they are, so '
        f'head_dim must be the width of the model, {embed_dim}, but is '
        f'{self.head_dim}. Make them equal, or leave identity_memory out.'
      )

  def check_mesh(
    self, mesh_shape: Mapping[str, int], batch: int, length: int
  ) -> None:
    if mesh_shape[expert_parallel.EXPERT_AXIS] > 1:
      expert_parallel.check_sizes(
        mesh_shape,
        self.groups.num_groups(batch, length),
        self.num_experts,
        self.num_heads * self.head_dim,
        names=('num_experts', 'num_heads * head_dim'),
      )

  def setup(self):
    self.weights_dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))
    if self.identity_memory:
      return
    joined = self.num_heads * self.head_dim
    project = lambda: linear.Dense(
      joined, ('embed', 'joined_kv'), linear.attention_init, self.dtype
    )
    self.key, self.value = project(), project()
    if self.use_bias:
      declare = lambda name: parameter.declare(
        self, name, nn.initializers.zeros, (joined,), axes=('joined_kv',)
      )
      self.key_bias, self.value_bias = (
        declare('key_bias'),
        declare('value_bias'),
      )

  def project_memory(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values <dtype>[batch, key, heads, kv] of a memory."""
    if self.identity_memory:
      self.check_width(memory.shape[-1])
      heads = self._split_heads(memory.astype(self.dtype))
      return heads, heads
    keys, values = self.key(memory), self.value(memory)
    if self.use_bias:
      keys += self.key_bias.astype(self.dtype)[None, None]
      values += self.value_bias.astype(self.dtype)[None, None]
    return self._split_heads(keys), self._split_heads(values)

  def attend(
    self,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    num_visible: Any = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """Attention of `queries` to projected keys and values.

    Args:
      queries: <float>[batch, query, embed].
      keys: <dtype>[batch, key, heads, kv].
      values: <dtype>[batch, key, heads, kv].
      bias: <float>[1, heads, query, key] or None.
      mask: <bool>[batch or 1, 1, query or 1, key], or None.
      num_visible: see `InnerAttention`.
      deterministic: without dropout.
    """
    batch, length, _ = queries.shape
    if mask is None:
      mask = jnp.ones((1, 1, 1, keys.shape[1]), bool)
    asked, out = self._ask(
      queries, self._validity(mask, batch, length), deterministic
    )
    # [groups, tokens, ...] -> [batch, query, ...]
    asked_heads = self._split_heads(
      self.groups.merge(asked.units, batch, length)
    )
    attended = self.inner(
      asked_heads,
      keys,
      values,
      bias=bias,
      mask=mask,
      num_visible=num_visible,
      dropout=lambda weights: self.weights_dropout(
        weights, deterministic=deterministic
      ),
    )
    # [batch, query, groups, heads, kv] -> [batch, query, groups, joined_kv]
    joined = attended.reshape(*attended.shape[:3], -1)
    outputs = expert_parallel.run(
      functools.partial(self._answer, not deterministic),
      units={'attended': self.groups.split(joined, 0)},
      own={'decision': asked.own},
      kernels={'out': out},
    ).outputs
    return self.groups.merge(outputs, batch, length)

  @nn.compact
  def _ask(self, tokens, is_valid, deterministic):
    """The queries of all tokens, and the kernels for what they will find."""
    embed_dim = tokens.shape[-1]
    grouped = self.groups.split(tokens, 0)
    logits, bias, excluded = router_base.LearnedRouting(
      self.routing,
      self.num_experts,
      self.initialization.router(embed_dim),
      self.logits,
      name='router',
    )(grouped, deterministic=deterministic)
    query, out = ModuleKernels(
      self.num_experts,
      embed_dim,
      self.num_heads * self.head_dim,
      self.initialization,
      name='expert',
    )()
    asked = expert_parallel.run(
      functools.partial(self._queries, not deterministic),
      groups={
        'tokens': grouped.astype(self.dtype),
        'is_valid': is_valid,
        'logits': logits,
        'excluded': excluded,
      },
      kernels={'query': query.astype(self.dtype)},
      shared={'selection_bias': bias},
    )
    mixture.sow(self, asked.sums)
    return asked, out.astype(self.dtype)

  @nn.nowrap
  def _queries(self, training, *, tokens, kernels, **asked):
    """Queries of this device's groups, by the modules that tokens chose."""
    parts = self._parts(training)
    decision, stats = parts.decide(router_base.RouterInputs(**asked))
    flat = tokens.reshape(-1, tokens.shape[-1])
    rows = parts.compute(
      slots.to_slots(flat, decision.plan), kernels, decision, experts.project
    )
    units = slots.to_choices(rows, decision.plan)
    return expert_parallel.Stage(
      # [tokens, selected, joined_kv] -> [groups, tokens, selected, joined_kv]
      units=units.reshape(*tokens.shape[:2], *units.shape[1:]),
      own=decision,
      sums=stats,
    )

  @nn.nowrap
  def _answer(self, training, *, attended, decision, kernels):
    """Outputs for this device's groups, from what each module has found."""
    flat = attended.reshape(-1, *attended.shape[2:])
    rows = self._parts(training).compute(
      slots.from_choices(flat, decision.plan),
      kernels,
      decision,
      experts.project,
    )
    outputs = mixture.add_up(rows, decision)
    return expert_parallel.Stage(
      outputs=outputs.reshape(*attended.shape[:2], -1)
    )

  @nn.nowrap
  def _parts(self, training):
    return mixture.Mixture(
      self.num_experts,
      self.routing,
      mixture.dispatch_here(self.dispatch, training),
      self.losses,
      training,
    )

  def _validity(self, mask, batch, length):
    """Which queries are routed, <bool>[groups, tokens]."""
    if self.routes_padding:
      real = jnp.ones((batch, length), bool)
      return self.groups.split(real, self.groups.routes_filling)
    sees = jnp.any(mask, axis=-1)[:, 0]
    return self.groups.split(jnp.broadcast_to(sees, (batch, length)), False)


class MixtureOfSelfAttentionHeads(
  MixtureOfAttentionHeads, self_attention.SelfAttention
):
  """The same as self-attention of a decoder-only model.

  Positions are told by the order of keys alone, so `inner` is StickBreaking by
  default.

  Call: as SelfAttention.
  """

  inner: inner_attention.InnerAttention = inner_attention.StickBreaking()

  def __call__(
    self,
    queries: jax.Array,
    memory: jax.Array,
    *,
    positions: self_attention.Positions,
    mask: jax.Array,
    decode: bool = False,
    deterministic: bool = True,
  ) -> jax.Array:
    keys, values = self.project_memory(memory)
    if decode:
      keys, values = self._append(keys, values)
    return self.attend(
      queries,
      keys,
      values,
      mask=mask,
      num_visible=stick_breaking.keys_behind(positions),
      deterministic=deterministic,
    )
