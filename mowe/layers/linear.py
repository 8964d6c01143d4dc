"""Dense projection with a two-dimensional kernel, as in T5X's minimal T5."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import parameter

# T5's two initialisers: attention draws from a normal, the rest from a
# truncated normal, both with variance 1 / fan-in.
attention_init = parameter.variance_scaling(1.0, 'fan_in', 'normal')
dense_init = parameter.variance_scaling(1.0, 'fan_in', 'truncated_normal')


class Dense(nn.Module):
  """Projection of the last axis.

  Attributes:
    features: size of the last axis of the result.
    kernel_axes: logical names of the kernel's two axes.
    kernel_init: initialiser of the float32 kernel.
    dtype: dtype of the computation and of the result.
    use_bias: a bias is added, zero at first.

  Call: inputs <float>[..., embed] to <dtype>[..., features].
  """

  features: int
  kernel_axes: tuple[str, str]
  kernel_init: parameter.Initializer = dense_init
  dtype: Any = jnp.float32
  use_bias: bool = False

  def __call__(self, inputs: jax.Array) -> jax.Array:
    kernel, bias = self.weights(inputs.shape[-1])
    outputs = project(inputs.astype(self.dtype), kernel)
    if bias is not None:
      outputs += bias.reshape((1,) * (outputs.ndim - 1) + bias.shape)
    return outputs

  @nn.compact
  def weights(self, num_inputs: int) -> tuple[jax.Array, jax.Array | None]:
    """Kernel <dtype>[inputs, features], bias <dtype>[features] or None."""
    kernel = parameter.declare(
      self,
      'kernel',
      self.kernel_init,
      (num_inputs, self.features),
      axes=self.kernel_axes,
    ).astype(self.dtype)
    if not self.use_bias:
      return kernel, None
    zeros = nn.initializers.zeros
    bias = parameter.declare(
      self, 'bias', zeros, (self.features,), axes=self.kernel_axes[1:]
    )
    return kernel, bias.astype(self.dtype)


@jax.custom_vjp
def project(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
  """inputs <float>[..., in] kernel <float>[in, out], to <float>[..., out].

  Its own gradient, because XLA on CPU copies the first factor of inputs^T
  cotangent to another layout, slowly, together with all that made it. JAX
  always puts the cotangent first; here it is the narrower of the two.
  """
  return jnp.matmul(inputs, kernel)


def _project_forward(inputs, kernel):
  return project(inputs, kernel), (inputs, kernel)


def _project_backward(residuals, cotangent):
  inputs, kernel = residuals
  leading = tuple(range(inputs.ndim - 1))
  over_tokens = lambda first, second: jax.lax.dot_general(
    first, second, ((leading, leading), ((), ()))
  )
  d_inputs = jax.lax.dot_general(
    cotangent, kernel, (((cotangent.ndim - 1,), (1,)), ((), ()))
  )
  # Several kernels often share their inputs, so one copy: hence the 1.5.
  if kernel.shape[0] > 1.5 * kernel.shape[1]:
    return d_inputs, over_tokens(cotangent, inputs).T
  return d_inputs, over_tokens(inputs, cotangent)


project.defvjp(_project_forward, _project_backward)
