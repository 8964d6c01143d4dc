"""PEER: product keys choose experts of one neuron."""

import fractions
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward_base, layer_norm, linear, parameter
from mowe.layers.memory import memory_plus, product_keys

_ACTIVATIONS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'relu': jax.nn.relu,
}


class Peer(feed_forward_base.FeedForward):
  """A feed-forward of neurons that each token chooses out of very many.

    result = sum over heads and chosen i of w_i act(u_i . x) v_i

  The weights w are a softmax over what a head has chosen. As with Memory+, the
  rows that a token reads are known only inside the step.

  Source: arXiv 2407.04153. The paper normalizes queries over the batch, which
  makes the answer of a token depend on its neighbours; here they are normalized
  for each token by itself.

  Attributes:
    num_half_keys: number of half-keys of each half; there are so many squared
      experts.
    num_heads: number of queries of a token.
    key_dim: width of a query, even.
    knn: number of experts that a head chooses.
    activation: 'gelu' or 'relu'.
    normalizes_queries: whether the queries of all heads together go through a
      norm. Without one, few keys are ever used.
    dropout_rate: ignored, as the layer has no dropout.
    dtype: dtype in which experts are read; scores are float32.

  Call: tokens <float>[batch, length, embed] to <dtype> of the same shape.

  Raises:
    ValueError: a size is not possible, or the activation is unknown.
  """

  num_half_keys: int
  num_heads: int = 8
  key_dim: int = 128
  knn: int = 16
  activation: str = 'gelu'
  normalizes_queries: bool = True
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  def __post_init__(self):
    memory_plus.check_key_sizes(
      self.num_half_keys, self.num_heads, self.key_dim, self.knn
    )
    if self.activation not in _ACTIVATIONS:
      raise ValueError(
        f'activation must be one of {sorted(_ACTIVATIONS)}, but is '
        f"{self.activation!r}. Take 'gelu', as the paper does."
      )
    super().__post_init__()

  def share_read(self, name: str) -> fractions.Fraction:
    """Returns the share of a parameter that each token is multiplied with.

    It is 1 for the keys. Of the experts it is at most what all heads choose.

    Args:
      name: the last part of the parameter's path.
    """
    if name not in ('down', 'up'):
      return fractions.Fraction(1)
    chosen = fractions.Fraction(
      self.knn * self.num_heads, self.num_half_keys**2
    )
    return min(fractions.Fraction(1), chosen)

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: Any = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    del routing_ids, deterministic
    down, up = (self._table(name, tokens.shape[-1]) for name in ('down', 'up'))
    index, scores = self.choose(tokens)
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    # [batch, length, ...] -> [tokens, ...]
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(self.dtype)
    index, weights = (
      x.reshape(len(flat), self.num_heads * self.knn) for x in (index, weights)
    )
    products = row_products(down, index, flat)
    weights = weights * _ACTIVATIONS[self.activation](products)
    outputs = product_keys.weighted_rows(up, index, weights)
    return outputs.reshape(tokens.shape)

  def choose(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the experts of each head and their scores.

    Args:
      tokens: <float>[batch, length, embed].

    Returns:
      Arrays <int32> and <float32>[batch, length, heads, knn].
    """
    queries = linear.Dense(
      self.num_heads * self.key_dim,
      ('embed', 'joined_kv'),
      dtype=jnp.float32,
      name='query',
    )(tokens)
    if self.normalizes_queries:
      queries = layer_norm.LayerNorm(name='query_norm')(queries)
    queries = queries.reshape(*tokens.shape[:2], self.num_heads, self.key_dim)
    keys = memory_plus.half_keys(
      self, self.num_heads, self.num_half_keys, self.key_dim
    )
    return memory_plus.choose_keys(queries, keys, self.knn)

  def _table(self, name, embed_dim):
    return parameter.declare(
      self,
      name,
      parameter.normal(1 / math.sqrt(embed_dim)),
      (self.num_half_keys**2, embed_dim),
      ('unmodeled', 'embed'),
    )


@jax.custom_vjp
def row_products(
  rows: jax.Array, index: jax.Array, tokens: jax.Array
) -> jax.Array:
  """Products of each token with rows of a table.

  As in `product_keys.weighted_rows`, a loop goes over the rows of a token, so
  that the rows of all tokens are never gathered at once, and the gradient of
  the table is added up in the table's dtype.

  Args:
    rows: <float32>[rows, embed], the table.
    index: <int32>[tokens, slots], the rows of each token.
    tokens: <float>[tokens, embed].

  Returns:
    [tokens, slots] in the dtype of the tokens.
  """

  def one(_, own):
    return None, jnp.sum(rows[own].astype(tokens.dtype) * tokens, axis=-1)

  return jax.lax.scan(one, None, index.T)[1].T


def _row_products_backward(residuals, cotangent):
  rows, index, tokens = residuals

  def add(totals, slot):
    d_rows, d_tokens = totals
    own, weight = slot
    d_rows = d_rows.at[own].add((weight[:, None] * tokens).astype(rows.dtype))
    own_rows = rows[own].astype(tokens.dtype)
    return (d_rows, d_tokens + weight[:, None] * own_rows), None

  zeros = jnp.zeros_like(rows), jnp.zeros_like(tokens)
  (d_rows, d_tokens), _ = jax.lax.scan(add, zeros, (index.T, cotangent.T))
  return d_rows, None, d_tokens


row_products.defvjp(
  lambda *args: (row_products(*args), args), _row_products_backward
)
