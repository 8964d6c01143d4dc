"""Product-key memories: values by keys that are pairs of half-keys."""

import fractions
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.layers import feed_forward_base, linear, parameter

_ACTIVATIONS = {'relu': jax.nn.relu, 'softmax': jax.nn.softmax}


class DenseProductKeyMemory(feed_forward_base.FeedForward):
  """A feed-forward of n x n values, the keys of which are n + n half-keys.

  Every value is read, and the scores of the heads are added up before the
  activation: this is what was trained in all published comparisons. With one
  query for all heads, heads change the initialisation only.

  Source: arXiv 2310.10837, section 4; https://github.com/RobertCsordas/moe.

  Attributes:
    num_values: rows of the table of values, a square number: of n half-keys
      for each half of the query.
    num_heads: sets of half-keys; they share the values.
    activation: 'relu', or 'softmax' over all scores of a token.
    num_first_keys: where the halves have different numbers of keys, that of the
      first half, a divisor of `num_values`.
    use_query_projection: each head has a query of its own, a projection of the
      token, instead of the token itself.
    num_layers: blocks of the stack, for the initialisation.
    dropout_rate: taken, as every feed-forward is given one; there is none.
    dtype: dtype of the values' computation; scores are float32.

  Call: tokens <float>[batch, length, embed] to <dtype> of the same shape;
    `routing_ids` are taken and ignored.

  Raises:
    ValueError: sizes that do not factor, or an unknown activation.
  """

  num_values: int
  num_heads: int = 4
  activation: str = 'relu'
  num_first_keys: int | None = None
  use_query_projection: bool = False
  num_layers: int = 12
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  def __post_init__(self):
    if self.activation not in _ACTIVATIONS:
      raise ValueError(
        f'activation must be one of {sorted(_ACTIVATIONS)}, but is '
        f'{self.activation!r}. relu was better in every comparison.'
      )
    if min(self.num_values, self.num_heads, self.num_layers) < 1:
      raise ValueError(
        'num_values, num_heads and num_layers must be positive, but are '
        f'{self.num_values}, {self.num_heads} and {self.num_layers}. 4 heads '
        'are usual.'
      )
    first, second = self.num_keys()
    if first * second != self.num_values:
      raise ValueError(_no_factors(self.num_values, self.num_first_keys))
    super().__post_init__()

  def num_keys(self) -> tuple[int, int]:
    """Half-keys of each half of a query."""
    first = self.num_first_keys or math.isqrt(self.num_values)
    return first, self.num_values // first

  def share_read(self, name: str) -> fractions.Fraction:
    """Share of the parameter `name` that one token is multiplied with."""
    del name
    return fractions.Fraction(1)

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: Any = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    del routing_ids, deterministic
    embed_dim = tokens.shape[-1]
    if embed_dim % 2:
      raise ValueError(
        'The width of the model must be even, as each half-key meets one half '
        f'of it, but is {embed_dim}. Make emb_dim {embed_dim + 1}.'
      )
    # [batch, length, embed] -> [tokens, embed]
    flat = tokens.reshape(-1, embed_dim)
    queries = self._queries(flat.astype(jnp.float32))
    keys = [
      parameter.declare(
        self,
        f'keys_{half}',
        parameter.normal(self._std(embed_dim)),
        (self.num_heads, number, embed_dim // 2),
        ('heads', 'kv', 'embed'),
      )
      for half, number in enumerate(self.num_keys())
    ]
    values = parameter.declare(
      self,
      'values',
      parameter.normal(self._std(self.num_values)),
      (self.num_values, embed_dim),
      ('unmodeled', 'embed'),
    )
    outputs = self.read(queries, keys, values.astype(self.dtype))
    return outputs.reshape(tokens.shape)

  def read(
    self,
    queries: jax.Array,
    keys: list[jax.Array],
    values: jax.Array,
  ) -> jax.Array:
    """Outputs <dtype>[tokens, embed].

    Args:
      queries: <float32>[tokens, heads, embed], or one for all heads.
      keys: of both halves, <float32>[heads, keys, embed / 2].
      values: <dtype>[values, embed].
    """
    # [tokens, heads, keys] -> [tokens, keys]
    first, second = (jnp.sum(s, axis=1) for s in half_scores(queries, keys))
    scores = first[:, :, None] + second[:, None, :]
    weights = _ACTIVATIONS[self.activation](scores.reshape(len(queries), -1))
    return linear.project(weights.astype(self.dtype), values)

  def _queries(self, tokens):
    if not self.use_query_projection:
      return tokens[:, None, :]
    shape = (tokens.shape[1], self.num_heads * tokens.shape[1])
    kernel, bias = _Query(shape, self._std(tokens.shape[1]), name='query')()
    queries = linear.project(tokens, kernel) + bias[None, :]
    return queries.reshape(len(tokens), self.num_heads, -1)

  def _std(self, fan_in):
    return math.sqrt(2 / (self.num_layers * fan_in))


class ProductKeyMemory(DenseProductKeyMemory):
  """The same, of which each token reads few values, and heads differ.

  Each head chooses the `knn` largest of all sums of two scores, exactly, by
  looking at the best half-keys only. The activation is of all heads' scores
  together; where heads choose the same value, their weights add up.

  Source: Lample et al., arXiv 1907.05242, with the changes of arXiv 2310.10837:
  no batch normalisation, ReLU, in every layer.

  Attributes:
    knn: values that a head chooses for a token.
  """

  knn: int = 32

  def __post_init__(self):
    super().__post_init__()
    if not 1 <= self.knn <= self.num_values:
      raise ValueError(
        f'knn must lie in 1..{self.num_values}, the number of values, but is '
        f'{self.knn}. For all of them use DenseProductKeyMemory.'
      )

  def share_read(self, name: str) -> fractions.Fraction:
    """Share of the parameter `name` that one token is multiplied with."""
    if name != 'values':
      return fractions.Fraction(1)
    share = fractions.Fraction(self.knn * self.num_heads, self.num_values)
    return min(fractions.Fraction(1), share)

  def read(
    self,
    queries: jax.Array,
    keys: list[jax.Array],
    values: jax.Array,
  ) -> jax.Array:
    """Outputs <dtype>[tokens, embed]; see DenseProductKeyMemory."""
    index, scores = best_pairs(*half_scores(queries, keys), self.knn)
    # [tokens, heads, knn] -> [tokens, heads * knn]
    index, scores = (x.reshape(len(queries), -1) for x in (index, scores))
    weights = _ACTIVATIONS[self.activation](scores)
    return weighted_rows(values, index, weights.astype(self.dtype))


class _Query(nn.Module):
  """A module of its own for the names `query/kernel` and `query/bias`."""

  shape: tuple[int, int]
  stddev: float

  @nn.compact
  def __call__(self):
    kernel = parameter.declare(
      self,
      'kernel',
      parameter.normal(self.stddev),
      self.shape,
      ('embed', 'joined_kv'),
    )
    zeros = nn.initializers.zeros
    return kernel, parameter.declare(
      self, 'bias', zeros, self.shape[1:], ('joined_kv',)
    )


def half_scores(queries: jax.Array, keys: list[jax.Array]) -> list[jax.Array]:
  """Scores <float32>[tokens, heads, keys] of both halves.

  In float32 whatever the model computes in: they are ranked.

  Args:
    queries: <float32>[tokens, heads, embed], or one for all heads.
    keys: of both halves, <float32>[heads, keys, embed / 2].
  """
  num_heads, _, width = keys[0].shape
  queries = jnp.broadcast_to(queries, (len(queries), num_heads, 2 * width))
  return [
    jnp.einsum('thm,hnm->thn', half, own, precision=jax.lax.Precision.HIGHEST)
    for half, own in zip(jnp.split(queries, 2, axis=-1), keys, strict=True)
  ]


def best_pairs(
  first: jax.Array, second: jax.Array, knn: int
) -> tuple[jax.Array, jax.Array]:
  """The `knn` largest sums of a score of each half, in order.

  Args:
    first: <float32>[..., n1].
    second: <float32>[..., n2].
    knn: at most n1 * n2.

  Returns:
    Indices i1 * n2 + i2 <int32>[..., knn], and the sums <float32>[..., knn].
  """
  (best_1, index_1), (best_2, index_2) = (
    jax.lax.top_k(scores, min(knn, scores.shape[-1]))
    for scores in (first, second)
  )
  # Of sorted scores, the pair of the i-th and j-th best (from 0) has
  # (i + 1) * (j + 1) - 1 pairs before it: most cannot be among the best.
  rank_1, rank_2 = np.indices((best_1.shape[-1], best_2.shape[-1])) + 1
  rows, columns = np.nonzero(rank_1 * rank_2 <= knn)
  sums = best_1[..., rows] + best_2[..., columns]
  index = index_1[..., rows] * second.shape[-1] + index_2[..., columns]
  best, own = jax.lax.top_k(sums, knn)
  return jnp.take_along_axis(index, own, axis=-1), best


@jax.custom_vjp
def weighted_rows(
  values: jax.Array, index: jax.Array, weights: jax.Array
) -> jax.Array:
  """Sums of weighted rows, one row of every token at a time.

  All rows at once would be as many times larger than the tokens as a token has
  rows.

  Args:
    values: <float>[values, embed].
    index: <int32>[tokens, rows].
    weights: <float>[tokens, rows].

  Returns:
    <float>[tokens, embed].
  """

  def add(total, slot):
    own, weight = slot
    return total + weight[:, None] * values[own], None

  zeros = jnp.zeros((index.shape[0], values.shape[1]), values.dtype)
  return jax.lax.scan(add, zeros, (index.T, weights.T))[0]


def _weighted_rows_backward(residuals, cotangent):
  values, index, weights = residuals

  def add(d_values, slot):
    own, weight = slot
    d_weight = jnp.sum(values[own] * cotangent, axis=-1)
    return d_values.at[own].add(weight[:, None] * cotangent), d_weight

  d_values, d_weights = jax.lax.scan(
    add, jnp.zeros_like(values), (index.T, weights.T)
  )
  return d_values, None, d_weights.T


weighted_rows.defvjp(
  lambda *args: (weighted_rows(*args), args), _weighted_rows_backward
)


def _no_factors(num_values, num_first_keys):
  if num_first_keys:
    return (
      f'num_values must be a multiple of num_first_keys, {num_first_keys}, but '
      f'is {num_values}. Nearest: '
      f'{num_first_keys * max(1, round(num_values / num_first_keys))}.'
    )
  root = math.isqrt(num_values)
  return (
    f'num_values must be a square number, but is {num_values}. Nearest: '
    f'{root**2} ({root} half-keys) and {(root + 1) ** 2} ({root + 1}); or set '
    'num_first_keys to a divisor.'
  )
