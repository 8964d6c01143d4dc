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
  and key j is ((q_i + u) k_j + (q_i + v) r_{i-j}) / sqrt(kv), where r is a
  projection of a sinusoid of the distance, and u and v belong to the heads.
  The bias u is `content_bias`, v is `position_bias`, both begin at zero.

  Attributes:
    init_scale: variance of all kernels times fan-in; 2 / blocks in the models
      of arXiv 2310.10837.
  """

  init_scale: float = 1.0

  # Keys of distances are made for those that are not negative.
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
    # One key for each distance, 0 to the number of keys - 1.
    codes = sinusoids(jnp.arange(positions.keys.shape[0]), embed_dim)
    distances = self._split_heads(self.position(codes.astype(self.dtype)))
    of_distances = jnp.einsum(
      'bqhd,khd->bhqk', add(self.position_bias), distances
    )
    return add(self.content_bias), keys, by_distance(of_distances, positions)


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
  """Sines, then cosines, of positions at many speeds, <float32>[length, width].

  Source: arXiv 1706.03762, section 3.5: speed i is 10000^(-2i/width).
  """
  speeds = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
  angles = positions[:, None].astype(jnp.float32) * speeds[None, :]
  both = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return both[:, :width]


def by_distance(
  values: jax.Array, positions: self_attention.Positions
) -> jax.Array:
  """From values of distances to values of keys.

  Args:
    values: <float>[batch, heads, query, key], the last axis a distance.
    positions: of queries and of keys, each without gaps.

  Returns:
    <float>[batch, heads, query, key], of the distance of query and key; where
    it is negative, a number that means nothing.
  """
  num_queries, num_keys = values.shape[-2:]
  # As if the queries stood at the last keys. They do while training, where
  # positions are numpy's.
  missing = positions.keys[num_keys - num_queries] - positions.queries[0]
  if not isinstance(missing, np.integer) or missing:
    values = jnp.roll(values, missing, axis=-1)
  # Transformer-XL's shift: with the distances falling along the row, and a
  # column more, reading the rows with one number less moves each by one place.
  falling = jnp.flip(values, axis=-1)
  padded = jnp.pad(falling, ((0, 0), (0, 0), (0, 0), (1, 0)))
  leading = values.shape[:2]
  shifted = padded.reshape(*leading, num_keys + 1, num_queries)[:, :, 1:]
  return shifted.reshape(*leading, num_queries, num_keys)
