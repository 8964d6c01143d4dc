"""Stick-breaking attention: order without position embeddings.

Each query has a stick of length 1. From the newest key to the oldest, each
visible key breaks a fraction sigmoid(logit) off what is left of it; the piece
is the weight of the key. What remains after the oldest key is dropped, so that
weights add up to less than one. A key that is not visible gets nothing and
takes nothing, so that padding may lie anywhere.

Weights are computed for a block of queries at a time, and computed again in the
backward pass. So memory for them is block x keys, and not queries x keys.

Source: ModuleFormer, arXiv 2306.04640, where the newest key of a query is the
one at its own position.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers import linear
from mowe.layers.attention import self_attention

# How many queries are computed at a time, and over how many keys one product
# adds up logarithms; see `_triangular_sums`.
_QUERY_BLOCK = 128
_KEY_BLOCK = 32

# Queries are cut into this many stages, and each stage computes only the keys
# that its last query can see. With causal attention half of the logits are
# visible; four stages compute 5/8 of them. Each stage is code of its own in the
# compiled program.
_STAGES = 4


def stick_breaking_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  num_visible: np.ndarray | None = None,
) -> jax.Array:
  """Computes stick-breaking attention, with logits divided by sqrt(kv).

  Args:
    query: <float>[batch, query, groups, heads, kv]; groups share keys and
      values.
    key: <float>[batch, key, heads, kv], the newest last.
    value: <float>[batch, key, heads, kv].
    mask: <bool>[batch, 1, query, key], True where a key is visible.
    num_visible: numpy array <int>[query]. A query sees none of the keys from
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
  """Attention of some queries, computed for one block of them at a time.

  Queries are [batch, query, groups, heads, kv], keys and values [batch, key,
  heads, kv], and `visible` is <bool>[batch, query, key].
  """
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

  # The weights are not kept for the backward pass, which computes them again.
  # In a loop XLA cannot merge the two computations, so that only a single block
  # needs prevent_cse.
  attend = jax.checkpoint(attend, prevent_cse=num_queries <= _QUERY_BLOCK)
  if num_queries <= _QUERY_BLOCK:
    return attend((query, visible))
  outputs = jax.lax.map(attend, (in_blocks(query), in_blocks(visible)))
  outputs = jnp.moveaxis(outputs, 0, 1)
  return outputs.reshape(query.shape[0], -1, *query.shape[2:])[:, :num_queries]


def _attend(queries, key, value):
  """Attention of one block of queries and their masks."""
  query, visible = queries
  scale = query.shape[-1] ** -0.5
  logits = jnp.einsum('bqghd,bkhd->bghqk', query * scale, key)
  weights = stick_weights(
    logits.astype(jnp.float32), visible[:, None, None]
  ).astype(value.dtype)
  return jnp.einsum('bghqk,bkhd->bqghd', weights, value)


@jax.custom_vjp
def stick_weights(logits: jax.Array, visible: jax.Array) -> jax.Array:
  """Returns the parts of the stick that the keys take, their weights.

  Weight j is sigmoid(logit j) times the product of 1 - sigmoid(logit l) over
  all newer visible keys l > j. The product is computed as a sum of logarithms,
  so that it does not underflow before its result does. The gradient is defined
  here, so that the backward pass is one sum over keys as well.

  Args:
    logits: <float32>[..., key], the newest key last.
    visible: <bool>, broadcast against `logits`.

  Returns:
    <float32>[..., key].
  """
  return _weights_forward(logits, visible)[0]


def _weights_forward(logits, visible):
  left = jnp.where(visible, jax.nn.log_sigmoid(-logits), 0.0)
  # log weight = log sigmoid(logit) + sum of newer log(1 - sigmoid), where 1 -
  # sigmoid(x) = sigmoid(-x), and log sigmoid(x) = x + log sigmoid(-x).
  taken = jnp.exp(logits + left + _sum_of_newer(left))
  weights = jnp.where(visible, taken, 0.0)
  return weights, (logits, visible, weights)


def _weights_backward(residuals, cotangent):
  logits, visible, weights = residuals
  fraction = jnp.where(visible, jax.nn.sigmoid(logits), 0.0)
  of_logarithms = cotangent * weights
  # d log(weight j) / d logit l is 1 - fraction l for the key itself, j = l, and
  # -fraction l for all older keys j < l, to which a larger fraction leaves
  # less.
  d_logits = of_logarithms - fraction * (
    of_logarithms + _sum_of_older(of_logarithms)
  )
  return d_logits, None


stick_weights.defvjp(_weights_forward, _weights_backward)


def _sum_of_newer(values):
  """For each place of the last axis, the sum over all later places."""
  return _triangular_sums(values, lambda place, other: other > place)


def _sum_of_older(values):
  """For each place of the last axis, the sum over all earlier places."""
  return _triangular_sums(values, lambda place, other: other < place)


def _triangular_sums(values, is_added):
  """For each place of the last axis, the sum over some of the other places.

  XLA's cumulative sums take one pass over memory for each doubling of the
  length. Here the last axis is cut into blocks, [..., blocks, size]. A product
  with a triangle of ones [size, size] adds up the places of the same block. A
  product of the blocks' totals [..., blocks] with a triangle [blocks, blocks]
  adds up all other blocks. The result is the sum of both.

  Args:
    values: <float32>[..., length].
    is_added: function of two arrays of places. It returns whether the value at
      the second place is added to the sum for the first.
  """
  length = values.shape[-1]
  num_blocks = -(-length // _KEY_BLOCK)
  padding = [(0, 0)] * (values.ndim - 1) + [(0, -length % _KEY_BLOCK)]
  blocks = jnp.pad(values, padding).reshape(
    *values.shape[:-1], num_blocks, _KEY_BLOCK
  )

  def triangle(size):
    # [other place, place]
    numbers = np.arange(size)
    ones = is_added(numbers[None, :], numbers[:, None])
    return ones.astype(np.float32)

  product = functools.partial(jnp.matmul, precision='highest')
  within = product(blocks, triangle(_KEY_BLOCK))
  between = product(blocks.sum(axis=-1), triangle(num_blocks))
  sums = within + between[..., None]
  return sums.reshape(*values.shape[:-1], -1)[..., :length]


def keys_behind(positions: self_attention.Positions) -> np.ndarray | None:
  """Returns the number of keys up to the position of each query.

  Args:
    positions: the positions of queries and of keys.

  Returns:
    numpy array <int>[query], or None where positions are not known before the
    program runs.
  """
  if not isinstance(positions.keys, np.ndarray):
    return None
  return np.searchsorted(positions.keys, positions.queries, side='right')


class StickBreakingAttention(self_attention.SelfAttention):
  """Stick-breaking self-attention, which needs no other positions.

  As in the source, the weights have no dropout.

  The attributes and the call are those of SelfAttention.
  """

  # Keys are visited from the newest to the oldest.
  looks_back_only = True

  def _query_init(self):
    # The variance is not that of MultiHeadAttention, because
    # `stick_breaking_attention` divides the logits by sqrt(kv).
    return linear.attention_init

  def _attend(self, queries, keys, values, *, positions, mask, **others):
    del others
    # [batch, query, heads, kv] -> [batch, query, 1, heads, kv] and back: all
    # queries are one group.
    return stick_breaking_attention(
      queries[:, :, None], keys, values, mask, keys_behind(positions)
    )[:, :, 0]
