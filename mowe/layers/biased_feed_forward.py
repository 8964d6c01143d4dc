"""The feed-forward of the first Transformers: one ReLU layer with biases."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import linear, parameter


class BiasedFeedForward(nn.Module):
  """relu(x wi + wi_bias) wo + wo_bias.

  Source: arXiv 1706.03762, section 3.3; the dense baseline of arXiv 2310.10837.

  Attributes:
    mlp_dim: hidden units.
    init_scale: variance of the kernels times fan-in; 2 / blocks in the models
      of arXiv 2310.10837.
    dropout_rate: dropout of the hidden units, shared along the length.
    dtype: dtype of the computation.

  Call: tokens <float>[batch, length, embed] to the same shape; `routing_ids`
    are taken and ignored, as every feed-forward has one call.
  """

  mlp_dim: int
  init_scale: float = 1.0
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: Any = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    del routing_ids
    hidden = jax.nn.relu(
      self._affine('wi', self.mlp_dim, ('embed', 'mlp'), tokens)
    )
    hidden = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
      hidden, deterministic=deterministic
    )
    return self._affine('wo', tokens.shape[-1], ('mlp', 'embed'), hidden)

  def _affine(self, name, features, axes, inputs):
    init = parameter.variance_scaling(
      self.init_scale, 'fan_in', 'truncated_normal'
    )
    product = linear.Dense(features, axes, init, self.dtype, name=name)(inputs)
    bias = parameter.declare(
      self, f'{name}_bias', nn.initializers.zeros, (features,), axes=axes[1:]
    )
    return product + bias.astype(self.dtype)[None, None]
