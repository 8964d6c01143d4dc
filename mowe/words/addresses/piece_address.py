"""An address with one row for each piece of the subword vocabulary."""

import dataclasses
from typing import Any

import numpy as np

from mowe.words import base_vocabulary
from mowe.words.addresses import address_base

Array = address_base.Array


@dataclasses.dataclass(frozen=True)
class Pieces(address_base.Address):
  """Each token names the row of its own id.

  Sources: STEM (arXiv 2601.10639) and Gemma's per-layer embeddings have such
  tables.

  Attributes:
    vocab_size: number of rows, at least the subword vocabulary's size.
  """

  vocab_size: int

  def __post_init__(self):
    if not 1 <= self.vocab_size < 2**31:
      raise ValueError(
        'vocab_size must be from 1 to 2^31 - 1, but is '
        f"{self.vocab_size}. Set it to the subword vocabulary's size."
      )

  @property
  def num_slots(self) -> int:
    return 1

  @property
  def num_rows(self) -> int:
    return self.vocab_size

  def encoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.encoder_rows`."""
    del segment_ids
    ids = address_base.as_ids(tokens)
    return address_base.without_padding(ids[..., None], ids)

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
    return {'vocab_size': self.vocab_size}

  def check_subwords(self, vocabulary: base_vocabulary.Vocabulary) -> None:
    """See `Address.check_subwords`."""
    if vocabulary.size > self.vocab_size:
      raise ValueError(
        'Pieces must have a row for each id of the subword vocabulary, '
        f'{vocabulary.size}, but vocab_size is {self.vocab_size}. Set it to '
        f'{vocabulary.size}.'
      )
