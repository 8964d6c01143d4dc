"""Stick-breaking attention: order without position embeddings.

From the newest key to the oldest, each visible key breaks a fraction
sigmoid(logit) off a stick of length 1, and the next one gets to break what is
left. What remains after the oldest key is dropped: weights add up to less than
one. A key that is not visible gets nothing and takes nothing, so padding may
lie anywhere.

Weights are computed for a block of queries at a time, and again in the backward
pass: memory is queries x block, not queries x keys.

Source: ModuleFormer, arXiv 2306.04640, with its query's own position as the
newest key.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers import linear
from mowe.layers.attention import self_attention

# Queries at a time, and keys whose logarithms are added up by one product.
_QUERY_BLOCK = 128
_KEY_BLOCK = 32

# Programs for queries further and further back, each with the keys it needs:
# with four, 5/8 of all logits are computed where half are visible.
_STAGES = 4


def stick_breaking_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  num_visible: np.ndarray | None = None,
) -> jax.Array:
  """Weights of broken sticks times values.

  Args:
    query: <float>[batch, query, groups, heads, kv]; groups share keys and
      values.
    key: <float>[batch, key, heads, kv], the newest last.
    value: <float>[batch, key, heads, kv].
    mask: <bool>[batch, 1, query, key], True where a key is visible.
    num_visible: <int>[query] of numpy: each query sees none of the keys from
      this number on, which then need not be computed. None where that is not
      known before the program runs.

  Returns:
    <float>[batch, query, groups, heads, kv] in the dtype of `value`; zeros for
    queries that see nothing.
  """
  num_queries, num_keys = query.shape[1], key.shape[1]
  if num_visible is None:
    num_visible = np.full(num_queries, num_keys)
  num_blocks = -(-num_queries // _QUERY_BLOCK)
  size = -(-num_blocks // _STAGES) * _QUERY_BLOCK
  outputs = []
  for start in range(0, num_queries, size):
    stage = slice(start, start + size)
    visible = slice(int(num_visible[stage].max()))
    outputs.append(
      _block_by_block(
        query[:, stage],
        key[:, visible],
        value[:, visible],
        mask[:, 0, stage, visible],
      )
    )
  return jnp.concatenate(outputs, axis=1)


def _block_by_block(query, key, value, visible):
  """Attention of some queries, of which only a block is at work at a time."""
  attend = functools.partial(_attend, key=key, value=value)
  num_queries = query.shape[1]
  missing = -num_queries % _QUERY_BLOCK

  def in_blocks(x):
    # [batch, query, ...] -> [blocks, batch, block, ...]
    padding = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    blocks = jnp.pad(x, padding).reshape(
      x.shape[0], -1, _QUERY_BLOCK, *x.shape[2:]
    )
    return jnp.moveaxis(blocks, 1, 0)

  # Only queries are kept for the backward pass, not the weights.
  attend = jax.checkpoint(attend, prevent_cse=num_queries <= _QUERY_BLOCK)
  if num_queries <= _QUERY_BLOCK:
    return attend((query, visible))
  outputs = jax.lax.map(attend, (in_blocks(query), in_blocks(visible)))
  outputs = jnp.moveaxis(outputs, 0, 1)
  return outputs.reshape(query.shape[0], -1, *query.shape[2:])[:, :num_queries]


def _attend(queries, key, value):
  query, visible = queries
  scale = query.shape[-1] ** -0.5
  logits = jnp.einsum('bqghd,bkhd->bghqk', query * scale, key)
  weights = stick_weights(
    logits.astype(jnp.float32), visible[:, None, None]
  ).astype(value.dtype)
  return jnp.einsum('bghqk,bkhd->bqghd', weights, value)


@jax.custom_vjp
def stick_weights(logits: jax.Array, visible: jax.Array) -> jax.Array:
  """Fractions of the stick, <float32>[..., key].

  Weight j is sigmoid(logit j) times the product over newer visible keys l > j
  of 1 - sigmoid(logit l). Computed from logarithms: no product underflows
  before its result does.

  Args:
    logits: <float32>[..., key], the newest key last.
    visible: <bool>, broadcast against them.
  """
  return _weights_forward(logits, visible)[0]


def _weights_forward(logits, visible):
  left = jnp.where(visible, jax.nn.log_sigmoid(-logits), 0.0)
  # log sigmoid(x) = x + log sigmoid(-x)
  taken = jnp.exp(logits + left + _sum_of_newer(left))
  weights = jnp.where(visible, taken, 0.0)
  return weights, (logits, visible, weights)


def _weights_backward(residuals, cotangent):
  logits, visible, weights = residuals
  fraction = jnp.where(visible, jax.nn.sigmoid(logits), 0.0)
  of_logarithms = cotangent * weights
  # A larger fraction leaves less to all older keys.
  d_logits = of_logarithms - fraction * (
    of_logarithms + _sum_of_older(of_logarithms)
  )
  return d_logits, None


stick_weights.defvjp(_weights_forward, _weights_backward)


def _sum_of_newer(values):
  """Sums over all later places of the last axis, without the place itself."""
  return _triangular_sums(values, lambda place, other: other > place)


def _sum_of_older(values):
  """Sums over all earlier places of the last axis."""
  return _triangular_sums(values, lambda place, other: other < place)


def _triangular_sums(values, is_added):
  """Sums over the places of the last axis that are added to each place.

  By two products with triangles of ones, in blocks and over blocks: XLA's
  cumulative sums take one pass over memory for each doubling of the length.
  """
  length = values.shape[-1]
  num_blocks = -(-length // _KEY_BLOCK)
  padding = [(0, 0)] * (values.ndim - 1) + [(0, -length % _KEY_BLOCK)]
  blocks = jnp.pad(values, padding).reshape(
    *values.shape[:-1], num_blocks, _KEY_BLOCK
  )

  def triangle(size):
    # [other, place]
    numbers = np.arange(size)
    ones = is_added(numbers[None, :], numbers[:, None])
    return ones.astype(np.float32)

  product = functools.partial(jnp.matmul, precision='highest')
  within = product(blocks, triangle(_KEY_BLOCK))
  between = product(blocks.sum(axis=-1), triangle(num_blocks))
  sums = within + between[..., None]
  return sums.reshape(*values.shape[:-1], -1)[..., :length]


def keys_behind(positions: self_attention.Positions) -> np.ndarray | None:
  """Keys up to the place of each query, where places are known beforehand."""
  if not isinstance(positions.keys, np.ndarray):
    return None
  return np.searchsorted(positions.keys, positions.queries, side='right')


class StickBreakingAttention(self_attention.SelfAttention):
  """Self-attention by broken sticks, in which order alone tells positions.

  The weights have no dropout, as in the source.
  """

  # The newest key comes first.
  looks_back_only = True

  def _query_init(self):
    # stick_breaking_attention divides by sqrt(kv).
    return linear.attention_init

  def _attend(self, queries, keys, values, *, positions, mask, **others):
    del others
    # One group.
    return stick_breaking_attention(
      queries[:, :, None], keys, values, mask, keys_behind(positions)
    )[:, :, 0]
