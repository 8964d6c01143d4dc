"""Gradients of rows of expert tables, in the form that is cheapest to use.

The gradient of an expert with one token is an outer product, and most experts
of a batch have one token. Adafactor needs the means of the gradient's squares
over rows and columns, and the gradient itself once, when the kernel is changed.
Of an outer product all of these follow from its two vectors, so that the
gradient [a, b] need not be written to memory.

`Matrix` and `Outer` have the same methods. An object stands for the gradient of
one kernel of one expert; `jax.vmap` over it reaches several experts, whose
arrays then have a leading axis [rows].
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Matrix(NamedTuple):
  """A gradient that is written out.

  Attributes:
    values: <float32>[a, b], the gradient.
  """

  values: jax.Array

  def mean_squares(self) -> tuple[jax.Array, jax.Array]:
    """Means of the squares over columns, <float32>[a], and over rows, [b]."""
    squares = self.values**2
    return squares.mean(axis=1), squares.mean(axis=0)

  def mean_square_times(self, row: jax.Array, column: jax.Array) -> jax.Array:
    """The mean of the squares of `self.times(row, column)`, <float32>[].

    Args:
      row: <float32>[a].
      column: <float32>[b].
    """
    # sum_ab row_a^2 values_ab^2 column_b^2, as products with the squares that
    # `mean_squares` has made: `times` would write another matrix.
    of_columns = jnp.dot(row**2, self.values**2, precision='highest')
    return (of_columns * column**2).sum() / self.values.size

  def times(self, row: jax.Array, column: jax.Array) -> 'Matrix':
    """The gradient times row <float32>[a] and column <float32>[b]."""
    return Matrix(self.values * row[:, None] * column[None, :])

  def matrix(self) -> jax.Array:
    """The gradient, <float32>[a, b]."""
    return self.values


class Outer(NamedTuple):
  """A gradient that is an outer product, left_a * right_b.

  Attributes:
    left: <float32>[a], the inputs of the expert's only token.
    right: <float32>[b], the cotangents of its outputs.
  """

  left: jax.Array
  right: jax.Array

  def mean_squares(self) -> tuple[jax.Array, jax.Array]:
    """See `Matrix.mean_squares`."""
    # The mean over one index leaves the other vector as it is.
    left, right = self.left**2, self.right**2
    return left * right.mean(), left.mean() * right

  def mean_square_times(self, row: jax.Array, column: jax.Array) -> jax.Array:
    """See `Matrix.mean_square_times`."""
    left, right = self.times(row, column)
    return (left**2).mean() * (right**2).mean()

  def times(self, row: jax.Array, column: jax.Array) -> 'Outer':
    """See `Matrix.times`."""
    return Outer(self.left * row, self.right * column)

  def matrix(self) -> jax.Array:
    """See `Matrix.matrix`."""
    return self.left[:, None] * self.right[None, :]


Gradient = Matrix | Outer


def matrices(gradients: Mapping[str, Gradient]) -> dict[str, jax.Array]:
  """Gradients of several experts, written out: <float32>[rows, a, b] each."""
  matrix = jax.vmap(lambda gradient: gradient.matrix())
  return {name: matrix(gradient) for name, gradient in gradients.items()}
