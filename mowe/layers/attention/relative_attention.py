"""Attention with the relative positions of Transformer-XL."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.layers import linear, parameter
from mowe.layers.attention import self_attention


class RelativeAttention(self_attention.SelfAttention):
  """Self-attention in which distances have keys of their own.

  Source: Transformer-XL, arXiv 1901.02860, section 3.3. The logit of query i
  and key j is ((q_i + u) k_j + (q_i + v) r_{i-j}) / sqrt(kv). Here r is a
  projection of a sinusoid of the distance, and u and v are learned vectors of
  each head. The parameter of u is `content_bias`, that of v `position_bias`;
  both start at zero.

  Attributes:
    init_scale: variance of all fresh kernels times their fan-in. The models of
      arXiv 2310.10837 use 2 / number of blocks.

  The other attributes and the call are those of SelfAttention.
  """

  init_scale: float = 1.0

  # There are keys only for distances that are not negative.
  looks_back_only = True

  def setup(self):
    joined = self.num_heads * self.head_dim
    init = parameter.variance_scaling(
      self.init_scale, 'fan_in', 'truncated_normal'
    )
    project = lambda: linear.Dense(
      joined, ('embed', 'joined_kv'), init, self.dtype
    )
    self.query, self.key, self.value = project(), project(), project()
    self.position = project()
    shape, axes = (self.num_heads, self.head_dim), ('heads', 'kv')
    declare = functools.partial(
      parameter.declare,
      self,
      initializer=nn.initializers.zeros,
      shape=shape,
      axes=axes,
    )
    self.content_bias = declare('content_bias')
    self.position_bias = declare('position_bias')
    self.weights_dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))

  @nn.compact
  def _out(self, attended: jax.Array, features: int) -> jax.Array:
    init = parameter.variance_scaling(
      self.init_scale, 'fan_in', 'truncated_normal'
    )
    return linear.Dense(
      features, ('joined_kv', 'embed'), init, self.dtype, name='out'
    )(attended)

  def _place(self, queries, keys, key_positions, positions, embed_dim):
    del key_positions
    scale = self.head_dim**-0.5
    add = lambda bias: (queries + bias.astype(self.dtype)[None, None]) * scale
    # There is one key r for each distance, from 0 to the number of keys - 1.
    codes = sinusoids(jnp.arange(positions.keys.shape[0]), embed_dim)
    distances = self._split_heads(self.position(codes.astype(self.dtype)))
    of_distances = jnp.einsum(
      'bqhd,khd->bhqk', add(self.position_bias), distances
    )
    return add(self.content_bias), keys, by_distance(of_distances, positions)


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
  """Returns the sinusoidal encodings of positions: sines, then cosines.

  Source: arXiv 1706.03762, section 3.5. Frequency i is 10000^(-2i/width).

  Args:
    positions: <int32>[length].
    width: size of one encoding.

  Returns:
    <float32>[length, width].
  """
  speeds = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
  angles = positions[:, None].astype(jnp.float32) * speeds[None, :]
  both = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return both[:, :width]


def by_distance(
  values: jax.Array, positions: self_attention.Positions
) -> jax.Array:
  """Turns values for distances into values for keys.

  Each query has one value for each distance, and needs them in the order of the
  keys. That is a gather, which the shift of Transformer-XL does by padding and
  reshaping alone.

  Args:
    values: <float>[batch, heads, query, distance], for the distances from 0 to
      the number of keys - 1.
    positions: the positions of queries and of keys, each without gaps.

  Returns:
    <float>[batch, heads, query, key], the value for the distance of query and
    key; an arbitrary number where the key lies ahead of the query.
  """
  num_queries, num_keys = values.shape[-2:]
  # The shift below holds if the queries are the last of the keys. In training
  # they are, and as positions are numpy arrays there, this is known beforehand.
  # Elsewhere values are rolled along the distances to make up for it.
  missing = positions.keys[num_keys - num_queries] - positions.queries[0]
  if not isinstance(missing, np.integer) or missing:
    values = jnp.roll(values, missing, axis=-1)
  # Distances now fall along each row, as they do from key to key. With a column
  # added in front, column c is the distance num_keys - c. All numbers but the
  # first num_queries are then read as rows of num_keys numbers, one less than
  # before. So row i starts at column num_queries - i, which is the distance of
  # query i and the first key.
  falling = jnp.flip(values, axis=-1)
  padded = jnp.pad(falling, ((0, 0), (0, 0), (0, 0), (1, 0)))
  leading = values.shape[:2]
  shifted = padded.reshape(*leading, num_keys + 1, num_queries)[:, :, 1:]
  return shifted.reshape(*leading, num_queries, num_keys)
