"""An address with one row for each word expert of a routing vocabulary."""

import dataclasses
from typing import Any

import numpy as np

from mowe.words import base_vocabulary, routing_vocabulary
from mowe.words.addresses import address_base

Array = address_base.Array


@dataclasses.dataclass(frozen=True)
class Words(address_base.Address):
  """Each token names the row of its word, as it names its word expert.

  A real token without an expert, such as a frequent word that is skipped, names
  the last row, which all such tokens share. A vector memory needs it: without a
  row, a diagonal of zeros would remove the feed-forward for these tokens.

  Attributes:
    routing: the routing vocabulary.
  """

  routing: routing_vocabulary.RoutingVocabulary

  @property
  def num_slots(self) -> int:
    return 1

  @property
  def num_rows(self) -> int:
    return self.routing.num_experts + 1

  def encoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.encoder_rows`."""
    return self.routing.encoder_ids(tokens, segment_ids)[..., None]

  def decoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.decoder_rows`."""
    return self.routing.decoder_ids(tokens, segment_ids)[..., None]

  def initial_state(self, batch: int) -> np.ndarray:
    """See `Address.initial_state`."""
    return self.routing.initial_state(batch)

  def decoder_step(self, tokens: Array, state: Array) -> tuple[Array, Array]:
    """See `Address.decoder_step`."""
    ids, state = self.routing.decoder_step(tokens, state)
    return ids[..., None], state

  def routing_vocabulary(self) -> routing_vocabulary.RoutingVocabulary:
    """See `Address.routing_vocabulary`."""
    return self.routing

  def constants(self) -> dict[str, Any]:
    """See `Address.constants`."""
    return {'routing': self.routing.sha256}

  def check_subwords(self, vocabulary: base_vocabulary.Vocabulary) -> None:
    """See `Address.check_subwords`."""
    self.routing.check_subwords(vocabulary)
