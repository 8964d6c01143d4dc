"""How the kernels of a mixture of experts are drawn."""

import dataclasses
import functools
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import parameter


class Initialization(Protocol):
  """How the kernels of a mixture are drawn; a frozen class."""

  def inner(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Draws kernels <float32>[expert, embed, expert_mlp] of this shape."""

  def outer(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Draws the kernel <float32>[expert, expert_mlp, embed] of this shape."""

  def router(self, embed_dim: int) -> parameter.Initializer:
    """Draws the router's kernel <float32>[embed, experts]."""


@dataclasses.dataclass(frozen=True)
class DenseInit:
  """Every expert starts as a dense layer of its size, as in Switch."""

  def inner(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Of kernels [expert, embed, expert_mlp]."""
    del shape
    return nn.initializers.variance_scaling(
      1.0, 'fan_in', 'truncated_normal', batch_axis=(0,)
    )

  def outer(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Of the kernel [expert, expert_mlp, embed]."""
    return self.inner(shape)

  def router(self, embed_dim: int) -> parameter.Initializer:
    """Of the router's kernel [embed, experts]."""
    del embed_dim
    # 0.02, as in flaxformer: the first choices are nearly even.
    return parameter.normal(0.02)


@dataclasses.dataclass(frozen=True)
class SigmaInit:
  """All experts together start as the dense layer that they are parts of.

  Variances are 2 / (fan-in * layers), and the fan-in of the second kernel are
  the hidden units of all experts. Every expert's column of the router's kernel
  has the same norm, so that only angles decide at first.

  Source: arXiv 2310.10837, section 5; https://github.com/RobertCsordas/moe.

  Attributes:
    num_layers: blocks of the stack. 2 is its rule for post-norm models.
    scale: of all variances; its Switch baselines have 0.1.

  Raises:
    ValueError: one of them is not positive.
  """

  num_layers: int
  scale: float = 1.0

  def __post_init__(self):
    if self.num_layers < 1 or self.scale <= 0:
      raise ValueError(
        'num_layers and scale must be positive, but are '
        f'{self.num_layers} and {self.scale}. Give the blocks of one stack.'
      )

  def inner(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Of kernels [expert, embed, expert_mlp]."""
    return parameter.normal(self.std(shape[1]))

  def outer(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Of the kernel [expert, expert_mlp, embed]."""
    return parameter.normal(self.std(shape[0] * shape[1]))

  def router(self, embed_dim: int) -> parameter.Initializer:
    """Of the router's kernel [embed, experts]."""
    return _equal_normal(self.std(embed_dim))

  def std(self, fan_in: int) -> float:
    """Standard deviation for so many inputs."""
    return math.sqrt(2 * self.scale / (self.num_layers * fan_in))


@dataclasses.dataclass(frozen=True)
class SingleExpertInit(SigmaInit):
  """The same, but as if each expert were a dense layer of its own.

  The paper's "standard init", and what its baselines have.
  """

  def outer(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Of the kernel [expert, expert_mlp, embed]."""
    return parameter.normal(self.std(shape[1]))


@dataclasses.dataclass(frozen=True)
class UniformInit:
  """Kernels between -1 / fan-in and 1 / fan-in, as in ModuleFormer's code.

  Not its square root: experts begin small.

  Source: https://github.com/IBM/ModuleFormer.
  """

  def inner(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Of kernels [expert, embed, expert_mlp]."""
    return _uniform(1 / shape[1])

  def outer(self, shape: tuple[int, int, int]) -> parameter.Initializer:
    """Of the kernel [expert, expert_mlp, embed]."""
    return _uniform(1 / shape[1])

  def router(self, embed_dim: int) -> parameter.Initializer:
    """Of the router's last kernel."""
    del embed_dim
    return parameter.normal(0.02)


def with_equal_norms(kernel: jax.Array) -> jax.Array:
  """Columns <float>[embed, experts] of one norm; the deviation stays."""
  directions = kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)
  return directions * (jnp.std(kernel) / jnp.std(directions))


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
