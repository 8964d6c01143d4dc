"""Router logits of ModuleFormer: with a hidden layer, or from centroids.

The classes here are values of the fields `logits` and `losses` of a MoeLayer or
of a mixture of attention heads. ModuleFormer's choice itself is TokensChoose;
the weights are the softmax over all experts, and are not renormalised.

Source: ModuleFormer, arXiv 2306.04640, and its code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from mowe.layers import parameter
from mowe.layers.routers import router_base, router_losses

_init = parameter.normal(0.02)


class MlpRouterWeights(router_base.RouterWeights):
  """Logits gelu(x W1 + b1) W2, with the exact GELU.

  Attributes:
    hidden_dim: number of hidden units.

  The other attributes and the call are those of RouterWeights.
  """

  hidden_dim: int = 256

  def project(self, tokens: jax.Array) -> jax.Array:
    """See `RouterWeights`."""
    hidden = router_base.Projection(
      self.hidden_dim, True, _init, name='hidden'
    )(tokens)
    return router_base.Projection(
      self.num_experts,
      self.use_bias,
      self.kernel_init,
      name='w',
    )(jax.nn.gelu(hidden, approximate=False))


class CentroidRouterWeights(router_base.RouterWeights):
  """Logits are cosines of a projection with centroids, times a learned scale.

  There is one centroid for each expert. The scale is exp(log_scale), and starts
  at 1.

  Attributes:
    hidden_dim: width of the projection and of the centroids.

  The other attributes and the call are those of RouterWeights.
  """

  hidden_dim: int = 256

  def project(self, tokens: jax.Array) -> jax.Array:
    """See `RouterWeights`."""
    projected = router_base.Projection(
      self.hidden_dim, False, _init, name='hidden'
    )(tokens)
    centroids = partitioning.param_with_axes(
      'centroids',
      nn.initializers.normal(1.0),
      (self.num_experts, self.hidden_dim),
      jnp.float32,
      axes=('unmodeled', 'embed'),
    )
    log_scale = partitioning.param_with_axes(
      'log_scale', nn.initializers.zeros, (1,), jnp.float32, axes=('unmodeled',)
    )
    cosines = jnp.einsum(
      'gth,eh->gte',
      _unit(projected),
      _unit(centroids),
      precision=jax.lax.Precision.HIGHEST,
    )
    return cosines * jnp.exp(log_scale)[None, None, :]


def _unit(vectors):
  """Scales vectors <float32>[..., dim] to length one; zeros stay zeros."""
  squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
  # The maximum keeps the gradient finite for vectors of zeros.
  return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


@dataclasses.dataclass(frozen=True)
class MlpLogits:
  """Logits with a hidden layer, the default of ModuleFormer.

  Attributes:
    hidden_dim: number of hidden units.
  """

  hidden_dim: int = 256

  def build(self, *arguments: Any, **named: Any) -> nn.Module:
    """See `router_base.Logits`."""
    return MlpRouterWeights(*arguments, hidden_dim=self.hidden_dim, **named)


@dataclasses.dataclass(frozen=True)
class CentroidLogits:
  """Logits from centroids, called `gmm` in ModuleFormer's code.

  Attributes:
    hidden_dim: width of the projection and of the centroids.
  """

  hidden_dim: int = 256

  def build(self, *arguments: Any, **named: Any) -> nn.Module:
    """See `router_base.Logits`."""
    return CentroidRouterWeights(
      *arguments, hidden_dim=self.hidden_dim, **named
    )


@dataclasses.dataclass(frozen=True)
class PaddedMeans(router_losses.RouterLosses):
  """Router losses that are means over all tokens, padding included.

  Padding counts as a token whose probabilities are zero and, in the z-loss, as
  one whose logits are zero. So does ModuleFormer's code by its `skip_mask`; the
  class is for comparisons with it.
  """

  def sums(self, logits, probs, num_chosen, is_valid) -> dict[str, jax.Array]:
    """See `RouterLosses`."""
    ours = super().sums(logits, probs, num_chosen, is_valid)
    logits = logits * is_valid[:, :, None]
    return ours | {
      'z_loss': jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2),
      'num_loss_tokens': jnp.asarray(is_valid.size, jnp.float32),
    }
