"""Initial values of the kernels of a mixture of experts."""

import dataclasses
import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import parameter


class Initialization(Protocol):
  """Chooses the initializers of a mixture's kernels; a frozen class."""

  def inner(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Returns the initializer of a first kernel of the experts.

    Args:
      shape: shape of the kernel, (expert, embed, expert_mlp).
    """

  def outer(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Returns the initializer of the last kernel of the experts.

    Args:
      shape: shape of the kernel, (expert, expert_mlp, embed).
    """

  def router(self, embed_dim: int) -> parameter.Initializer:
    """Returns the initializer of the router's last kernel, [in, experts].

    Args:
      embed_dim: width of the model.
    """


@dataclasses.dataclass(frozen=True)
class DenseInit:
  """Every expert starts as a dense layer of its size, as in Switch."""

  def inner(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """See `Initialization`."""
    del shape
    # Experts are a batch axis, so that the fan-in is that of one expert.
    return nn.initializers.variance_scaling(
      1.0, 'fan_in', 'truncated_normal', batch_axis=(0,)
    )

  def outer(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """See `Initialization`."""
    return self.inner(shape)

  def router(self, embed_dim: int) -> parameter.Initializer:
    """See `Initialization`."""
    del embed_dim
    # With 0.02, as in flaxformer, the first choices are nearly even.
    return parameter.normal(0.02)


@dataclasses.dataclass(frozen=True)
class SigmaInit:
  """All experts together start as one dense layer of their joint size.

  The variance of a kernel is 2 * scale / (fan-in * num_layers). The fan-in of
  the last kernel is the number of hidden units of all experts together. All
  columns of the router's kernel, one for each expert, have the same norm, so
  that at first an expert is chosen by the angle of its column alone.

  Source: arXiv 2310.10837, section 5; https://github.com/RobertCsordas/moe.

  Attributes:
    num_layers: number of blocks of the stack. For post-norm models the source
      has 2, whatever their number of blocks.
    scale: factor of all variances. The source's Switch baselines have 0.1.

  Raises:
    ValueError: an attribute is not positive.
  """

  num_layers: int
  scale: float = 1.0

  def __post_init__(self):
    if self.num_layers < 1 or self.scale <= 0:
      raise ValueError(
        'num_layers and scale of SigmaInit must be positive, but they are '
        f'{self.num_layers} and {self.scale}. Set num_layers to the number of '
        'blocks of one stack, and scale to 1.0.'
      )

  def inner(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """See `Initialization`."""
    return parameter.normal(self.std(shape[1]))

  def outer(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """See `Initialization`."""
    return parameter.normal(self.std(shape[0] * shape[1]))

  def router(self, embed_dim: int) -> parameter.Initializer:
    """See `Initialization`."""
    return _equal_normal(self.std(embed_dim))

  def std(self, fan_in: int) -> float:
    """Returns the standard deviation of a kernel with `fan_in` inputs."""
    return math.sqrt(2 * self.scale / (self.num_layers * fan_in))


@dataclasses.dataclass(frozen=True)
class SingleExpertInit(SigmaInit):
  """SigmaInit in which each expert starts as a dense layer of its own.

  The fan-in of the last kernel is the number of hidden units of one expert. The
  paper calls this "standard init" and uses it for its baselines.
  """

  def outer(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """See `Initialization`."""
    return parameter.normal(self.std(shape[1]))


@dataclasses.dataclass(frozen=True)
class UniformInit:
  """Kernels between -1 / fan-in and 1 / fan-in, as in ModuleFormer's code.

  Because the bound is 1 / fan-in rather than 1 / sqrt(fan-in), the outputs of
  experts are small at first.

  Source: https://github.com/IBM/ModuleFormer.
  """

  def inner(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """See `Initialization`."""
    return _uniform(1 / shape[1])

  def outer(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """See `Initialization`."""
    return _uniform(1 / shape[1])

  def router(self, embed_dim: int) -> parameter.Initializer:
    """See `Initialization`."""
    del embed_dim
    return parameter.normal(0.02)


def with_equal_norms(kernel: jax.Array) -> jax.Array:
  """Rescales the columns of a router's kernel to one common norm.

  Args:
    kernel: <float>[embed, experts].

  Returns:
    <float>[embed, experts], with the directions of the columns of `kernel` and
    with its standard deviation.
  """
  directions = kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)
  return directions * (jnp.std(kernel) / jnp.std(directions))


# Both are cached so that equal settings give the same function, as for
# `parameter.normal`.
@functools.cache
def _uniform(limit):
  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return init


@functools.cache
def _equal_normal(stddev):
  def init(key, shape, dtype=jnp.float32):
    return with_equal_norms(parameter.normal(stddev)(key, shape, dtype))

  return init
