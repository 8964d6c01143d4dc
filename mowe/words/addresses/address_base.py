"""The contract of addresses: which rows of a table tokens name."""

import abc
import functools
import hashlib
import json
from typing import Any

import numpy as np

from mowe.words import base_vocabulary, routing_vocabulary

Array = Any  # numpy.ndarray or jax.Array.


class Address(abc.ABC):
  """Names the rows of a memory by the tokens alone.

  The rows of a token are known before the model runs, so that they can be read
  ahead from the host or from a disk. All methods take NumPy or JAX arrays, give
  arrays of the same kind, and are equal in both. A row number is -1 where a
  token has no row, as for padding. Addresses are frozen dataclasses.

  Attributes:
    num_slots: number of rows that each token names.
    num_rows: number of rows of the table.
  """

  @property
  @abc.abstractmethod
  def num_slots(self) -> int: ...

  @property
  @abc.abstractmethod
  def num_rows(self) -> int: ...

  @abc.abstractmethod
  def encoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """Returns the rows of an encoder's tokens, <int32>[batch, length, slots].

    They may depend on later tokens of the same word.

    Args:
      tokens: <int>[batch, length], token ids; 0 is padding.
      segment_ids: <int32>[batch, length], the number of the example to which
        each token of a packed row belongs; None if rows are not packed. The
        rows of a token do not depend on other examples.
    """

  @abc.abstractmethod
  def decoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """Returns the rows of a decoder's inputs; no row depends on later tokens.

    Arguments and result are those of `encoder_rows`.
    """

  @abc.abstractmethod
  def initial_state(self, batch: int) -> np.ndarray:
    """Returns the state before the first token, <int32>[batch, any]."""

  @abc.abstractmethod
  def decoder_step(self, tokens: Array, state: Array) -> tuple[Array, Array]:
    """Takes one step of `decoder_rows`, for decoding.

    Args:
      tokens: <int>[batch, 1], the tokens of this step.
      state: what the step before returned, or `initial_state`.

    Returns:
      Rows <int32>[batch, 1, slots], and the state for the next step.
    """

  def routing_vocabulary(self) -> routing_vocabulary.RoutingVocabulary | None:
    """Returns the routing vocabulary that the address reads, or None.

    It must be that of the model.
    """
    return None

  @abc.abstractmethod
  def constants(self) -> dict[str, Any]:
    """Returns all numbers that the rows depend on, as values of JSON."""

  @abc.abstractmethod
  def check_subwords(self, vocabulary: base_vocabulary.Vocabulary) -> None:
    """Raises ValueError unless the address fits this subword vocabulary."""

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hex digest, equal for two addresses only if all their rows are."""
    named = [type(self).__name__, self.constants()]
    return hashlib.sha256(
      json.dumps(named, sort_keys=True).encode()
    ).hexdigest()


def without_padding(rows: Array, tokens: Array) -> Array:
  """Returns the rows <int32>[batch, length, slots], with -1 for padding."""
  is_real = tokens[..., None] > base_vocabulary.PAD_ID
  return tokens.__array_namespace__().where(is_real, rows, np.int32(-1))


def as_ids(tokens: Array) -> Array:
  """Returns token ids as <int32>; t5x initialises a model with floats.

  Raises:
    ValueError: `tokens` does not have two axes.
  """
  if tokens.ndim != 2:
    raise ValueError(
      f'tokens must have the shape [batch, length], but have {tokens.shape}. '
      'Give one text as tokens[None, :].'
    )
  return tokens.astype(np.int32)
