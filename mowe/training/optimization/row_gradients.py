"""Gradients of rows of expert tables, in the form that is cheapest to use.

The gradient of an expert with one token is an outer product, and most experts
of a batch have one. An optimizer that needs only means of its squares, and the
gradient itself once, never has to write it to memory.

Classes that replace each other; a gradient here is that of one kernel of one
expert, and several experts are reached by `jax.vmap`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Matrix(NamedTuple):
  """A gradient written out.

  Attributes:
    values: <float32>[a, b].
  """

  values: jax.Array

  def mean_squares(self) -> tuple[jax.Array, jax.Array]:
    """Means of the squares over columns <float32>[a] and rows [b]."""
    squares = self.values**2
    return squares.mean(axis=1), squares.mean(axis=0)

  def mean_square_times(self, row: jax.Array, column: jax.Array) -> jax.Array:
    """The mean of squares of this times row <float32>[a], column [b]."""
    # A product with the squares, which are at hand already.
    of_columns = jnp.dot(row**2, self.values**2, precision='highest')
    return (of_columns * column**2).sum() / self.values.size

  def times(self, row: jax.Array, column: jax.Array) -> 'Matrix':
    """This times row <float32>[a] and column [b]."""
    return Matrix(self.values * row[:, None] * column[None, :])

  def matrix(self) -> jax.Array:
    """<float32>[a, b]."""
    return self.values


class Outer(NamedTuple):
  """A gradient that is an outer product.

  Attributes:
    left: <float32>[a].
    right: <float32>[b].
  """

  left: jax.Array
  right: jax.Array

  def mean_squares(self) -> tuple[jax.Array, jax.Array]:
    """As of `Matrix`."""
    left, right = self.left**2, self.right**2
    return left * right.mean(), left.mean() * right

  def mean_square_times(self, row: jax.Array, column: jax.Array) -> jax.Array:
    """As of `Matrix`."""
    left, right = self.times(row, column)
    return (left**2).mean() * (right**2).mean()

  def times(self, row: jax.Array, column: jax.Array) -> 'Outer':
    """As of `Matrix`."""
    return Outer(self.left * row, self.right * column)

  def matrix(self) -> jax.Array:
    """As of `Matrix`."""
    return self.left[:, None] * self.right[None, :]


Gradient = Matrix | Outer


def matrices(gradients: Mapping[str, Gradient]) -> dict[str, jax.Array]:
  """Gradients of several experts written out, <float32>[rows, a, b] each."""
  matrix = jax.vmap(lambda gradient: gradient.matrix())
  return {name: matrix(gradient) for name, gradient in gradients.items()}
