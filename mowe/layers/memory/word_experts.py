"""MoWE: a feed-forward in which each word has a small expert.

Words share experts when there are more words than experts.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward, feed_forward_base, parameter
from mowe.layers.memory import (
  bfloat16_bits,
  expert_tiles,
  grouped,
  host_rows,
  word_exchange,
)
from mowe.words.plans import batch_plans, sharded_plan

# The standard deviation of a fresh `wo`, relative to that of T5's initializer.
# An expert starts as a small correction of the residual stream. With a scale of
# 1, thousands of experts that are not trained yet would add noise, which
# training would have to undo.
_WO_SCALE = 0.1

_TABLE_DTYPES = ('float32', 'bfloat16')

# The collection in which a train step passes zeros to each product, and whose
# gradient is the `grouped.Factors` of that product.
FACTORS = 'kernel_gradient_factors'


@functools.cache
def _expert_init(scale: float, as_bits: bool) -> parameter.Initializer:
  draw = parameter.variance_scaling(
    scale**2,
    'fan_in',
    'truncated_normal',
    in_axis=-2,
    out_axis=-1,
    batch_axis=(0,),
  )
  if not as_bits:
    return draw

  def draw_bits(key, shape, dtype):
    del dtype
    return bfloat16_bits.nearest(draw(key, shape, jnp.float32))

  return draw_bits


class ExpertTable(nn.Module):
  """Kernels of all experts, one row for each expert.

  Attributes:
    num_experts: number of rows of the table.
    embed_dim: width of the model.
    expert_dim: number of hidden units of one expert.
    activations: one name, or two for gated experts.
    dtype: float32, or bfloat16, which is stored as bits <uint16> (see
      `bfloat16_bits`).
    rows_from: reads rows on the host. The table is then no parameter of the
      model. None for a table on the device.

  Call: returns a dict of the kernels by name: `wi`, or `wi_0` and `wi_1`,
    <dtype>[num_experts, embed, expert_dim], and `wo` <dtype>[num_experts,
    expert_dim, embed]. It takes no arguments.
  """

  num_experts: int
  embed_dim: int
  expert_dim: int
  activations: tuple[str, ...] = ('gelu', 'linear')
  dtype: Any = jnp.float32
  rows_from: host_rows.RowsFrom | None = None

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    return {
      name: parameter.declare(
        self,
        name,
        _expert_init(_WO_SCALE if name == 'wo' else 1.0, self._is_bits()),
        (self.num_experts, *shape),
        axes=('expert', 'expert_mlp', 'embed')
        if name == 'wo'
        else ('expert', 'embed', 'expert_mlp'),
        dtype=self._stored_dtype(),
      )
      for name, shape in self._shapes()
    }

  def reader(self) -> expert_tiles.TableRows | host_rows.HostRows:
    """Returns an object that reads the kernels of some experts."""
    if self.rows_from is None:
      return expert_tiles.TableRows(self())
    return host_rows.HostRows(
      self.rows_from, '/'.join(self.path), self._shapes(), self._stored_dtype()
    )

  def _shapes(self) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Name and shape (in, out) of each kernel of one expert."""
    names = feed_forward.kernel_names(self.activations)
    outwards = (self.embed_dim, self.expert_dim)
    return (*((name, outwards) for name in names), ('wo', outwards[::-1]))

  def _is_bits(self) -> bool:
    return jnp.dtype(self.dtype) == jnp.bfloat16

  def _stored_dtype(self) -> Any:
    return bfloat16_bits.DTYPE if self._is_bits() else self.dtype


class MoweLayer(feed_forward_base.FeedForward):
  """Feed-forward in which the routing id of a token names its one expert.

  Source: MoWE, arXiv 2311.10768, section 2. There is no router, no auxiliary
  loss and no bias. A token without an expert gets zeros, so that the residual
  connection passes it on unchanged: padding, whose id is negative, and a word
  that is skipped, whose id is `num_experts` or more. With 8 experts, the ids
  (5, 8, -1) of "Paris", "the" and padding give expert 5, zeros and zeros.

  Attributes:
    num_experts: number of experts, which must be that of the RoutingVocabulary.
    expert_dim: number of hidden units of one expert.
    activations: one name, or two for gated experts.
    share_experts: whether all layers of the model share one table, as in the
      paper. Otherwise each layer has its own.
    table_dtype: dtype of the table: 'float32', or 'bfloat16', which takes half
      the memory and is trained with stochastic rounding.
    dropout_rate: dropout rate of the hidden units.
    dtype: dtype of the computation.
    table: the shared ExpertTable, which the stack passes in; None if the layer
      has its own.
    num_slots: number of rows of the table, where a run keeps on the device only
      the experts of some batches at a time; None if it keeps all of them.
    rows_from: reads rows of the table, where a run keeps none of it on the
      device; None if the table is on the device.

  Call: tokens <float>[batch, length, embed] and either routing_ids
    <int32>[batch, length], or by name the plan of these tokens (a StreamPlan,
    or for experts on several devices a ShardedStreamPlan), to
    <dtype>[batch, length, embed].

  Raises:
    ValueError: `table_dtype` is unknown, ids and plan are both missing, or
      their [batch, length] shape is not that of the tokens.
  """

  num_experts: int
  expert_dim: int
  activations: tuple[str, ...] = ('gelu', 'linear')
  share_experts: bool = True
  table_dtype: str = 'float32'
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32
  table: ExpertTable | None = None
  num_slots: int | None = None
  rows_from: host_rows.RowsFrom | None = None

  reads_plans = True

  def __post_init__(self):
    if self.table_dtype not in _TABLE_DTYPES:
      raise ValueError(
        f'table_dtype must be one of {_TABLE_DTYPES}, but is '
        f"{self.table_dtype!r}. Take 'bfloat16' for half the memory."
      )
    super().__post_init__()

  def num_word_experts(self) -> int:
    return self.num_experts

  def make_shared(self, embed_dim: int) -> dict[str, nn.Module]:
    if not self.share_experts:
      return {}
    return {'experts': self._make_table(embed_dim, parent=None)}

  def with_shared(self, shared: Mapping[str, nn.Module]) -> 'MoweLayer':
    return self.clone(table=shared.get('experts'), parent=None)

  def check_mesh(
    self, mesh_shape: Mapping[str, int], batch: int, length: int
  ) -> None:
    del batch, length
    sharded_plan.check_num_experts(self.num_experts, mesh_shape['expert'])

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: jax.Array | None = None,
    *,
    plan: batch_plans.StreamPlan | sharded_plan.ShardedStreamPlan | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    _check_routing(tokens, routing_ids, plan)
    table = self.table
    if table is None:
      table = self._make_table(tokens.shape[-1], name='experts')
    dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic)
    if isinstance(plan, sharded_plan.ShardedStreamPlan):
      return self._exchanged(tokens.astype(self.dtype), plan, table, dropout)
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(self.dtype)
    if plan is not None:
      outputs = self._planned(flat, plan, table, dropout)
    else:
      outputs = self._unplanned(flat, routing_ids.reshape(-1), table, dropout)
    return outputs.reshape(tokens.shape)

  def _make_table(self, embed_dim, **place):
    return ExpertTable(
      self.num_slots or self.num_experts,
      embed_dim,
      self.expert_dim,
      self.activations,
      self.table_dtype,
      self.rows_from,
      **place,
    )

  def _planned(self, tokens, plan, table, dropout):
    """Outputs [tokens, embed], by one product for each class of the plan."""
    kernels = table()
    factors = self._all_factors(kernels, tokens.shape[:1])
    return self._feed_forward(tokens, plan, kernels, factors, dropout)

  def _exchanged(self, tokens, plan, table, dropout):
    """Outputs [batch, length, embed], computed on the experts' devices."""
    kernels = table()
    *devices, num_owners, capacity = plan.sent.shape
    factors = self._all_factors(kernels, (*devices, num_owners * capacity))
    keep = None
    if dropout.rate and not dropout.deterministic:
      # Drawn for all tokens before they are sent, so that the mask is the one
      # that one device would draw.
      units = (tokens.shape[0] * tokens.shape[1], self.expert_dim)
      keep = dropout(jnp.ones(units, self.dtype)) != 0
      keep = keep.reshape(*tokens.shape[:2], -1)

    def experts(rows, plan, *, kernels, factors, keep):
      drop = functools.partial(_drop, keep=keep, rate=dropout.rate)
      return self._feed_forward(rows, plan, kernels, factors, drop)

    return word_exchange.on_owners(
      experts, tokens, plan, kernels=kernels, factors=factors, keep=keep
    )

  def _feed_forward(self, tokens, plan, kernels, factors, dropout):
    def product(name, tokens):
      return grouped.expert_product(tokens, kernels[name], plan, factors[name])

    names = feed_forward.kernel_names(self.activations)
    projections = [product(name, tokens) for name in names]
    hidden = dropout(feed_forward.activate(projections, self.activations))
    return product('wo', hidden)

  def _all_factors(self, kernels, leading):
    return {
      name: self._factors(name, kernel.shape[-2:], leading)
      for name, kernel in kernels.items()
    }

  def _factors(self, name, widths, leading):
    """Zeros whose gradient is the `grouped.Factors` of one product.

    They are made when a train step asks for the collection, read when it passes
    them in, and None elsewhere.
    """
    if self.is_mutable_collection(FACTORS):
      zeros = lambda width: jnp.zeros((*leading, width), self.dtype)
      return self.variable(
        FACTORS, name, lambda: grouped.Factors(*map(zeros, widths))
      ).value
    if self.has_variable(FACTORS, name):
      return self.get_variable(FACTORS, name)
    return None

  def _unplanned(self, tokens, experts, table, dropout):
    """Outputs [tokens, embed] without a plan, in evaluation and decoding."""
    keep = None
    if self.dropout_rate and not dropout.deterministic:
      # Drawn for all tokens in their order, so that the mask is the one that is
      # drawn with a plan.
      keep = dropout(jnp.ones((tokens.shape[0], self.expert_dim), self.dtype))
    return expert_tiles.feed_forward_by_tiles(
      tokens,
      experts,
      table.reader(),
      keep,
      self.num_experts,
      self.activations,
    )


def _drop(hidden, *, keep, rate):
  """Applies a dropout mask that was drawn before; None drops nothing."""
  if keep is None:
    return hidden
  # The same expression as in nn.Dropout, so that the results have the same bits
  # as on one device.
  return jnp.where(keep, hidden / (1.0 - rate), 0)


def _check_routing(tokens, routing_ids, plan):
  """Raises ValueError unless there are ids, or a plan, of these tokens."""
  if isinstance(plan, sharded_plan.ShardedStreamPlan):
    # `word_exchange` compares its shape with the mesh and the tokens.
    return
  if routing_ids is None and plan is None:
    raise ValueError(
      'MoweLayer needs the routing ids of its tokens, but got None. Set '
      'T5Config.routing to a RoutingVocabulary, or give '
      'encoder_routing_ids and decoder_routing_ids with the batch.'
    )
  given, ids = (
    ('routing_ids', routing_ids)
    if plan is None
    else ('The slots of plan', plan.slots)
  )
  if ids.shape != tokens.shape[:2]:
    raise ValueError(
      f'{given} must have the [batch, length] shape of tokens, '
      f'{tokens.shape[:2]}, but have {ids.shape}. Give the ids that '
      'RoutingVocabulary.encoder_ids or decoder_ids makes of the same tokens, '
      'or the plan of these ids.'
    )
