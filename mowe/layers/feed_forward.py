"""The dense feed-forward of T5 1.0 (ReLU) and 1.1 (gated GELU)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward_base, linear, parameter

_ACTIVATIONS = {
  'relu': jax.nn.relu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=True),
  'gelu_exact': lambda x: jax.nn.gelu(x, approximate=False),
  'silu': jax.nn.silu,
  'linear': lambda x: x,
}


def check_activations(activations: tuple[str, ...]) -> None:
  """Raises ValueError unless there are names and all are known activations."""
  unknown = [name for name in activations if name not in _ACTIVATIONS]
  if unknown or not activations:
    raise ValueError(
      f'activations must be names out of {sorted(_ACTIVATIONS)}, but are '
      f"{activations}. T5 1.0 uses ('relu',), T5 1.1 ('gelu', 'linear')."
    )


def kernel_names(activations: tuple[str, ...]) -> tuple[str, ...]:
  """Returns T5's names of the input kernels: `wi`, or `wi_0` and `wi_1`.

  Args:
    activations: one name, or two for a gated layer.
  """
  if len(activations) == 1:
    return ('wi',)
  return tuple(f'wi_{i}' for i in range(len(activations)))


def bias_name(kernel_name: str) -> str:
  """Returns the name of the bias that is added after a kernel: `wi_bias`."""
  return f'{kernel_name}_bias'


def hidden_units(
  rows: jax.Array, kernels: dict[str, jax.Array], activations: tuple[str, ...]
) -> jax.Array:
  """Returns the hidden units of a feed-forward.

  Args:
    rows: <float>[..., rows, embed], the inputs.
    kernels: for each name of `kernel_names` its kernel <float>[..., embed,
      mlp]. Under the `bias_name` of a kernel there may be its bias
      <float>[..., mlp], which is added to the projection.
    activations: the activation after each kernel.

  Returns:
    <float>[..., rows, mlp].
  """
  projections = []
  for name in kernel_names(activations):
    projection = rows @ kernels[name]
    if bias_name(name) in kernels:
      projection += kernels[bias_name(name)][..., None, :]
    projections.append(projection)
  return activate(projections, activations)


def activate(
  projections: list[jax.Array], activations: tuple[str, ...]
) -> jax.Array:
  """Returns the product of the activated projections.

  In a gated layer that is, for example, gelu(x wi_0) * (x wi_1).

  Args:
    projections: one array <float>[..., mlp] for each input kernel.
    activations: the activation of each projection.

  Returns:
    <float>[..., mlp].
  """
  hidden = _ACTIVATIONS[activations[0]](projections[0])
  for name, projection in zip(activations[1:], projections[1:], strict=True):
    hidden = hidden * _ACTIVATIONS[name](projection)
  return hidden


class DenseFeedForward(feed_forward_base.FeedForward):
  """Feed-forward of two layers, gated or not.

  Source: T5, arXiv 1910.10683; gating is from arXiv 2002.05202. With ReLU and
  biases the layer is that of arXiv 1706.03762, section 3.3, which is the dense
  baseline of arXiv 2310.10837.

  Attributes:
    mlp_dim: number of hidden units.
    activations: one name, or two for a gated layer.
    dropout_rate: dropout rate of the hidden units. All tokens of a row share
      one mask.
    dtype: dtype of the computation.
    use_bias: whether all projections have a bias.
    init_scale: variance of fresh kernels times their fan-in. The models of
      arXiv 2310.10837 use 2 / number of blocks.

  Call: tokens <float>[batch, length, embed] to <dtype> of the same shape. The
    layer takes `routing_ids`, as every feed-forward does, and ignores them.
  """

  mlp_dim: int
  activations: tuple[str, ...] = ('gelu', 'linear')
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32
  use_bias: bool = False
  init_scale: float = 1.0

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: Any = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    del routing_ids
    projections = [
      self._dense(self.mlp_dim, ('embed', 'mlp'), name)(tokens)
      for name in kernel_names(self.activations)
    ]
    hidden = activate(projections, self.activations)
    hidden = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
      hidden, deterministic=deterministic
    )
    wo = self._dense(tokens.shape[-1], ('mlp', 'embed'), 'wo')
    return wo(self.select(hidden, wo))

  def select(self, hidden: jax.Array, wo: linear.Dense) -> jax.Array:
    """Returns the hidden units that reach `wo`; subclasses may zero some.

    Args:
      hidden: <dtype>[batch, length, mlp], after dropout.
      wo: the second projection.
    """
    del wo
    return hidden

  def _dense(self, features, axes, name):
    init = parameter.variance_scaling(
      self.init_scale, 'fan_in', 'truncated_normal'
    )
    return linear.Dense(
      features, axes, init, self.dtype, self.use_bias, name=name
    )
