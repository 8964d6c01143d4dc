"""The computation of an expert of a mixture, for one expert or for a batch."""

import dataclasses

import jax

from mowe.layers import feed_forward
from mowe.layers.dispatch import sorted_experts


@dataclasses.dataclass(frozen=True)
class ExpertFeedForward:
  """An expert that computes what a dense feed-forward computes.

  Attributes:
    activations: names of the activations, as in DenseFeedForward: one name, or
      two for a gated expert.

  Call: computes rows that belong to one expert, or to a batch of experts along
    the leading axes.

    Args:
      rows: <float>[..., rows, embed], the tokens of the expert.
      kernels: `wi`, or `wi_0` and `wi_1` if gated, <float>[..., embed,
        expert_mlp], and `wo` <float>[..., expert_mlp, embed]. The biases
        `wi_bias` (or `wi_0_bias` and `wi_1_bias`) <float>[..., expert_mlp] and
        `wo_bias` <float>[..., embed] are optional.
      keep: <float>[..., rows, expert_mlp], the dropout mask by which the hidden
        units are multiplied; None without dropout.
      weights: <float32>[..., rows, 1], by which the outputs are multiplied;
        None if they are not.

    Returns:
      <float>[..., rows, embed].
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
    # The weights multiply the hidden units, not the outputs. Their gradient
    # then needs the hidden units, which the gradient of `wo` needs as well, and
    # the outputs do not have to be kept for it.
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
  """An expert that is one product, such as the queries of a module.

  Args:
    rows: <float>[..., rows, in].
    kernels: a dict with one kernel, <float>[..., in, out], under any name.
    keep: not used; it is there because all experts are called alike.
    weights: <float32>[..., rows, 1], by which the outputs are multiplied; None
      if they are not.

  Returns:
    <float>[..., rows, out].
  """
  del keep
  (kernel,) = kernels.values()
  return _weighted(rows, weights) @ kernel


def _weighted(values, weights):
  return values if weights is None else (values * weights).astype(values.dtype)
