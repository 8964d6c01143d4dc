"""Dense projection with a two-dimensional kernel, as in T5X's minimal T5."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import parameter

# T5 has two initializers: kernels of attention are drawn from a normal
# distribution, all others from a truncated one. Both have variance 1 / fan-in.
attention_init = parameter.variance_scaling(1.0, 'fan_in', 'normal')
dense_init = parameter.variance_scaling(1.0, 'fan_in', 'truncated_normal')


class Dense(nn.Module):
  """Linear projection of the last axis.

  Attributes:
    features: size of the last axis of the result.
    kernel_axes: logical names of the kernel's two axes.
    kernel_init: initializer of the float32 kernel.
    dtype: dtype of the computation and of the result.
    use_bias: whether a bias is added, which starts at zero.

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
    """Returns kernel and bias, for a caller that multiplies itself.

    Args:
      num_inputs: size of the last axis of the inputs.

    Returns:
      The kernel <dtype>[num_inputs, features], and the bias <dtype>[features]
      or None.
    """
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
  """Multiplies inputs with a kernel.

  The gradient of the kernel is a product of inputs and cotangents over all
  tokens. XLA on CPU copies the first factor of that product to another layout,
  and this copy is slow, as the operations that made the factor are fused into
  it. JAX always puts the cotangents first. The gradient defined here puts the
  narrower factor first, so that less is copied.

  Args:
    inputs: <float>[..., in].
    kernel: <float>[in, out].

  Returns:
    <float>[..., out].
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
  # Several kernels often share their inputs, and then one copy of the inputs
  # serves all of them. So inputs may be somewhat wider and still come first.
  if kernel.shape[0] > 1.5 * kernel.shape[1]:
    return d_inputs, over_tokens(cotangent, inputs).T
  return d_inputs, over_tokens(inputs, cotangent)


project.defvjp(_project_forward, _project_backward)
