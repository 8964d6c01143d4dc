"""Product-key memories: tables of values whose keys are pairs of half-keys.

With n half-keys for each half of a query there are n * n keys, and so n * n
values. The score of a key is the sum of the scores of its two half-keys. So 2 n
scores are enough to rank n * n values.
"""

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
  """A product-key memory in which each token reads all values.

  The scores of the heads are added up before the activation. This is the layer
  that was trained in all published comparisons. If all heads share one query,
  the number of heads changes nothing but the initialization.

  Source: arXiv 2310.10837, section 4; https://github.com/RobertCsordas/moe.

  Attributes:
    num_values: number of rows of the table of values. It is a square number
      unless `num_first_keys` is given.
    num_heads: number of sets of half-keys; all heads share the values.
    activation: 'relu', or 'softmax' over all scores of a token.
    num_first_keys: number of half-keys of the first half, a divisor of
      `num_values`, where the halves have different numbers of them.
    use_query_projection: whether each head has a query of its own, which is a
      projection of the token. Otherwise the token is the query of all heads.
    num_layers: number of blocks of the stack, on which the standard deviation
      of fresh parameters depends.
    dropout_rate: ignored, as the layer has no dropout. The field is there
      because a model gives a dropout rate to every feed-forward.
    dtype: dtype in which values are read; scores are float32.

  Call: tokens <float>[batch, length, embed] to <dtype> of the same shape. The
    layer takes `routing_ids`, as every feed-forward does, and ignores them.

  Raises:
    ValueError: the activation is unknown, a size is not positive, `num_values`
      is no product of two numbers of half-keys, or the width of the tokens is
      odd.
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
        f'{self.activation!r}. Choose relu, which was better in every '
        'comparison.'
      )
    if min(self.num_values, self.num_heads, self.num_layers) < 1:
      raise ValueError(
        'num_values, num_heads and num_layers must be positive, but are '
        f'{self.num_values}, {self.num_heads} and {self.num_layers}. Set each '
        'of them to at least 1; 4 heads are usual.'
      )
    first, second = self.num_keys()
    if first * second != self.num_values:
      raise ValueError(_no_factors(self.num_values, self.num_first_keys))
    super().__post_init__()

  def num_keys(self) -> tuple[int, int]:
    """Returns the number of half-keys of the first and of the second half."""
    first = self.num_first_keys or math.isqrt(self.num_values)
    return first, self.num_values // first

  def share_read(self, name: str) -> fractions.Fraction:
    """Returns 1: each token is multiplied with all keys and all values."""
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
    outputs = self.read(queries, keys, values)
    return outputs.reshape(tokens.shape)

  def read(
    self,
    queries: jax.Array,
    keys: list[jax.Array],
    values: jax.Array,
  ) -> jax.Array:
    """Returns the outputs of the layer.

    Args:
      queries: <float32>[tokens, heads, embed], or [tokens, 1, embed] for one
        query of all heads.
      keys: <float32>[heads, keys, embed / 2] of the first and the second half.
      values: <float32>[values, embed].

    Returns:
      <dtype>[tokens, embed].
    """
    # Sums over heads and over halves can change places, so the heads are summed
    # before there are n * n scores: [tokens, heads, keys] -> [tokens, keys].
    first, second = (jnp.sum(s, axis=1) for s in half_scores(queries, keys))
    # [tokens, first keys, second keys] -> [tokens, values]
    scores = first[:, :, None] + second[:, None, :]
    weights = _ACTIVATIONS[self.activation](scores.reshape(len(queries), -1))
    return linear.project(weights.astype(self.dtype), values.astype(self.dtype))

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
  """A product-key memory in which each head of a token reads few values.

  Each head chooses the `knn` keys with the largest scores. The choice is exact,
  although it looks at the best half-keys alone; see `best_pairs`. The
  activation is applied to the chosen scores of all heads together. Where heads
  choose the same value, their weights add up.

  Source: Lample et al., arXiv 1907.05242, with the changes of arXiv 2310.10837:
  there is no batch normalization, the activation is ReLU, and every block of
  the stack has such a layer.

  Attributes:
    knn: number of values that a head chooses for a token.

  The other attributes and the call are those of DenseProductKeyMemory.

  Raises:
    ValueError: `knn` is not in 1..num_values, or for a reason that
      DenseProductKeyMemory has.
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
    """Returns the share of a parameter that each token is multiplied with.

    It is 1 for the keys. Of the values it is at most what all heads choose.

    Args:
      name: the last part of the parameter's path.
    """
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
    """Returns the outputs; see `DenseProductKeyMemory.read`."""
    index, scores = best_pairs(*half_scores(queries, keys), self.knn)
    # [tokens, heads, knn] -> [tokens, heads * knn]
    index, scores = (x.reshape(len(queries), -1) for x in (index, scores))
    weights = _ACTIVATIONS[self.activation](scores)
    return weighted_rows(values, index, weights.astype(self.dtype))


class _Query(nn.Module):
  """Declares the parameters of the queries' projection.

  It is a module so that they are called `query/kernel` and `query/bias`.
  """

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
  """Returns the scores of the half-keys, for the first and the second half.

  They are computed in float32 whatever the dtype of the model is, because they
  are ranked, and in bfloat16 many would be equal.

  Args:
    queries: <float32>[tokens, heads, embed], or [tokens, 1, embed] for one
      query of all heads.
    keys: <float32>[heads, keys, embed / 2] of the first and the second half.

  Returns:
    Two arrays <float32>[tokens, heads, keys].
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
  """Finds the keys with the `knn` largest scores, in falling order.

  The score of key (i1, i2) is first[i1] + second[i2]. There are n1 * n2 of
  them, but few can be among the largest, so that only these are formed.

  Args:
    first: <float32>[..., n1], scores of the first half-keys.
    second: <float32>[..., n2], scores of the second half-keys.
    knn: number of keys to find, at most n1 * n2.

  Returns:
    The numbers i1 * n2 + i2 of the keys <int32>[..., knn], and their scores
    <float32>[..., knn].
  """
  # All four arrays are [..., k], where k is knn or, if that is less, the number
  # of half-keys. A half-key beyond the knn-th of its half is not needed: with
  # the same partner, knn better half-keys make knn better pairs.
  (best_1, index_1), (best_2, index_2) = (
    jax.lax.top_k(scores, min(knn, scores.shape[-1]))
    for scores in (first, second)
  )
  # The pair of the i-th best first and the j-th best second half-key, counted
  # from 1, has a sum that is not larger than those of all pairs of ranks up to
  # i and j. So i * j - 1 other pairs come first, and the pair can be among the
  # knn best only if i * j <= knn. For knn = 32, this leaves 119 of 1,024 pairs.
  rank_1, rank_2 = np.indices((best_1.shape[-1], best_2.shape[-1])) + 1
  rows, columns = np.nonzero(rank_1 * rank_2 <= knn)
  # [..., k] -> [..., candidates] -> [..., knn]
  sums = best_1[..., rows] + best_2[..., columns]
  index = index_1[..., rows] * second.shape[-1] + index_2[..., columns]
  best, own = jax.lax.top_k(sums, knn)
  return jnp.take_along_axis(index, own, axis=-1), best


@jax.custom_vjp
def weighted_rows(
  values: jax.Array, index: jax.Array, weights: jax.Array
) -> jax.Array:
  """Sums, for each token, weighted rows of a table.

  The sum is a loop over the rows of a token, and each step adds one row for
  every token. To gather all rows at once would take an array [tokens, rows,
  embed], which is `rows` times larger than the tokens. The gradient is defined
  here, so that its loop also gathers the rows again instead of keeping them.
  The gradient of the table is added up in the table's dtype: thousands of
  tokens may read one row, and a sum in bfloat16 would stop at 256 of them.

  Args:
    values: <float32>[values, embed], the table.
    index: <int32>[tokens, rows], the rows that each token reads.
    weights: <float>[tokens, rows], the weights of these rows.

  Returns:
    [tokens, embed] in the dtype of the weights.
  """

  def add(total, slot):
    own, weight = slot
    return total + weight[:, None] * values[own].astype(weight.dtype), None

  zeros = jnp.zeros((index.shape[0], values.shape[1]), weights.dtype)
  return jax.lax.scan(add, zeros, (index.T, weights.T))[0]


def _weighted_rows_backward(residuals, cotangent):
  values, index, weights = residuals

  def add(d_values, slot):
    own, weight = slot
    rows = values[own].astype(weight.dtype)
    d_weight = jnp.sum(rows * cotangent, axis=-1)
    added = (weight[:, None] * cotangent).astype(values.dtype)
    return d_values.at[own].add(added), d_weight

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
      f'is {num_values}. Set it to the nearest multiple, '
      f'{num_first_keys * max(1, round(num_values / num_first_keys))}.'
    )
  root = math.isqrt(num_values)
  return (
    f'num_values must be a square number, but is {num_values}. Set it to '
    f'{root**2} ({root} half-keys) or to {(root + 1) ** 2} ({root + 1}), or '
    'set num_first_keys to a divisor.'
  )
