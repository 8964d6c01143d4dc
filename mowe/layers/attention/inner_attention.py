"""Attention inside of each module of a mixture of heads: parts with one call.

Modules share keys and values, so queries have an axis `groups`: one for each
module that a token has chosen. All parts divide logits by sqrt(kv), so that the
kernels of queries are drawn as others are.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers.attention import stick_breaking

# As in `attention`.
_MASKED = -1e10


class InnerAttention(Protocol):
  """Attention with shared keys and values.

  Attributes:
    looks_back_only: the last key comes first, so none may lie ahead.
    needs_all_queries: queries and keys must be the same tokens.
  """

  looks_back_only: bool
  needs_all_queries: bool

  def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None,
    mask: jax.Array,
    num_visible: np.ndarray | None,
    dropout: Callable[[jax.Array], jax.Array],
  ) -> jax.Array:
    """Values for each query, <float>[batch, query, groups, heads, kv].

    Args:
      query: <float>[batch, query, groups, heads, kv].
      key: <float>[batch, key, heads, kv].
      value: <float>[batch, key, heads, kv].
      bias: <float>[1, heads, query, key] of all groups, or None.
      mask: <bool>[batch, 1, query, key], True where a key is visible.
      num_visible: <int>[query] of numpy: each query sees none of the keys from
        this number on; or None.
      dropout: of the weights.
    """


@dataclasses.dataclass(frozen=True)
class Softmax:
  """Softmax of the logits and the bias; all modules have the same bias."""

  looks_back_only = False
  needs_all_queries = False

  def __call__(self, query, key, value, *, bias, mask, num_visible, dropout):
    """See `InnerAttention`."""
    del num_visible
    logits = _logits(query, key)
    if bias is not None:
      logits += bias.astype(jnp.float32)[:, None]
    logits = jnp.where(mask[:, None], logits, _MASKED)
    weights = dropout(jax.nn.softmax(logits).astype(value.dtype))
    return jnp.einsum('bghqk,bkhd->bqghd', weights, value)


@dataclasses.dataclass(frozen=True)
class StickBreaking:
  """The newest key takes its part first; neither bias nor dropout.

  Source: ModuleFormer, arXiv 2306.04640.
  """

  looks_back_only = True
  needs_all_queries = False

  def __call__(self, query, key, value, *, bias, mask, num_visible, dropout):
    """See `InnerAttention`."""
    del bias, dropout
    mask = jnp.broadcast_to(
      mask, (query.shape[0], 1, query.shape[1], key.shape[1])
    )
    return stick_breaking.stick_breaking_attention(
      query, key, value, mask, num_visible
    )


@dataclasses.dataclass(frozen=True)
class NearestFirst:
  """Stick-breaking in both directions: the nearest key takes its part first.

  Keys are visited by distance: the query's own, the next one, the one before,
  the second next, and so on. With nothing ahead visible it is StickBreaking.

  Source: the order is that of geometric attention (arXiv 2110.07732), which
  leaves out a query's own position; what remains is dropped, as in ModuleFormer.
  """

  looks_back_only = False
  needs_all_queries = True

  def __call__(self, query, key, value, *, bias, mask, num_visible, dropout):
    """See `InnerAttention`.

    Raises:
      ValueError: queries and keys are not the same tokens.
    """
    del bias, num_visible, dropout
    length = query.shape[1]
    if key.shape[1] != length:
      raise ValueError(
        'NearestFirst must have queries and keys that are the same tokens, but '
        f'there are {length} queries and {key.shape[1]} keys. Use it in an '
        'encoder, and StickBreaking or Softmax elsewhere.'
      )
    order = visits(length)
    inverse = np.argsort(order, axis=1)
    sort = lambda x, by: jnp.take_along_axis(
      x, jnp.asarray(by).reshape((1,) * (x.ndim - 2) + by.shape), axis=-1
    )
    mask = jnp.broadcast_to(mask, (query.shape[0], 1, length, length))
    weights = stick_breaking.stick_weights(
      sort(_logits(query, key), order), sort(mask, order)[:, None]
    )
    weights = sort(weights, inverse).astype(value.dtype)
    return jnp.einsum('bghqk,bkhd->bqghd', weights, value)


def visits(length: int) -> np.ndarray:
  """Keys <int>[query, key] in the order in which each query visits them.

  The first visit stands last, as the newest key does in stick-breaking.
  """
  places = np.arange(length)
  ahead = places[None, :] - places[:, None]
  return np.argsort(-(2 * np.abs(ahead) - (ahead > 0)), axis=1)


def _logits(query, key):
  scale = query.shape[-1] ** -0.5
  logits = jnp.einsum('bqghd,bkhd->bghqk', query * scale, key)
  return logits.astype(jnp.float32)
