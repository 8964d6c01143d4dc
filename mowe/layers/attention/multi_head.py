"""Multi-head attention as in T5, with a decoding cache."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import linear, parameter
from mowe.layers.attention import attention_base

# T5X's mask value: far below any logit, and safe in bfloat16.
_MASKED = -1e10


def dot_product_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  bias: jax.Array | None,
  mask: jax.Array | None,
  dropout=lambda weights: weights,
) -> jax.Array:
  """Computes softmax(query key^T + bias) value, with no division by sqrt(kv).

  In T5, the initializer of the query kernel contains the division.

  Args:
    query: <float>[batch, query, heads, kv].
    key: <float>[batch, key, heads, kv].
    value: <float>[batch, key, heads, kv].
    bias: <float>[1 or batch, heads, query, key], added to the logits; or None.
    mask: <bool>[batch, 1, query, key], True where attention is allowed; or
      None if it is allowed everywhere.
    dropout: function that is applied to the weights [batch, heads, query, key].

  Returns:
    <float>[batch, query, heads, kv] in the dtype of `value`.
  """
  logits = jnp.einsum('bqhd,bkhd->bhqk', query, key).astype(jnp.float32)
  if bias is not None:
    logits = logits + bias.astype(jnp.float32)
  if mask is not None:
    logits = jnp.where(mask, logits, _MASKED)
  weights = dropout(jax.nn.softmax(logits).astype(value.dtype))
  return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


def as_kept(projected: jax.Array) -> jax.Array:
  """Returns keys or values in the layout of the decoding cache.

  XLA on CPU can multiply [batch, heads, kv, length] without a copy. Of [batch,
  length, heads, kv] it would make a transposed copy for every token.

  Args:
    projected: <float>[batch, length, heads, kv].

  Returns:
    <float>[batch, heads, kv, length].
  """
  return jnp.moveaxis(projected, 1, 3)


def as_projected(kept: jax.Array) -> jax.Array:
  """Inverts `as_kept`.

  Args:
    kept: <float>[batch, heads, kv, length].

  Returns:
    <float>[batch, length, heads, kv].
  """
  return jnp.moveaxis(kept, 3, 1)


class MultiHeadAttention(attention_base.Attention):
  """Attention of `queries` to `memory`, which may be the same tokens.

  Attributes:
    num_heads: number of heads.
    head_dim: size of one head.
    dropout_rate: dropout rate of the attention weights. All queries share one
      mask.
    dtype: dtype of the computation.

  Call: queries <float>[batch, query, embed] and memory <float>[batch, key,
    embed] to <dtype>[batch, query, embed].

  There are two ways to decode. For a fixed memory, such as the outputs of an
  encoder, `project_memory` computes keys and values once, and `attend` uses
  them for every token. In self-attention, a call with `decode=True` takes one
  token, and appends its keys and values to the `cache` collection.
  """

  num_heads: int
  head_dim: int
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  def setup(self):
    joined = self.num_heads * self.head_dim
    project = lambda init: linear.Dense(
      joined, ('embed', 'joined_kv'), init, self.dtype
    )
    self.query = project(self._query_init())
    self.key = project(linear.attention_init)
    self.value = project(linear.attention_init)
    self.weights_dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))

  def _query_init(self):
    # The variance contains the division of the logits by sqrt(kv).
    return parameter.variance_scaling(1.0 / self.head_dim, 'fan_in', 'normal')

  @nn.compact
  def _out(self, attended: jax.Array, features: int) -> jax.Array:
    return linear.Dense(
      features,
      ('joined_kv', 'embed'),
      linear.attention_init,
      self.dtype,
      name='out',
    )(attended)

  def _split_heads(self, joined: jax.Array) -> jax.Array:
    # [batch, length, joined_kv] -> [batch, length, heads, kv]
    return joined.reshape(*joined.shape[:-1], self.num_heads, self.head_dim)

  def project_memory(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and the values of a memory.

    Args:
      memory: <float>[batch, key, embed].

    Returns:
      Two arrays <dtype>[batch, key, heads, kv].
    """
    return (
      self._split_heads(self.key(memory)),
      self._split_heads(self.value(memory)),
    )

  def attend(
    self,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """Returns the attention of queries to projected keys and values.

    Args:
      queries: <float>[batch, query, embed].
      keys: <dtype>[batch, key, heads, kv].
      values: <dtype>[batch, key, heads, kv].
      bias: <float>[1, heads, query, key], added to the logits; or None.
      mask: <bool>[batch, 1, query, key], True where attention is allowed; or
        None.
      deterministic: turns dropout off.

    Returns:
      <dtype>[batch, query, embed].
    """
    attended = dot_product_attention(
      self._split_heads(self.query(queries)),
      keys,
      values,
      bias=bias,
      mask=mask,
      dropout=lambda weights: self.weights_dropout(
        weights, deterministic=deterministic
      ),
    )
    # [batch, query, heads, kv] -> [batch, query, joined_kv]
    attended = attended.reshape(*attended.shape[:2], -1)
    return self._out(attended, queries.shape[-1])

  def __call__(
    self,
    queries: jax.Array,
    memory: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    decode: bool = False,
    deterministic: bool = True,
  ) -> jax.Array:
    keys, values = self.project_memory(memory)
    if decode:
      keys, values, written = self._update_cache(keys, values)
      mask = written if mask is None else mask & written
    return self.attend(
      queries,
      keys,
      values,
      bias=bias,
      mask=mask,
      deterministic=deterministic,
    )

  def _update_cache(self, keys, values):
    """Appends one token to the cache.

    Returns all keys, all values, and a mask <bool>[1, 1, 1, key] of those that
    are written. The first pass only makes the cache, which gets the length of
    that pass; it writes nothing.
    """
    if not self.has_variable('cache', 'cached_key'):
      self.put_variable('cache', 'cached_key', jnp.zeros_like(as_kept(keys)))
      self.put_variable(
        'cache', 'cached_value', jnp.zeros_like(as_kept(values))
      )
      self.put_variable('cache', 'cache_index', jnp.zeros((), jnp.int32))
      return keys, values, jnp.ones((1, 1, 1, 1), bool)
    position = self.get_variable('cache', 'cache_index')

    def append(name, new):
      cached = jax.lax.dynamic_update_slice(
        self.get_variable('cache', name), as_kept(new), (0, 0, 0, position)
      )
      self.put_variable('cache', name, cached)
      return as_projected(cached)

    keys, values = append('cached_key', keys), append('cached_value', values)
    self.put_variable('cache', 'cache_index', position + 1)
    written = jnp.arange(keys.shape[1]) <= position
    return keys, values, written[None, None, None, :]
