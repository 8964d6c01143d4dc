"""Mixture of attention heads: modules share keys and values.

A router chooses k of many modules for each token. A module has its own
projections of queries and of outputs; the keys and values belong to the layer
and are the same for all modules. The layer decides, moves and counts as
MoeLayer does (`mixture.py`), in two stages:

1. `_queries` routes the tokens and projects each one to the queries of its
   modules.
2. `_answer` projects what these queries have found to outputs, and adds up the
   outputs of each token.

Between the stages lies the attention (`inner`). The second stage uses the
decision of the first, so a token meets the same modules in both.
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
  """Query and output kernels of all modules of a layer.

  Attributes:
    num_experts: number of modules, the first axis of both kernels.
    embed_dim: width of the model.
    joined_dim: width of all heads of one module together.
    initialization: draws the kernels.

  Call: returns the kernel of the queries <float32>[expert, embed, joined_kv]
    and that of the outputs <float32>[expert, joined_kv, embed].
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

  The layer sows its `router_losses.RouterStats` under the name `stats` into the
  collection `router_stats`. A query that sees no key is taken for padding: it
  gets zero, and is not routed unless `routes_padding` is set.

  Source: ModuleFormer, arXiv 2306.04640; MoA, arXiv 2210.05144. The weights of
  a token are not renormalised unless `routing` does so.

  Attributes:
    num_heads: number of heads of one module.
    head_dim: size of one head.
    dropout_rate: dropout probability of the attention weights; it has no effect
      if `inner` has no dropout.
    num_experts: number of modules of the layer.
    logits: forms the router's logits: LinearLogits, or MlpLogits or
      CentroidLogits of `module_router`.
    routing: the router; each token must choose by learned logits, as in
      TokensChoose.
    dispatch: gives choices slots: DroplessDispatch or CapacityDispatch.
    groups: divides the queries into groups that are routed together.
    losses: forms the sums from which the router's losses are computed.
    initialization: draws the kernels of the modules.
    inner: the attention within a module: Softmax, StickBreaking or NearestFirst
      of `inner_attention`.
    use_bias: whether keys and values have biases, as in ModuleFormer.
    identity_memory: whether the inputs of the layer are its keys and values
      without a projection, as in MoLM. There must be one head, as wide as the
      model.
    routes_padding: whether padding is routed and counted as other tokens are,
      as in ModuleFormer's code.
    dtype: dtype of the computation; the router computes in float32.

  Call: queries <float>[batch, query, embed] and memory <float>[batch, key,
    embed] to <dtype>[batch, query, embed], as in MultiHeadAttention.

  Raises:
    ValueError: parts cannot work together.
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
        'Each query must choose its modules by learned logits, so routing of a '
        f'mixture of heads must be a TokensChoose, but is {self.routing}. Use '
        'TokensChoose(2).'
      )
    if self.num_experts < 1:
      raise ValueError(
        f'num_experts must be positive, but is {self.num_experts}. Set it to '
        'the number of modules; MoLM has 16.'
      )
    self.routing.check(self.num_experts)
    self.dispatch.check(self.routing, self.groups)
    if self.identity_memory and self.num_heads != 1:
      raise ValueError(
        'With identity_memory tokens are keys and values without a projection, '
        f'so num_heads must be 1, but is {self.num_heads}. Use one head as '
        'wide as the model, or leave identity_memory out.'
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
        'With identity_memory tokens are keys and values without a projection, '
        f'so head_dim must be the width of the model, {embed_dim}, but is '
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
    """Projects a memory to the keys and values of all modules.

    Args:
      memory: <float>[batch, key, embed].

    Returns:
      Keys and values, both <dtype>[batch, key, heads, kv].
    """
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
    """Routes queries to modules and lets these attend to keys and values.

    Args:
      queries: <float>[batch, query, embed], tokens that are not yet projected.
      keys: <dtype>[batch, key, heads, kv].
      values: <dtype>[batch, key, heads, kv].
      bias: <float>[1, heads, query, key], added to the logits of every module;
        or None.
      mask: <bool>[batch or 1, 1, query or 1, key], True where a query may see a
        key; None if every query sees all keys.
      num_visible: <int>[query] of numpy, or None; see `InnerAttention`.
      deterministic: whether to compute as outside of training, without dropout.

    Returns:
      <dtype>[batch, query, embed].
    """
    batch, length, _ = queries.shape
    if mask is None:
      mask = jnp.ones((1, 1, 1, keys.shape[1]), bool)
    asked, out = self._ask(
      queries, self._validity(mask, batch, length), deterministic
    )
    # The attention sees batches, not groups; its axis `groups` is that of the
    # selected modules.
    # [groups, tokens, selected, joined_kv] -> [batch, query, selected, heads,
    # kv]
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
    # [batch, query, selected, heads, kv] -> [batch, query, selected, joined_kv]
    joined = attended.reshape(*attended.shape[:3], -1)
    outputs = expert_parallel.run(
      functools.partial(self._answer, not deterministic),
      units={'attended': self.groups.split(joined, 0)},
      own={'decision': asked.own},
      kernels={'out': out},
    ).outputs
    return self.groups.merge(outputs, batch, length)

  # Compact, because the shapes of these parameters need the width of the model,
  # which `setup` does not know.
  @nn.compact
  def _ask(self, tokens, is_valid, deterministic):
    """Runs the first stage on all devices.

    Args:
      tokens: <float>[batch, query, embed].
      is_valid: <bool>[groups, tokens], which queries are routed.
      deterministic: whether to compute as outside of training.

    Returns:
      The StageResults of `_queries`, and the kernel of the outputs
      <dtype>[expert, joined_kv, embed], which the second stage needs.
    """
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
    """First stage: routes the groups of one device and projects their queries.

    Args:
      training: whether to route and drop as in training.
      tokens: <dtype>[groups, tokens, embed], the groups of this device.
      kernels: this device's part of the query kernels.
      **asked: the fields of `router_base.RouterInputs`.

    Returns:
      StageResults with the queries as units, the decision for the second stage
      as its own, and the RouterStats of these groups as its sums.
    """
    parts = self._parts(training)
    decision, stats = parts.decide(router_base.RouterInputs(**asked))
    flat = tokens.reshape(-1, tokens.shape[-1])
    rows = parts.compute(
      slots.to_slots(flat, decision.plan), kernels, decision, experts.project
    )
    # Queries leave their slots, because attention needs all modules of a token
    # together. They are zero for a choice without a slot.
    # [slots, joined_kv] -> [tokens, selected, joined_kv]
    units = slots.to_choices(rows, decision.plan)
    return expert_parallel.StageResults(
      # [tokens, selected, joined_kv] -> [groups, tokens, selected, joined_kv]
      units=units.reshape(*tokens.shape[:2], *units.shape[1:]),
      own=decision,
      sums=stats,
    )

  @nn.nowrap
  def _answer(self, training, *, attended, decision, kernels):
    """Second stage: projects what the modules of each token have found.

    Args:
      training: whether to drop as in training.
      attended: <dtype>[groups, tokens, selected, joined_kv], the attention of
        each chosen module, for the groups of this device.
      decision: the decision of the first stage on this device.
      kernels: this device's part of the output kernels.

    Returns:
      StageResults with outputs <dtype>[groups, tokens, embed].
    """
    # [groups, tokens, selected, joined_kv] -> [tokens, selected, joined_kv]
    flat = attended.reshape(-1, *attended.shape[2:])
    rows = self._parts(training).compute(
      slots.from_choices(flat, decision.plan),
      kernels,
      decision,
      experts.project,
    )
    outputs = mixture.add_up(rows, decision)
    return expert_parallel.StageResults(
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
    """Returns which queries are routed, <bool>[groups, tokens].

    Args:
      mask: <bool>[batch or 1, 1, query or 1, key], True where a query sees a
        key.
      batch: number of rows.
      length: number of queries of a row.
    """
    if self.routes_padding:
      real = jnp.ones((batch, length), bool)
      return self.groups.split(real, self.groups.routes_filling)
    # A query without any visible key is padding.
    # [batch or 1, 1, query or 1, key] -> [batch or 1, query or 1]
    sees = jnp.any(mask, axis=-1)[:, 0]
    return self.groups.split(jnp.broadcast_to(sees, (batch, length)), False)


class MixtureOfSelfAttentionHeads(
  MixtureOfAttentionHeads, self_attention.SelfAttention
):
  """MixtureOfAttentionHeads as the self-attention of a decoder-only model.

  The layer has no embedding of positions. The default `inner` is StickBreaking,
  which knows positions by the order of the keys.

  Attributes:
    inner: the attention within a module; see MixtureOfAttentionHeads, whose
      other attributes are the same.

  Call: queries <float>[batch, query, embed], memory <float>[batch, key, embed],
    positions and mask <bool>[batch, 1, query, key] to <dtype>[batch, query,
    embed], as in SelfAttention.
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
