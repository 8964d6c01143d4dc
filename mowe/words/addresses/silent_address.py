"""An address that names no row, for measuring a model without its memory."""

import dataclasses
from typing import Any

import numpy as np

from mowe.words import base_vocabulary
from mowe.words.addresses import address_base

Array = address_base.Array


@dataclasses.dataclass(frozen=True)
class SilentAddress(address_base.Address):
  """Stands in for another address, and names none of its rows.

  Attributes:
    address: the address in whose place it stands.
  """

  address: address_base.Address

  @property
  def num_slots(self) -> int:
    return self.address.num_slots

  @property
  def num_rows(self) -> int:
    return self.address.num_rows

  def encoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.encoder_rows`."""
    del segment_ids
    xp = tokens.__array_namespace__()
    return xp.full((*tokens.shape, self.num_slots), -1, np.int32)

  def decoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.decoder_rows`."""
    return self.encoder_rows(tokens, segment_ids)

  def initial_state(self, batch: int) -> np.ndarray:
    """See `Address.initial_state`; there is nothing to remember."""
    return np.zeros((batch, 0), np.int32)

  def decoder_step(self, tokens: Array, state: Array) -> tuple[Array, Array]:
    """See `Address.decoder_step`."""
    return self.encoder_rows(tokens), state

  def constants(self) -> dict[str, Any]:
    """See `Address.constants`."""
    return {'address': self.address.fingerprint}

  def check_subwords(self, vocabulary: base_vocabulary.Vocabulary) -> None:
    """See `Address.check_subwords`."""
    self.address.check_subwords(vocabulary)
