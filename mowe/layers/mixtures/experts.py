"""What one expert of a mixture computes, for one of them or for a batch."""

import dataclasses

import jax

from mowe.layers import feed_forward
from mowe.layers.dispatch import sorted_experts


@dataclasses.dataclass(frozen=True)
class FeedForward:
  """Two layers, as the dense feed-forward.

  Kernels are `wi`, or `wi_0` and `wi_1`, <float>[..., embed, expert_mlp], and
  `wo` <float>[..., expert_mlp, embed]; `wi_bias` <float>[..., expert_mlp] and
  `wo_bias` <float>[..., embed] are added where they are given.

  Attributes:
    activations: as in the dense feed-forward.
  """

  activations: tuple[str, ...]

  def __call__(
    self,
    rows: jax.Array,
    kernels: sorted_experts.Arrays,
    keep: jax.Array | None,
    weights: jax.Array | None = None,
  ) -> jax.Array:
    hidden = feed_forward.hidden_units(rows, kernels, self.activations)
    if keep is not None:
      hidden *= keep
    # Before the second product: its outputs are not needed for the gradient
    # of the weights then.
    outputs = _weighted(hidden, weights) @ kernels['wo']
    bias = kernels.get(feed_forward.bias_name('wo'))
    if bias is None:
      return outputs
    return outputs + _weighted(bias[..., None, :], weights)


def project(
  rows: jax.Array,
  kernels: sorted_experts.Arrays,
  keep: jax.Array | None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """One product with the only kernel, <float>[..., in, out]."""
  del keep
  (kernel,) = kernels.values()
  return _weighted(rows, weights) @ kernel


def _weighted(values, weights):
  return values if weights is None else (values * weights).astype(values.dtype)
