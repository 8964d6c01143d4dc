"""The original layer norm, which subtracts the mean and adds a bias.

T5 uses neither, see `layer_norm`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import parameter


class CenteredLayerNorm(nn.Module):
  """Subtracts the mean, divides by the standard deviation, scales and shifts.

  Source: arXiv 1607.06450. The computation is in float32, and only the result
  is cast to `dtype`.

  Attributes:
    epsilon: added to the variance, so that it is never zero.
    dtype: dtype of the result.

  Call: tokens <float>[..., embed] to <dtype>[..., embed].
  """

  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    size = (tokens.shape[-1],)
    declare = lambda name, init: parameter.declare(
      self, name, init, size, axes=('embed',)
    )
    scale = declare('scale', nn.initializers.ones)
    bias = declare('bias', nn.initializers.zeros)
    tokens = tokens.astype(jnp.float32)
    centered = tokens - jnp.mean(tokens, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(variance + self.epsilon)
    leading = tuple(range(normed.ndim - 1))
    normed = normed * jnp.expand_dims(scale, leading)
    return (normed + jnp.expand_dims(bias, leading)).astype(self.dtype)
