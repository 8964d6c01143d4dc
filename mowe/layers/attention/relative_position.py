"""T5's relative position bias."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.layers import parameter


def position_bucket(
  relative_position: jax.Array,
  *,
  bidirectional: bool,
  num_buckets: int = 32,
  max_distance: int = 128,
) -> jax.Array:
  """Returns the bucket of a distance.

  Each short distance has a bucket of its own. Longer distances share buckets,
  whose sizes grow exponentially with the distance.

  Source: T5, arXiv 1910.10683, section 2.1, and its Mesh TensorFlow code.

  Args:
    relative_position: <int32>[...], position of the key minus that of the
      query.
    bidirectional: whether keys after the query have buckets of their own.
      Otherwise they share bucket 0.
    num_buckets: number of buckets.
    max_distance: the distance from which on all share the last bucket.

  Returns:
    <int32>[...] in [0, num_buckets).
  """
  offset = 0
  distance = -relative_position
  if bidirectional:
    num_buckets //= 2
    offset = (distance < 0).astype(jnp.int32) * num_buckets
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(distance, 0)
  num_exact = num_buckets // 2
  # The epsilon keeps log(0) finite. Distance 0 does not use the result.
  ratio = distance.astype(jnp.float32) / num_exact + np.finfo(np.float32).eps
  far = num_exact + (
    jnp.log(ratio)
    / np.log(max_distance / num_exact)
    * (num_buckets - num_exact)
  ).astype(jnp.int32)
  far = jnp.minimum(far, num_buckets - 1)
  return offset + jnp.where(distance < num_exact, distance, far)


class RelativePositionBias(nn.Module):
  """T5's relative position bias: one number for each head and bucket.

  Attributes:
    num_heads: number of heads.
    bidirectional: whether keys after the query have buckets of their own.
    num_buckets: number of buckets.
    max_distance: the distance from which on all share the last bucket.
    dtype: dtype of the result.

  Call: query_positions <int32>[query], key_positions <int32>[key] to
    <dtype>[1, heads, query, key].
  """

  num_heads: int
  bidirectional: bool
  num_buckets: int = 32
  max_distance: int = 128
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, query_positions: jax.Array, key_positions: jax.Array
  ) -> jax.Array:
    table = parameter.declare(
      self,
      'rel_embedding',
      parameter.variance_scaling(1.0, 'fan_avg', 'uniform'),
      (self.num_heads, self.num_buckets),
      axes=('heads', 'relpos_buckets'),
    )
    buckets = position_bucket(
      key_positions[None, :] - query_positions[:, None],
      bidirectional=self.bidirectional,
      num_buckets=self.num_buckets,
      max_distance=self.max_distance,
    )
    # A product with one-hot buckets, because its gradient is a product as well.
    # The gradient of a gather would be a slow scatter of query x key numbers.
    one_hot = jax.nn.one_hot(buckets, self.num_buckets, dtype=self.dtype)
    bias = jnp.einsum('hr,qkr->hqk', table.astype(self.dtype), one_hot)[None]
    # The gradient is a sum over the sequences and layers, and then a product.
    # Without the barrier, XLA on CPU would fuse both into one slow loop.
    return jax.lax.optimization_barrier(bias)
