"""The contract of payloads: what a block does with the rows that it reads."""

from typing import NamedTuple

import jax
from flax import linen as nn

from mowe.layers import parameter


class MemoryRows(NamedTuple):
  """The rows of a memory that the tokens of a batch named.

  Attributes:
    values: <float>[batch, length, slots, row], zeros where there is no row.
    exist: <bool>[batch, length, slots], False where a token named no row.
    segment_ids: <int32>[batch, length], the number of the example to which each
      token of a packed row belongs; None if rows are not packed.
  """

  values: jax.Array
  exist: jax.Array
  segment_ids: jax.Array | None = None


class Payload(nn.Module):
  """Base of all payloads.

  A payload has the parameters that all tokens share; the rows lie in a table
  (`row_table`). A model config calls the class, or a factory of it, with
  `dropout_rate`, `dtype` and `parent`.

  Attributes:
    looks_back: whether the result for a token depends on tokens before it.
    adds: whether what the payload returns is added to the stream of tokens.
      Otherwise it takes its place.
    row_init: draws fresh rows.

  Call: tokens <float>[batch, length, embed], the rows that they named, and by
    name `embedded` (<float>[batch, length, embed], what the stack was given
    before its first block), `decode` (whether to go on from a cache, one token
    at a time) and `deterministic` (which turns dropout off), to
    <dtype>[batch, length, embed].
  """

  # These are not dataclass fields: a payload overrides them with a value or a
  # property.
  adds = True
  looks_back = False

  @property
  def row_init(self) -> parameter.Initializer:
    raise NotImplementedError

  def row_dim(self, embed_dim: int, num_slots: int) -> int:
    """Returns how many numbers a row has.

    Args:
      embed_dim: width of the model.
      num_slots: how many rows each token names.

    Raises:
      ValueError: the sizes do not fit together.
    """
    raise NotImplementedError

  def row_flops(self, embed_dim: int, num_slots: int) -> int:
    """Returns the FLOPs of a token's products with its rows.

    Products with kernels are counted from the kernels' sizes, and products
    number by number are not counted.
    """
    del embed_dim, num_slots
    return 0

  def __call__(
    self,
    tokens: jax.Array,
    rows: MemoryRows,
    *,
    embedded: jax.Array,
    decode: bool = False,
    deterministic: bool = True,
  ) -> jax.Array:
    raise NotImplementedError


def joined(rows: MemoryRows) -> jax.Array:
  """Returns the rows of each token one after another, [batch, length, all]."""
  batch, length, slots, row = rows.values.shape
  return rows.values.reshape(batch, length, slots * row)


def share_of(width: int, num_slots: int, name: str) -> int:
  """Returns what each slot holds of a width that all slots fill together.

  Raises:
    ValueError: the slots cannot hold equal shares.
  """
  if width % num_slots:
    raise ValueError(
      f'{name} must be a multiple of the {num_slots} slots of the address, as '
      f'each holds an equal share of it, but is {width}. Make it '
      f'{-(-width // num_slots) * num_slots}, or change the slots.'
    )
  return width // num_slots


def one_slot(num_slots: int, name: str) -> None:
  """Raises ValueError unless tokens name one row each."""
  if num_slots != 1:
    raise ValueError(
      f'{name} reads one row for each token, but its address has {num_slots} '
      'slots. Take an address with one slot, such as Pieces.'
    )
