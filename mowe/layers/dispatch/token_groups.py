"""Groups of tokens that are routed together."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Groups(Protocol):
  """Decides which tokens of a batch are routed together.

  Groups have equal sizes. Where tokens do not suffice, filling is added.

  Attributes:
    routes_filling: whether the filling is routed as if it were tokens.
  """

  routes_filling: bool

  def num_groups(self, batch: int, length: int) -> int:
    """Returns the number of groups of [batch, length] tokens.

    Args:
      batch: number of rows of the batch.
      length: number of tokens of a row.
    """

  def split(self, array: jax.Array, fill: int | bool | float) -> jax.Array:
    """Returns [batch, length, ...] as [groups, tokens, ...].

    Args:
      array: [batch, length, ...], values of all tokens.
      fill: the value of the filling.
    """

  def merge(self, groups: jax.Array, batch: int, length: int) -> jax.Array:
    """Inverts `split`: returns [groups, tokens, ...] as [batch, length, ...].

    Args:
      groups: [groups, tokens, ...], values of all tokens and of the filling.
      batch: number of rows of the batch.
      length: number of tokens of a row.
    """

  def single(self) -> 'Groups':
    """Returns groups of the same kind with one sequence in each."""


@dataclasses.dataclass(frozen=True)
class TokenGroups:
  """Groups of whole sequences, as few as hold at most `size` tokens each.

  Capacity, balance and the choices of experts are per group. The groups depend
  on the shape of the batch alone, and not on the devices. The tokens of a group
  are in the order of their positions: the first tokens of all its sequences,
  then the second ones, and so on. Earlier tokens get slots first. So in a
  decoder no token depends on a later position, not even of another sequence.

  Attributes:
    size: largest number of tokens of a group; 4096 is usual in flaxformer. A
      sequence that is longer is a group of its own.
    multiple: the number of groups is a multiple of this number. With experts on
      several devices, it must be a multiple of data x expert devices. It is an
      attribute, and not read from the mesh, so that every mesh gives the same
      results.

  Raises:
    ValueError: `size` or `multiple` is not positive.
  """

  size: int = 4096
  multiple: int = 1

  # The rows that are added as filling are not routed.
  routes_filling = False

  def __post_init__(self):
    if self.size < 1 or self.multiple < 1:
      raise ValueError(
        'size and multiple must be at least 1, but are '
        f'{self.size} and {self.multiple}. Set them to positive numbers; 4096 '
        'and 1 are usual.'
      )

  def num_groups(self, batch: int, length: int) -> int:
    """Returns the number of groups of [batch, length] tokens."""
    least = -(-batch // max(1, self.size // length))
    return least + -least % self.multiple

  def split(self, array: jax.Array, fill: int | bool | float) -> jax.Array:
    """Returns [batch, length, ...] as [groups, tokens, ...]; see `Groups`."""
    batch, length = array.shape[:2]
    num_groups = self.num_groups(batch, length)
    missing = [(0, -batch % num_groups)] + [(0, 0)] * (array.ndim - 1)
    rows = jnp.pad(array, missing, constant_values=fill)
    # [batch, length, ...] -> [groups, length, sequences, ...]
    rows = rows.reshape(num_groups, -1, length, *array.shape[2:])
    return rows.swapaxes(1, 2).reshape(num_groups, -1, *array.shape[2:])

  def merge(self, groups: jax.Array, batch: int, length: int) -> jax.Array:
    """Inverts `split`, and leaves the filling out."""
    # [groups, tokens, ...] -> [groups, sequences, length, ...]
    rest = groups.shape[2:]
    rows = groups.reshape(groups.shape[0], length, -1, *rest).swapaxes(1, 2)
    return rows.reshape(-1, length, *rest)[:batch]

  def single(self) -> 'TokenGroups':
    """Returns groups of the same kind with one sequence in each."""
    return dataclasses.replace(self, size=1)


@dataclasses.dataclass(frozen=True)
class SequenceGroups:
  """Groups of one sequence each, so that sequences do not compete for slots."""

  # There is no filling.
  routes_filling = False

  def num_groups(self, batch: int, length: int) -> int:
    """Returns `batch`, as each sequence is a group."""
    del length
    return batch

  def split(self, array: jax.Array, fill: int | bool | float) -> jax.Array:
    """Returns the array itself, [batch, length, ...]."""
    del fill
    return array

  def merge(self, groups: jax.Array, batch: int, length: int) -> jax.Array:
    """Returns the groups themselves, [batch, length, ...]."""
    del batch, length
    return groups

  def single(self) -> 'SequenceGroups':
    """Returns these groups, as each of them is one sequence."""
    return self
