"""Names word experts by an address, in place of a routing vocabulary."""

import dataclasses

import numpy as np

from mowe.words.addresses import address_base

Array = address_base.Array


@dataclasses.dataclass(frozen=True)
class ExpertAddress:
  """Names for each token the one expert whose row an address names.

  It has the methods of a routing vocabulary with which a model and the plans of
  its batches find experts.

  Attributes:
    address: names one row for each token; row i is expert i.
    num_experts: the number of experts of the layer, at least the rows of the
      address. Those beyond the rows are never named.

  Raises:
    ValueError: the address names several rows, or more than there are experts.
  """

  address: address_base.Address
  num_experts: int

  def __post_init__(self):
    if self.address.num_slots != 1:
      raise ValueError(
        'An address that names experts must name one row for each token, but '
        f'{type(self.address).__name__} has {self.address.num_slots} slots. '
        'Give it one order of n-grams and one head.'
      )
    if self.address.num_rows > self.num_experts:
      raise ValueError(
        'Experts that an address names must be at least as many as its rows, '
        f'{self.address.num_rows}, but num_experts is {self.num_experts}. '
        'Raise it, or give the address fewer rows.'
      )

  def encoder_ids(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """Returns routing ids <int32>[batch, length]; see `encoder_rows`."""
    return self.address.encoder_rows(tokens, segment_ids)[..., 0]

  def decoder_ids(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """Returns routing ids <int32>[batch, length]; see `decoder_rows`."""
    return self.address.decoder_rows(tokens, segment_ids)[..., 0]

  def decoder_step(self, tokens: Array, state: Array) -> tuple[Array, Array]:
    """Returns the ids <int32>[batch, 1] of one step, and the next state."""
    rows, state = self.address.decoder_step(tokens, state)
    return rows[..., 0], state

  def initial_state(self, batch: int) -> np.ndarray:
    """Returns the state before the first token, [batch, any]."""
    return self.address.initial_state(batch)
