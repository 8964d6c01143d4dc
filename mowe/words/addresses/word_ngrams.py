"""An address of hashed n-grams of words."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mowe.words import base_vocabulary, lookup, routing_vocabulary
from mowe.words.addresses import address_base, ngram_hashes

Array = address_base.Array


@dataclasses.dataclass(frozen=True)
class WordNGrams(address_base.Address):
  """Each token names rows by its word and the words before it.

  The alphabet is that of the routing vocabulary: its words, and the pieces to
  which unknown words back off. In an encoder all pieces of a word name the same
  rows. In a decoder a piece knows its word up to itself, and all of the words
  before it.

  Attributes:
    routing: the routing vocabulary.
    hash: the hash from words to rows; `num_ids(routing)` says how many
      different ids it is given.
  """

  routing: routing_vocabulary.RoutingVocabulary
  hash: ngram_hashes.NGramHash

  @property
  def num_slots(self) -> int:
    return sum(map(len, self.hash.moduli))

  @property
  def num_rows(self) -> int:
    return ngram_hashes.offsets(self.hash.moduli)[-1]

  def encoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.encoder_rows`."""
    words = lookup.whole_words(self.routing.tables, tokens, segment_ids)
    return self._rows(tokens, words, segment_ids)

  def decoder_rows(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """See `Address.decoder_rows`."""
    words = lookup.words_so_far(self.routing.tables, tokens, segment_ids)
    return self._rows(tokens, words, segment_ids)

  def initial_state(self, batch: int) -> np.ndarray:
    """See `Address.initial_state`.

    The first two columns are the state of the word so far, and the others are
    the last words, the newest first.
    """
    words = np.full((batch, len(self.hash.moduli) + 1), self._start, np.uint32)
    return np.concatenate([self.routing.initial_state(batch), words], axis=1)

  def decoder_step(self, tokens: Array, state: Array) -> tuple[Array, Array]:
    """See `Address.decoder_step`."""
    tokens = address_base.as_ids(tokens)
    xp = tokens.__array_namespace__()
    tables = self.routing.tables
    goes_on = lookup.continues_word(tables, tokens, state[:, :2])
    word, word_state = lookup.next_word_so_far(tables, tokens, state[:, :2])
    word = self._without_padding(tokens, word)
    # A piece that continues a word replaces what was known of that word.
    before = xp.where(goes_on, state[:, 3:], state[:, 2:-1])
    words = xp.concatenate([word.astype(np.uint32), before], axis=1)
    history = [
      words[:, k : k + 1].astype(np.int32) for k in range(words.shape[1])
    ]
    rows = address_base.without_padding(self.hash(history), tokens)
    return rows, xp.concatenate([word_state, words], axis=1)

  def routing_vocabulary(self) -> routing_vocabulary.RoutingVocabulary:
    """See `Address.routing_vocabulary`."""
    return self.routing

  def constants(self) -> dict[str, Any]:
    """See `Address.constants`."""
    return {
      'routing': self.routing.sha256,
      'hash': [type(self.hash).__name__, dataclasses.asdict(self.hash)],
    }

  def check_subwords(self, vocabulary: base_vocabulary.Vocabulary) -> None:
    """See `Address.check_subwords`."""
    self.routing.check_subwords(vocabulary)

  @property
  def _start(self) -> int:
    """The id that stands for words before the start of a text."""
    return self.routing.num_words + 1

  def _without_padding(self, tokens, words) -> Array:
    """The words [batch, length]; padding is before the start of a text.

    So a text may have padding before it, as inputs of a language model have.
    """
    is_padding = tokens <= base_vocabulary.PAD_ID
    xp = tokens.__array_namespace__()
    return xp.where(is_padding, np.int32(self._start), words)

  def _rows(self, tokens, words, segment_ids) -> Array:
    """Rows [batch, length, slots], from the word of each token."""
    tokens = address_base.as_ids(tokens)
    words = self._without_padding(tokens, words)
    history = self._history(tokens, words, segment_ids)
    return address_base.without_padding(self.hash(history), tokens)

  def _history(self, tokens, words, segment_ids) -> Sequence[Array]:
    """The word of each token and the words before it, each [batch, length]."""
    xp = tokens.__array_namespace__()
    starts = lookup.word_starts(self.routing.tables, tokens, segment_ids)
    # The last token of the word before; -1 where a text begins with the word.
    before = lookup.start_places(starts) - 1
    if segment_ids is not None:
      place = xp.maximum(before, 0)
      own = xp.take_along_axis(segment_ids, place, axis=1) == segment_ids
      before = xp.where(own, before, np.int32(-1))
    history, exists = [words], xp.ones_like(starts)
    positions = xp.arange(before.shape[1], dtype=np.int32)[None, :]
    place = xp.zeros_like(before) + positions
    for _ in self.hash.moduli:
      place = xp.take_along_axis(before, place, axis=1)
      exists = exists & (place >= 0)
      place = xp.maximum(place, 0)
      earlier = xp.take_along_axis(words, place, axis=1)
      history.append(xp.where(exists, earlier, np.int32(self._start)))
    return history


def engram(
  routing: routing_vocabulary.RoutingVocabulary,
  rows_wanted: Sequence[int],
  heads: int,
  *,
  seed: int = 0,
) -> WordNGrams:
  """Returns an address of n-grams of words, hashed as Engram hashes pieces.

  Args:
    routing: the routing vocabulary.
    rows_wanted: for each order, 2-grams first, the rows of each of its slots;
      see `ngram_hashes.engram_hashes`.
    heads: number of slots of each order.
    seed: chooses the multipliers.
  """
  (hashed,) = ngram_hashes.engram_hashes(
    num_ids(routing), rows_wanted, heads, seed=seed
  )
  return WordNGrams(routing, hashed)


def num_ids(routing: routing_vocabulary.RoutingVocabulary) -> int:
  """Returns how many different ids the hash of `WordNGrams` is given.

  These are the entries, one id for all specials, and one for what is before the
  start of a text.
  """
  return routing.num_words + 2
