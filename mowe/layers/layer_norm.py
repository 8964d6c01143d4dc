"""T5's layer norm (RMSNorm), which subtracts no mean and adds no bias."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import parameter


class LayerNorm(nn.Module):
  """Divides by the root mean square of the last axis and scales.

  Source: T5, arXiv 1910.10683, section 2.1. The mean square is computed in
  float32. The scale is applied after the cast to `dtype`, as in T5X, so that
  restored checkpoints give the same bits.

  Attributes:
    epsilon: added to the mean square, so that it is never zero.
    starts_at_zero: whether fresh scales are 0 instead of 1, as after a layer
      that is to add nothing at first.
    dtype: dtype of the result.

  Call: tokens <float>[..., embed] to <dtype>[..., embed].
  """

  epsilon: float = 1e-6
  starts_at_zero: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    scale = parameter.declare(
      self,
      'scale',
      nn.initializers.zeros if self.starts_at_zero else nn.initializers.ones,
      (tokens.shape[-1],),
      axes=('embed',),
    )
    tokens = tokens.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(tokens), axis=-1, keepdims=True)
    normed = (tokens * jax.lax.rsqrt(mean_square + self.epsilon)).astype(
      self.dtype
    )
    leading = tuple(range(normed.ndim - 1))
    return normed * jnp.expand_dims(scale.astype(self.dtype), leading)
