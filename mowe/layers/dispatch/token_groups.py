"""Groups of tokens that are routed together."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Groups(Protocol):
  """Which tokens of a batch are routed together.

  Attributes:
    routes_filling: what fills the last groups up is routed as tokens are.
  """

  routes_filling: bool

  def num_groups(self, batch: int, length: int) -> int:
    """Returns the number of groups of [batch, length] tokens."""

  def split(self, array: jax.Array, fill: int | bool | float) -> jax.Array:
    """Returns [batch, length, ...] as [groups, tokens, ...].

    Args:
      array: of all tokens.
      fill: the value of what fills the last groups up.
    """

  def merge(self, groups: jax.Array, batch: int, length: int) -> jax.Array:
    """Returns [groups, tokens, ...] as [batch, length, ...]."""

  def single(self) -> 'Groups':
    """Returns groups of the same kind with one sequence in each."""


@dataclasses.dataclass(frozen=True)
class TokenGroups:
  """As few groups of whole sequences, of at most `size` tokens, as can be.

  Capacity, balance and the choices of experts are per group. A group depends
  on the shape of the batch alone, never on devices. Its tokens stand in order
  of their positions: the first ones of all its sequences, then the second
  ones, and so on. As earlier tokens get slots first, no token of a decoder
  learns from a later one, not even from one of another sequence.

  Attributes:
    size: tokens of a group at most; 4096 is flaxformer's usual size. A longer
      sequence is a group of its own.
    multiple: the number of groups is a multiple of it. Experts on several
      devices need that of data x expert devices; it is set rather than found,
      so that another mesh gives the same results.

  Raises:
    ValueError: `size` or `multiple` is not positive.
  """

  size: int = 4096
  multiple: int = 1

  # Rows that fill the last groups up are not routed.
  routes_filling = False

  def __post_init__(self):
    if self.size < 1 or self.multiple < 1:
      raise ValueError(
        'size and multiple must be at least 1, but are '
        f'{self.size} and {self.multiple}. 4096 and 1 are usual.'
      )

  def num_groups(self, batch: int, length: int) -> int:
    """Groups of [batch, length] tokens."""
    least = -(-batch // max(1, self.size // length))
    return least + -least % self.multiple

  def split(self, array: jax.Array, fill: int | bool | float) -> jax.Array:
    """[batch, length, ...] to [groups, tokens, ...], filled up with `fill`."""
    batch, length = array.shape[:2]
    num_groups = self.num_groups(batch, length)
    missing = [(0, -batch % num_groups)] + [(0, 0)] * (array.ndim - 1)
    rows = jnp.pad(array, missing, constant_values=fill)
    # [batch, length, ...] -> [groups, length, sequences, ...]
    rows = rows.reshape(num_groups, -1, length, *array.shape[2:])
    return rows.swapaxes(1, 2).reshape(num_groups, -1, *array.shape[2:])

  def merge(self, groups: jax.Array, batch: int, length: int) -> jax.Array:
    """Inverse of `split`, without what was filled up."""
    # [groups, tokens, ...] -> [groups, sequences, length, ...]
    rest = groups.shape[2:]
    rows = groups.reshape(groups.shape[0], length, -1, *rest).swapaxes(1, 2)
    return rows.reshape(-1, length, *rest)[:batch]

  def single(self) -> 'TokenGroups':
    """The same with one sequence in each group."""
    return dataclasses.replace(self, size=1)


@dataclasses.dataclass(frozen=True)
class SequenceGroups:
  """Each sequence is a group of its own: none takes the place of another."""

  # Nothing is filled up.
  routes_filling = False

  def num_groups(self, batch: int, length: int) -> int:
    """One for each sequence."""
    del length
    return batch

  def split(self, array: jax.Array, fill: int | bool | float) -> jax.Array:
    """[batch, length, ...] as it is."""
    del fill
    return array

  def merge(self, groups: jax.Array, batch: int, length: int) -> jax.Array:
    """Inverse of `split`."""
    del batch, length
    return groups

  def single(self) -> 'SequenceGroups':
    """These, as each is one sequence."""
    return self
