"""An address that names a bank of rows where another one names one row."""

import dataclasses
import functools
from typing import Any

import numpy as np

from mowe.words import base_vocabulary, routing_vocabulary
from mowe.words.addresses import address_base

Array = address_base.Array


@dataclasses.dataclass(frozen=True)
class Banks(address_base.Address):
  """Each row of an address becomes a bank of consecutive rows.

  A token has as many slots as the widest bank has rows; those that its own bank
  lacks name no row. So a token with a narrow bank costs as much as one with a
  wide bank.

  Source: L3, arXiv 2601.21461.

  Attributes:
    address: names the banks of tokens.
    widths: the number of rows of each bank, as from `bank_widths`; one number
      gives all banks the same.
  """

  address: address_base.Address
  widths: int | tuple[int, ...]

  def __post_init__(self):
    of_all = self._widths
    if len(of_all) != self.address.num_rows:
      raise ValueError(
        'Banks must have a width for each row of their address, '
        f'{self.address.num_rows}, but there are {len(of_all)}. Count them for '
        'this address.'
      )
    if min(of_all) < 1 or sum(of_all) >= 2**31:
      raise ValueError(
        'Banks must have at least one row each and fewer than 2^31 in all, but '
        f'the narrowest has {min(of_all)} and all have {sum(of_all):,}. Change '
        'the widths.'
      )

  @property
  def num_slots(self) -> int:
    return self.address.num_slots * max(self._widths)

  @property
  def num_rows(self) -> int:
    return sum(self._widths)

  def encoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.encoder_rows`."""
    return self._rows(self.address.encoder_rows(tokens, segment_ids))

  def decoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.decoder_rows`."""
    return self._rows(self.address.decoder_rows(tokens, segment_ids))

  def initial_state(self, batch: int) -> np.ndarray:
    """See `Address.initial_state`."""
    return self.address.initial_state(batch)

  def decoder_step(self, tokens: Array, state: Array) -> tuple[Array, Array]:
    """See `Address.decoder_step`."""
    banks, state = self.address.decoder_step(tokens, state)
    return self._rows(banks), state

  def routing_vocabulary(self) -> routing_vocabulary.RoutingVocabulary | None:
    """See `Address.routing_vocabulary`."""
    return self.address.routing_vocabulary()

  def constants(self) -> dict[str, Any]:
    """See `Address.constants`."""
    return {'address': self.address.fingerprint, 'widths': self._widths}

  def check_subwords(self, vocabulary: base_vocabulary.Vocabulary) -> None:
    """See `Address.check_subwords`."""
    self.address.check_subwords(vocabulary)

  @property
  def _widths(self) -> tuple[int, ...]:
    """The width of each bank."""
    if isinstance(self.widths, int):
      return (self.widths,) * self.address.num_rows
    return self.widths

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    """The first row of each bank, <int32>[banks + 1]."""
    return np.cumsum([0, *self._widths], dtype=np.int32)

  def _rows(self, banks) -> Array:
    """The rows [batch, length, slots] of banks [batch, length, banks]."""
    xp = banks.__array_namespace__()
    first = xp.take(self._starts, banks, mode='clip')[..., None]
    end = xp.take(self._starts, banks + 1, mode='clip')[..., None]
    slots = xp.arange(max(self._widths), dtype=np.int32)
    rows = first + slots[None, None, None, :]
    is_own = (rows < end) & (banks[..., None] >= 0)
    rows = xp.where(is_own, rows, np.int32(-1))
    return rows.reshape(*banks.shape[:-1], self.num_slots)
