"""A dense feed-forward of which only the strongest units act."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import linear, parameter


class TopKFeedForward(nn.Module):
  """Two layers with ReLU; of each token's hidden units the k largest stay.

  Units as large as the k-th stay as well, so ties may leave more than k; a
  token with fewer than k positive units keeps them all. Dropout comes before
  the choice. The first layer is computed whole.

  Source: arXiv 2310.10837, section 3; https://github.com/RobertCsordas/moe.

  Attributes:
    mlp_dim: hidden units.
    k: units that stay.
    ranks_by_effect: units are ranked by their activation times the norm of
      their row of the second kernel, instead of by the activation.
    use_bias: both layers have a bias, as in the paper.
    dropout_rate: dropout of the hidden units, shared along the length.
    dtype: dtype of the computation; ranks are float32.

  Call: tokens <float>[batch, length, embed] to the same shape; `routing_ids`
    are taken and ignored.

  Raises:
    ValueError: k is not in 1..mlp_dim.
  """

  mlp_dim: int
  k: int
  ranks_by_effect: bool = False
  use_bias: bool = False
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  def __post_init__(self):
    if not 1 <= self.k <= self.mlp_dim:
      raise ValueError(
        f'k must lie in 1..{self.mlp_dim}, the hidden units, but is {self.k}. '
        'The paper keeps 64 to 512 of some 2,000.'
      )
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: Any = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    del routing_ids
    embed_dim = tokens.shape[-1]
    sizes = {'embed': embed_dim, 'mlp': self.mlp_dim}
    wi, wo = (
      _Weights(tuple(sizes[a] for a in axes), axes, self.use_bias, name=name)()
      for name, axes in (('wi', ('embed', 'mlp')), ('wo', ('mlp', 'embed')))
    )
    hidden = jax.nn.relu(self._affine(tokens, *wi))
    hidden = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
      hidden, deterministic=deterministic
    )
    ranks = hidden.astype(jnp.float32)
    if self.ranks_by_effect:
      ranks *= jnp.linalg.norm(wo[0], axis=1)[None, None, :]
    return self._affine(strongest(hidden, ranks, self.k), *wo)

  def _affine(self, inputs, kernel, bias):
    outputs = linear.project(
      inputs.astype(self.dtype), kernel.astype(self.dtype)
    )
    if bias is not None:
      outputs += bias.astype(self.dtype)[None, None, :]
    return outputs


class _Weights(nn.Module):
  """A module of its own for the names `wi/kernel` and `wi/bias`."""

  shape: tuple[int, int]
  axes: tuple[str, str]
  use_bias: bool

  @nn.compact
  def __call__(self):
    kernel = parameter.declare(
      self, 'kernel', linear.dense_init, self.shape, self.axes
    )
    if not self.use_bias:
      return kernel, None
    zeros = nn.initializers.zeros
    return kernel, parameter.declare(
      self, 'bias', zeros, self.shape[1:], self.axes[1:]
    )


def strongest(hidden: jax.Array, ranks: jax.Array, k: int) -> jax.Array:
  """`hidden` <float>[..., units] where `ranks` are at least the k-th largest.

  No gradient goes through the choice.
  """
  threshold = jax.lax.top_k(ranks, k)[0][..., -1:]
  return jnp.where(jax.lax.stop_gradient(ranks >= threshold), hidden, 0)
