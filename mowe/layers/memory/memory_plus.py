"""Memory+: product keys choose values that several layers share."""

import fractions
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward_base, linear, parameter
from mowe.layers.memory import product_keys


class MemoryPlus(feed_forward_base.FeedForward):
  """A memory whose address is learned: each token reads the values it asks for.

  Each head of a token forms a query, and chooses the `knn` keys with the
  largest scores. A softmax over a head's scores weighs their values, and heads
  are added up. With o, what was read:

    result = (o * silu(x W_g)) W_o

  The rows that a token reads depend on the tokens around it, so they are known
  only inside the step: a store on the host or on a disk cannot read them ahead.

  Source: arXiv 2412.09764 and the code of its authors.

  Attributes:
    num_half_keys: number of half-keys of each half; there are so many squared
      values.
    num_heads: number of queries of a token.
    key_dim: width of a query, even.
    knn: number of values that a head chooses.
    value_dim: width of a value; None for the width of the model.
    share_values: whether all layers of the model share one table of values, as
      in the paper. Keys are always of one layer.
    is_gated: whether what was read is multiplied by silu(x W_g).
    has_scalar_gate: whether the result is multiplied by sigmoid(x w).
    projects: whether W_o is there. Without it the gate is not either, and
      values have the width of the model.
    use_bias: whether queries, gate and result have biases.
    dropout_rate: ignored, as the layer has no dropout.
    dtype: dtype in which values are read; scores are float32.
    values: the shared ValueTable, which the stack passes in; None if the layer
      has its own.

  Call: tokens <float>[batch, length, embed] to <dtype> of the same shape.

  Raises:
    ValueError: a size is not possible.
  """

  num_half_keys: int
  num_heads: int = 4
  key_dim: int = 512
  knn: int = 32
  value_dim: int | None = None
  share_values: bool = True
  is_gated: bool = True
  has_scalar_gate: bool = False
  projects: bool = True
  use_bias: bool = True
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32
  values: 'ValueTable | None' = None

  def __post_init__(self):
    check_key_sizes(self.num_half_keys, self.num_heads, self.key_dim, self.knn)
    if not self.projects and (self.is_gated or self.has_scalar_gate):
      raise ValueError(
        'A gate of Memory+ needs the projection of the result, but projects is '
        'False. Set is_gated and has_scalar_gate to False as well.'
      )
    super().__post_init__()

  def make_shared(self, embed_dim: int) -> dict[str, nn.Module]:
    if not self.share_values:
      return {}
    return {'memory_values': self._make_values(embed_dim, parent=None)}

  def with_shared(self, shared: Mapping[str, nn.Module]) -> 'MemoryPlus':
    return self.clone(values=shared.get('memory_values'), parent=None)

  def share_read(self, name: str) -> fractions.Fraction:
    """Returns the share of a parameter that each token is multiplied with.

    It is 1 for the half-keys. Of the values it is what all heads choose, at
    most.

    Args:
      name: the last part of the parameter's path.
    """
    if name != 'values':
      return fractions.Fraction(1)
    share = fractions.Fraction(self.knn * self.num_heads, self.num_half_keys**2)
    return min(fractions.Fraction(1), share)

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: Any = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    del routing_ids, deterministic
    table = self.values
    if table is None:
      table = self._make_values(tokens.shape[-1], name='memory_values')
    values = table()
    index, weights = self.choose(tokens)
    read = product_keys.weighted_rows(
      values, _by_token(index), _by_token(weights)
    ).reshape(*tokens.shape[:2], -1)
    return self._result(read, tokens)

  def _make_values(self, embed_dim, **place):
    width = self.value_dim or embed_dim
    return ValueTable(self.num_half_keys**2, width, **place)

  def choose(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the values of each head and their weights.

    Args:
      tokens: <float>[batch, length, embed].

    Returns:
      Arrays <int32> and <dtype>[batch, length, heads, knn].
    """
    queries = self._dense(self.num_heads * self.key_dim, 'query', jnp.float32)(
      tokens
    ).reshape(*tokens.shape[:2], self.num_heads, self.key_dim)
    keys = half_keys(self, self.num_heads, self.num_half_keys, self.key_dim)
    index, scores = choose_keys(queries, keys, self.knn)
    return index, jax.nn.softmax(scores, axis=-1).astype(self.dtype)

  def _result(self, read, tokens):
    if not self.projects:
      return read
    if self.is_gated:
      read = read * nn.silu(self._dense(read.shape[-1], 'gate')(tokens))
    outputs = self._dense(tokens.shape[-1], 'out')(read)
    if self.has_scalar_gate:
      gate = linear.Dense(
        1, ('embed', 'unmodeled'), dtype=self.dtype, name='scalar_gate'
      )(tokens)
      outputs = outputs * nn.sigmoid(gate)
    return outputs

  def _dense(self, features, name, dtype=None):
    return linear.Dense(
      features,
      ('embed', 'joined_kv'),
      dtype=dtype or self.dtype,
      use_bias=self.use_bias,
      name=name,
    )


class ValueTable(nn.Module):
  """The values of all keys.

  Attributes:
    num_values: number of rows.
    value_dim: width of a row.

  Call: returns <float32>[num_values, value_dim].
  """

  num_values: int
  value_dim: int

  @nn.compact
  def __call__(self) -> jax.Array:
    return parameter.declare(
      self,
      'values',
      parameter.normal(1 / math.sqrt(self.value_dim)),
      (self.num_values, self.value_dim),
      ('unmodeled', 'embed'),
    )


def half_keys(
  layer: nn.Module, num_heads: int, num_half_keys: int, key_dim: int
) -> list[jax.Array]:
  """Declares the half-keys of a layer, <float32>[heads, keys, key_dim / 2]."""
  # Uniform in +- 1 / sqrt(key_dim), whose variance is a third of its square.
  init = parameter.variance_scaling(
    1 / 3, 'fan_in', 'uniform', in_axis=-1, out_axis=-2, batch_axis=(0,)
  )
  return [
    parameter.declare(
      layer,
      f'keys_{half}',
      init,
      (num_heads, num_half_keys, key_dim // 2),
      ('heads', 'kv', 'unmodeled'),
    )
    for half in range(2)
  ]


def choose_keys(
  queries: jax.Array, keys: list[jax.Array], knn: int
) -> tuple[jax.Array, jax.Array]:
  """Chooses the keys with the largest scores of each head.

  Args:
    queries: <float32>[batch, length, heads, key_dim].
    keys: <float32>[heads, keys, key_dim / 2] of the first and the second half.
    knn: how many keys a head chooses.

  Returns:
    The numbers of the keys, <int32>[batch, length, heads, knn], and their
    scores <float32>.
  """
  flat = queries.reshape(-1, *queries.shape[2:])
  index, scores = product_keys.best_pairs(
    *product_keys.half_scores(flat, keys), knn
  )
  shape = (*queries.shape[:3], knn)
  return index.reshape(shape), scores.reshape(shape)


def check_key_sizes(
  num_half_keys: int, num_heads: int, key_dim: int, knn: int
) -> None:
  """Raises ValueError unless the sizes of product keys are possible."""
  if min(num_half_keys, num_heads, key_dim) < 1 or key_dim % 2:
    raise ValueError(
      'num_half_keys, num_heads and key_dim must be positive and key_dim even, '
      f'but they are {num_half_keys}, {num_heads} and {key_dim}. A usual choice '
      'is 1024, 4 and 512.'
    )
  if not 1 <= knn <= num_half_keys**2:
    raise ValueError(
      f'knn must lie in 1..{num_half_keys**2}, the number of values, but is '
      f'{knn}. 32 is usual.'
    )


def _by_token(slots):
  """[batch, length, heads, knn] -> [tokens, heads * knn]."""
  return slots.reshape(-1, slots.shape[2] * slots.shape[3])
