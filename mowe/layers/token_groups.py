"""Groups of tokens that are routed together."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class TokenGroups:
  """As few groups of at most `size` consecutive tokens as there can be.

  Capacity, balance and the choices of experts are per group. A group depends
  on the shape of the batch alone, never on devices.

  Attributes:
    size: tokens of a group at most; 4096 is flaxformer's usual size.
    multiple: the number of groups is a multiple of it. Experts on several
      devices need that of data x expert devices; it is set rather than found,
      so that another mesh gives the same results.

  Raises:
    ValueError: `size` or `multiple` is not positive.
  """

  size: int = 4096
  multiple: int = 1

  # What fills the last group up is not routed.
  routes_filling = False

  def __post_init__(self):
    if self.size < 1 or self.multiple < 1:
      raise ValueError(
        'size and multiple must be at least 1, but are '
        f'{self.size} and {self.multiple}. 4096 and 1 are usual.'
      )

  def num_groups(self, batch: int, length: int) -> int:
    """Groups of [batch, length] tokens."""
    least = -(-batch * length // self.size)
    return least + -least % self.multiple

  def split(self, array: jax.Array, fill: int | bool | float) -> jax.Array:
    """[batch, length, ...] to [groups, tokens, ...], filled up with `fill`."""
    num_tokens = array.shape[0] * array.shape[1]
    num_groups = self.num_groups(*array.shape[:2])
    flat = array.reshape(num_tokens, *array.shape[2:])
    missing = [(0, -num_tokens % num_groups)] + [(0, 0)] * (flat.ndim - 1)
    flat = jnp.pad(flat, missing, constant_values=fill)
    return flat.reshape(num_groups, -1, *array.shape[2:])

  def merge(self, groups: jax.Array, batch: int, length: int) -> jax.Array:
    """Inverse of `split`, without what was filled up."""
    flat = groups.reshape(-1, *groups.shape[2:])[: batch * length]
    return flat.reshape(batch, length, *groups.shape[2:])


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
