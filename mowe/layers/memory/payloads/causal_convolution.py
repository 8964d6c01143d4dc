"""A convolution of each feature along the text, which looks back only."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import parameter


class CausalConvolution(nn.Module):
  """Sums weighted earlier tokens, each feature by itself.

  Attributes:
    kernel_size: how many tokens are summed, the present one among them.
    dilation: distance between two of them.
    dtype: dtype of the computation.

  Call: tokens <float>[batch, length, ...] to the same shape. `segment_ids`
    <int32>[batch, length] keeps the texts of a packed row apart. With `decode`
    and a cache, the call computes one token, and the cache has those before it.
    The kernel is zero at the start.
  """

  kernel_size: int = 4
  dilation: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    decode: bool = False,
  ) -> jax.Array:
    features = tokens.shape[2:]
    kernel = parameter.declare(
      self,
      'kernel',
      nn.initializers.zeros,
      (self.kernel_size, *features),
      axes=('tap', *('branch',) * (len(features) - 1), 'embed'),
    ).astype(self.dtype)
    reach = (self.kernel_size - 1) * self.dilation
    batch, length = tokens.shape[:2]
    before = jnp.zeros((batch, reach, *features), self.dtype)
    if decode:
      is_step = self.has_variable('cache', 'recent')
      recent = self.variable('cache', 'recent', lambda: before)
      if is_step:
        before = recent.value
        recent.value = jnp.concatenate([before, tokens], axis=1)[:, length:]
    padded = jnp.concatenate([before, tokens], axis=1)
    total = jnp.zeros_like(tokens)
    for tap in range(self.kernel_size):
      start = tap * self.dilation
      shifted = padded[:, start : start + length]
      weight = kernel[tap][None, None]
      if segment_ids is not None and start < reach:
        same = _same_segment(segment_ids, reach - start)
        shifted = jnp.where(
          jnp.expand_dims(same, tuple(range(2, tokens.ndim))), shifted, 0
        )
      total += shifted * weight
    return total


def _same_segment(segment_ids, distance):
  """Whether the token so far before each is of its segment, [batch, length]."""
  length = segment_ids.shape[1]
  earlier = jnp.pad(segment_ids, ((0, 0), (distance, 0)), constant_values=-1)
  return earlier[:, :length] == segment_ids
