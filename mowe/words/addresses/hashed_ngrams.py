"""An address of hashed n-grams of pieces."""

import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from mowe.words import base_vocabulary
from mowe.words.addresses import (
  address_base,
  compressed_vocabulary,
  ngram_hashes,
  primes,
)

Array = address_base.Array

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class HashedNGrams(address_base.Address):
  """Each token names one row for each slot of the hash of the last pieces.

  Sources: Engram, arXiv 2601.07372, with `MultiplyXor` and a compressed
  vocabulary; Over-Encoding and LongCat with `Polynomial`. Encoder and decoder
  name the same rows, since an n-gram ends at its token.

  Attributes:
    hash: the hash from ids to rows.
    compressed: the id of each piece, as from
      `compressed_vocabulary.of_vocabulary`; None leaves the ids as they are.
    start_id: the id, before compression, that stands for tokens before the
      start of a text.
    eos_id: an id that ends a text: tokens after it do not see it, and what is
      before it, but `start_id` instead. None if only segments end texts.
  """

  hash: ngram_hashes.NGramHash
  compressed: tuple[int, ...] | None = None
  start_id: int = base_vocabulary.PAD_ID
  eos_id: int | None = None

  @property
  def num_slots(self) -> int:
    return sum(map(len, self.hash.moduli))

  @property
  def num_rows(self) -> int:
    return ngram_hashes.offsets(self.hash.moduli)[-1]

  @property
  def _before(self) -> int:
    """How many tokens before a token its longest n-gram has."""
    return ngram_hashes.max_ngram(self.hash.moduli) - 1

  def encoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.encoder_rows`."""
    tokens = address_base.as_ids(tokens)
    rows = self.rows_of_all(tokens, segment_ids)
    return address_base.without_padding(rows, tokens)

  def decoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.decoder_rows`."""
    return self.encoder_rows(tokens, segment_ids)

  def rows_of_all(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """Returns the rows of all tokens, also those of padding.

    Arguments and result are those of `encoder_rows`.
    """
    ids = self.compress(tokens)
    history = [
      earlier(ids, k, self._start, segment_ids) for k in range(self._before + 1)
    ]
    return self._rows(history)

  def compress(self, tokens: Array) -> Array:
    """Returns the ids that are hashed, <int32>; negative ids stay."""
    if self.compressed is None:
      return tokens
    xp = tokens.__array_namespace__()
    ids = xp.take(self._compressed_array, tokens, mode='clip')
    return xp.where(tokens < 0, tokens, ids)

  def initial_state(self, batch: int) -> np.ndarray:
    """See `Address.initial_state`: the last ids, the newest first."""
    return np.full((batch, self._before), self._start, np.int32)

  def decoder_step(self, tokens: Array, state: Array) -> tuple[Array, Array]:
    """See `Address.decoder_step`."""
    tokens = address_base.as_ids(tokens)
    ids = self.compress(tokens)
    state = ids.__array_namespace__().concatenate([ids, state], axis=1)
    history = [state[:, k : k + 1] for k in range(self._before + 1)]
    rows = address_base.without_padding(self._rows(history), tokens)
    return rows, state[:, :-1]

  def constants(self) -> dict[str, Any]:
    """See `Address.constants`."""
    compressed = None
    if self.compressed is not None:
      compressed = hashlib.sha256(self._compressed_array.tobytes()).hexdigest()
    return {
      'hash': [type(self.hash).__name__, dataclasses.asdict(self.hash)],
      'compressed': compressed,
      'start_id': self.start_id,
      'eos_id': self.eos_id,
    }

  def check_subwords(self, vocabulary: base_vocabulary.Vocabulary) -> None:
    """See `Address.check_subwords`."""
    if self.compressed is not None and len(self.compressed) != vocabulary.size:
      raise ValueError(
        'The compressed vocabulary must have an id for each of the '
        f'{vocabulary.size} ids of the subword vocabulary, but has '
        f'{len(self.compressed)}. Make it with '
        'compressed_vocabulary.of_vocabulary.'
      )
    size = vocabulary.size
    for modulus in itertools.chain(*self.hash.moduli):
      # A 2-gram of a size near a multiple depends on its last id alone.
      distance = abs(modulus - round(modulus / size) * size)
      if modulus > size and distance <= 1:
        _logger.warning(
          'A part of %s rows is next to a multiple of the %s ids of the '
          'vocabulary, where n-grams collide far more often. Take %s rows.',
          f'{modulus:,}',
          f'{size:,}',
          f'{primes.next_prime(modulus + size // 3):,}',
        )

  @functools.cached_property
  def _compressed_array(self) -> np.ndarray:
    return np.asarray(self.compressed, '<i4')

  @functools.cached_property
  def _start(self) -> int:
    return int(self.compress(np.array([self.start_id], np.int32))[0])

  def _rows(self, history: Sequence[Array]) -> Array:
    """Rows of a history, in which nothing before an end of text is seen."""
    if self.eos_id is None:
      return self.hash(history)
    xp = history[0].__array_namespace__()
    end = int(self.compress(np.array([self.eos_id], np.int32))[0])
    seen, is_same_text = [history[0]], True
    for ids in history[1:]:
      is_same_text = is_same_text & (ids != end)
      seen.append(xp.where(is_same_text, ids, np.int32(self._start)))
    return self.hash(seen)


def engram(
  vocabulary: base_vocabulary.Vocabulary,
  rows_wanted: Sequence[int],
  heads: int,
  *,
  layers: Sequence[int] = (0,),
  layer: int = 0,
  seed: int = 0,
) -> HashedNGrams:
  """Returns the address of an Engram memory in one layer.

  Args:
    vocabulary: the subword vocabulary, which is compressed.
    rows_wanted: for each order, 2-grams first, the rows of each of its slots;
      see `ngram_hashes.engram_hashes`.
    heads: number of slots of each order.
    layers: numbers of all layers that host such a memory.
    layer: the one of them that is asked for.
    seed: chooses the multipliers.
  """
  if layer not in layers:
    raise ValueError(
      f'layer must be one of the layers with such a memory, {tuple(layers)}, '
      f'but is {layer}. Add it to layers.'
    )
  compressed = compressed_vocabulary.of_vocabulary(vocabulary)
  hashes = ngram_hashes.engram_hashes(
    max(compressed) + 1, rows_wanted, heads, layers, seed
  )
  return HashedNGrams(hashes[list(layers).index(layer)], compressed)


def earlier(
  ids: Array, distance: int, start: int, segment_ids: Array | None
) -> Array:
  """Returns the id so many tokens before each token, <int32>[batch, length].

  Args:
    ids: <int32>[batch, length].
    distance: number of tokens, from 0.
    start: the id of what is before the start of a text.
    segment_ids: <int32>[batch, length], the segments of packed rows, or None.
  """
  if distance == 0:
    return ids
  xp = ids.__array_namespace__()
  # A text may be shorter than the distance.
  number = min(distance, ids.shape[1])

  def shifted(values, fill):
    first = xp.full_like(values[:, :number], fill)
    return xp.concatenate([first, values[:, : -number or None]], axis=1)[
      :, : ids.shape[1]
    ]

  before = shifted(ids, start)
  if segment_ids is None:
    return before
  is_same = shifted(segment_ids, -1) == segment_ids
  return xp.where(is_same, before, np.int32(start))
