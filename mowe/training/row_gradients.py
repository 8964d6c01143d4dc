"""Gradients of rows of expert tables, in the form that is cheapest to use.

The gradient of an expert with one token is an outer product, and most experts
of a batch have one. An optimizer that needs only means of its squares, and the
gradient itself once, never has to write it to memory.

Classes that replace each other; a gradient here is that of one kernel of one
expert, and several experts are reached by `jax.vmap`.
"""

from typing import NamedTuple

import jax


class Matrix(NamedTuple):
  """A gradient as it is.

  Attributes:
    values: <float32>[a, b].
  """

  values: jax.Array

  def mean_squares(self) -> tuple[jax.Array, jax.Array]:
    """Means of the squares over columns <float32>[a] and rows [b]."""
    squares = self.values**2
    return squares.mean(axis=1), squares.mean(axis=0)

  def mean_square(self) -> jax.Array:
    """The mean of all squares, <float32>[]."""
    return (self.values**2).mean()

  def scaled(self, row: jax.Array, column: jax.Array) -> 'Matrix':
    """This times row <float32>[a] times column [b]."""
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

  def mean_square(self) -> jax.Array:
    """As of `Matrix`."""
    return (self.left**2).mean() * (self.right**2).mean()

  def scaled(self, row: jax.Array, column: jax.Array) -> 'Outer':
    """As of `Matrix`."""
    return Outer(self.left * row, self.right * column)

  def matrix(self) -> jax.Array:
    """As of `Matrix`."""
    return self.left[:, None] * self.right[None, :]


Gradient = Matrix | Outer
