"""Kinds of attention for the modules of a mixture of heads.

A mixture of heads has one of these classes as a part, and all of them are
called in the same way. All modules share keys and values. Queries have an axis
`groups`, with one entry for each module that a token has chosen. All classes
divide logits by sqrt(kv), so that kernels of queries are drawn like all others.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers.attention import stick_breaking

# The logit of a key that is not visible, as in `multi_head`.
_MASKED = -1e10


class InnerAttention(Protocol):
  """Attention of several groups of queries to the same keys and values.

  Attributes:
    looks_back_only: whether keys are visited from the last one on, so that no
      key may lie ahead of the query.
    needs_all_queries: whether queries and keys must be the same tokens.
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
    """Returns the weighted sums of values for each query.

    Args:
      query: <float>[batch, query, groups, heads, kv].
      key: <float>[batch, key, heads, kv].
      value: <float>[batch, key, heads, kv].
      bias: <float>[1, heads, query, key], which is added to the logits of all
        groups; or None.
      mask: <bool>[batch, 1, query, key], True where a key is visible.
      num_visible: numpy array <int>[query]. A query sees none of the keys from
        this number on, which then need not be computed. None where that is not
        known before the program runs.
      dropout: function of the weights that applies dropout to them.

    Returns:
      <float>[batch, query, groups, heads, kv].
    """


@dataclasses.dataclass(frozen=True)
class Softmax:
  """Softmax attention. The bias, if any, is the same for all modules."""

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
  """Stick-breaking attention, in which the newest key takes its part first.

  It ignores the bias and the dropout; see `stick_breaking`.

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
  """Stick-breaking attention in which the nearest key takes its part first.

  Keys are visited by distance: first the key at the query's own position, then
  the one after it, the one before it, the second one after it, and so on. If no
  key ahead of the query is visible, this is StickBreaking. Bias and dropout are
  ignored.

  Source: the order is that of geometric attention (arXiv 2110.07732), which
  however leaves out the query's own position. The part of the stick that no key
  takes is dropped, as in ModuleFormer.
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
    # [query, key]: logits and mask are sorted into the order of the visits, and
    # weights are sorted back, so that values stay where they are.
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
  """Returns the order in which each query visits keys, for NearestFirst.

  Args:
    length: number of queries and of keys.

  Returns:
    numpy array <int>[query, key] of keys. The key that is visited first stands
    last, as the newest key does in stick-breaking.
  """
  places = np.arange(length)
  ahead = places[None, :] - places[:, None]
  return np.argsort(-(2 * np.abs(ahead) - (ahead > 0)), axis=1)


def _logits(query, key):
  scale = query.shape[-1] ** -0.5
  logits = jnp.einsum('bqghd,bkhd->bghqk', query * scale, key)
  return logits.astype(jnp.float32)
