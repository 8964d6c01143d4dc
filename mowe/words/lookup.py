"""Finds the word that each token is in, and the expert of each word.

These are pure functions of arrays. The same code runs on NumPy (on the host,
which plans a batch) and on jax.numpy (in the model). A word is identified by a
rolling 32-bit hash of its piece ids,

  h = mix(piece)                  at the first piece of the word,
  h = h_before * P + mix(piece)   mod 2^32, at each piece after it,

which is looked up in a sorted table. A word that is not in the table backs off
to the entry of each of its pieces. A word that was never seen is mistaken for
an entry with probability num_keys / 2^32, which is 0.1% with four million keys.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from mowe.words import base_vocabulary

Array = Any  # numpy.ndarray or jax.Array.

# P. Since P % 8 == 5, its powers have the longest period, 2^30; since P is odd,
# it has an inverse.
_MULTIPLIER = 0x9E3779B5
_INVERSE = pow(_MULTIPLIER, -1, 2**32)
_SEED = 0x6D6F7765  # 'mowe' in ASCII.
_PADDING_KEY = np.uint32(0xFFFFFFFF)  # No key is greater: the order remains.


@dataclasses.dataclass(frozen=True, eq=False)
class LookupTables:
  """Everything that the look-up reads, as NumPy or JAX arrays.

  Under jit, pass `arrays()` as an argument and put it back with
  `dataclasses.replace(tables, **arrays)`. Tables that are closed over become
  constants, which XLA folds slowly.

  Attributes:
    piece_kinds: <uint8>[vocab], the kind of each piece, as from
      `Vocabulary.piece_kinds`.
    piece_hashes: <uint32>[vocab], the mix of each piece id, as from
      `hash_pieces`.
    piece_word_ids: <int32>[vocab], the entry of each piece; the number of
      entries for specials.
    keys: <uint32>[num_keys + padding], the rising hashes of all spellings.
    key_word_ids: <int32>[num_keys + padding], the entry of each key; -1 for
      padding.
    bucket_starts: <int32>[2^bits], the index in `keys` of the first key whose
      top bits are those of the bucket, or greater.
    experts: <int32>[num_words + 1], the expert of each entry; `num_experts` for
      an entry without an expert, and in the last place, which is that of
      specials.
    num_probes: number of halvings that find a key in the largest bucket.
    num_experts: number of experts, which is also the routing id of a real token
      without an expert.
  """

  piece_kinds: Array
  piece_hashes: Array
  piece_word_ids: Array
  keys: Array
  key_word_ids: Array
  bucket_starts: Array
  experts: Array
  num_probes: int
  num_experts: int

  def arrays(self) -> dict[str, Array]:
    """Returns the arrays by name, as a JAX pytree."""
    fields = [field.name for field in dataclasses.fields(self)]
    return {
      name: getattr(self, name)
      for name in fields
      if not name.startswith('num_')
    }


def hash_pieces(vocab_size: int) -> np.ndarray:
  """Returns each piece id mixed by murmur3's finaliser, <uint32>[vocab]."""
  x = np.arange(vocab_size, dtype=np.uint32) + np.uint32(_SEED)
  x ^= x >> np.uint32(16)
  x *= np.uint32(0x85EBCA6B)
  x ^= x >> np.uint32(13)
  x *= np.uint32(0xC2B2AE35)
  x ^= x >> np.uint32(16)
  return x


def hash_words(
  piece_hashes: np.ndarray, pieces: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
  """Returns the hash of each word of a flat list, <uint32>[words].

  Args:
    piece_hashes: <uint32>[vocab], as from `hash_pieces`.
    pieces: <int32>[pieces], the piece ids of all words.
    offsets: <int64>[words + 1]; word i is `pieces[offsets[i]:offsets[i + 1]]`,
      which must not be empty.
  """
  mixes = piece_hashes[pieces]
  lengths = np.diff(offsets)
  hashes = mixes[offsets[:-1]]
  for position in range(1, int(lengths.max(initial=0))):
    longer = np.flatnonzero(lengths > position)
    added = mixes[offsets[longer] + position]
    hashes[longer] = hashes[longer] * np.uint32(_MULTIPLIER) + added
  return hashes


def index_keys(
  keys: np.ndarray, key_word_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
  """Returns `keys`, `key_word_ids`, `bucket_starts`, `num_probes` of a table.

  Args:
    keys: <uint32>[num_keys], strictly rising.
    key_word_ids: <int32>[num_keys], the entry of each key.
  """
  # Keys are hashes and so evenly spread: with about as many buckets as keys,
  # a bucket has few keys and few halvings find one.
  bits = max(1, int(np.ceil(np.log2(max(2, len(keys))))))
  bounds = np.arange(2**bits, dtype=np.uint64) << np.uint64(32 - bits)
  starts = np.searchsorted(keys, bounds.astype(np.uint32)).astype(np.int32)
  largest = int(np.diff(starts, append=len(keys)).max())
  num_probes = max(1, largest.bit_length())
  padding = 2**num_probes
  return (
    np.concatenate([keys, np.full(padding, _PADDING_KEY)]),
    np.concatenate([key_word_ids, np.full(padding, -1, np.int32)]),
    starts,
    num_probes,
  )


def word_starts(
  tables: LookupTables, tokens: Array, segment_ids: Array | None = None
) -> Array:
  """Returns whether a word starts at each token, <bool>[batch, length]."""
  tokens, xp = _as_ids(tokens)
  kinds = _take(tables.piece_kinds, tokens)
  goes_on = (kinds[:, 1:] == base_vocabulary.CONTINUES) & (
    kinds[:, :-1] < base_vocabulary.ALONE
  )
  if segment_ids is not None:
    goes_on = goes_on & (segment_ids[:, 1:] == segment_ids[:, :-1])
  first = xp.ones_like(tokens[:, :1], dtype=bool)
  return xp.concatenate([first, ~goes_on], axis=1)


def start_places(starts: Array) -> Array:
  """Returns where the word of each token starts, <int32>[batch, length].

  Args:
    starts: <bool>[batch, length], as from `word_starts`.
  """
  xp = starts.__array_namespace__()
  positions = xp.arange(starts.shape[1], dtype=np.int32)[None, :]
  return _running_max(xp.where(starts, positions, xp.zeros_like(positions)))


def whole_words(
  tables: LookupTables, tokens: Array, segment_ids: Array | None = None
) -> Array:
  """Returns the word that each token is in.

  Args:
    tables: the tables of a `RoutingVocabulary`.
    tokens: [batch, length], of any number type. Ids beyond the vocabulary (T5
      pads its embedding) count as its last id, a special.
    segment_ids: <int32>[batch, length], the segments of a packed batch; None if
      each row is one text.

  Returns:
    <int32>[batch, length], the entry of each token's word, or of the token's
    piece if the word has none; the number of entries for specials.

  Raises:
    ValueError: `tokens` does not have two axes.
  """
  tokens, xp = _as_ids(tokens)
  starts = word_starts(tables, tokens, segment_ids)
  hashes = _hash_so_far(tables, tokens, starts)
  length = tokens.shape[1]
  # `hashes` has the hash of a whole word at its last piece. A running maximum
  # from the right gives each token the place of the last piece of its word. The
  # last token of a row always ends a word: `starts[:, :1]` is True.
  reverse = xp.arange(length - 1, -1, -1, dtype=np.int32)[None, :]
  is_last = xp.concatenate([starts[:, 1:], starts[:, :1]], axis=1)
  from_end = xp.where(is_last, reverse, xp.zeros_like(tokens))
  ends = (length - 1) - _running_max(from_end[:, ::-1])[:, ::-1]
  hashes = xp.take_along_axis(hashes, ends, axis=1)
  return _find(tables, hashes, tokens)


def words_so_far(
  tables: LookupTables, tokens: Array, segment_ids: Array | None = None
) -> Array:
  """Returns the word that each token ends, from its first piece to the token.

  In contrast to `whole_words` it does not depend on later tokens, as a decoder
  needs. Arguments and result are those of `whole_words`.
  """
  tokens, _ = _as_ids(tokens)
  starts = word_starts(tables, tokens, segment_ids)
  return _find(tables, _hash_so_far(tables, tokens, starts), tokens)


def next_word_so_far(
  tables: LookupTables, tokens: Array, state: Array
) -> tuple[Array, Array]:
  """Takes one step of `words_so_far`, for decoding.

  Args:
    tables: the tables of a `RoutingVocabulary`.
    tokens: [batch, 1], the tokens of this step.
    state: <uint32>[batch, 2], the hash of the word so far, and 1 if a piece
      that continues a word would continue this one, else 0. It is zeros before
      the first token.

  Returns:
    Entries <int32>[batch, 1], and the state for the next step.
  """
  tokens, xp = _as_ids(tokens)
  kinds = _take(tables.piece_kinds, tokens)
  mixes = _take(tables.piece_hashes, tokens)
  goes_on = continues_word(tables, tokens, state)
  longer = state[:, :1] * np.uint32(_MULTIPLIER) + mixes
  hashes = xp.where(goes_on, longer, mixes)
  is_open = (kinds < base_vocabulary.ALONE).astype(np.uint32)
  state = xp.concatenate([hashes, is_open], axis=1)
  return _find(tables, hashes, tokens), state


def continues_word(tables: LookupTables, tokens: Array, state: Array) -> Array:
  """Returns whether tokens go on with the word so far, <bool>[batch, 1].

  Arguments are those of `next_word_so_far`.
  """
  tokens, _ = _as_ids(tokens)
  kinds = _take(tables.piece_kinds, tokens)
  return (kinds == base_vocabulary.CONTINUES) & (state[:, 1:] == 1)


def to_experts(tables: LookupTables, tokens: Array, word_ids: Array) -> Array:
  """Returns routing ids <int32>[batch, length], which are -1 for padding."""
  tokens, xp = _as_ids(tokens)
  experts = _take(tables.experts, word_ids)
  return xp.where(tokens <= base_vocabulary.PAD_ID, np.int32(-1), experts)


def _as_ids(tokens: Array) -> tuple[Array, Any]:
  if tokens.ndim != 2:
    raise ValueError(
      f'tokens must have the shape [batch, length], but have {tokens.shape}. '
      'Give one text as tokens[None, :].'
    )
  # Tokens may be floats, because t5x initialises a model with such tokens.
  tokens = tokens.astype(np.int32)
  return tokens, tokens.__array_namespace__()


def _take(table: Array, indices: Array) -> Array:
  # The mode is 'clip' because NumPy checks each index by default, and JAX fills
  # in nonsense for indices out of range.
  return indices.__array_namespace__().take(table, indices, mode='clip')


def _hash_so_far(tables: LookupTables, tokens: Array, starts: Array) -> Array:
  """Returns the hash of the word up to each token, <uint32>[batch, length].

  No loop over the length is needed: with the sums S_i = sum_{j<=i} mix_j P^-j,
  a word that starts at s has the hash (S_i - S_{s-1}) P^i at its piece i.
  """
  xp = tokens.__array_namespace__()
  powers, inverse_powers = _powers(tokens.shape[1])
  terms = _take(tables.piece_hashes, tokens) * inverse_powers
  sums = xp.cumsum(terms, axis=1, dtype=np.uint32)
  before = xp.take_along_axis(sums - terms, start_places(starts), axis=1)
  return (sums - before) * powers


@functools.lru_cache(maxsize=64)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns P^i and P^-i mod 2^32, both <uint32>[1, length]."""
  rows = []
  for base in (_MULTIPLIER, _INVERSE):
    row = np.full((1, length), base, np.uint32)
    row[:, :1] = 1
    rows.append(np.cumprod(row, axis=1, dtype=np.uint32))
  return rows[0], rows[1]


def _running_max(values: Array) -> Array:
  """Returns the running maximum along the last axis of [batch, length].

  It is computed by doubling, because jax.numpy.maximum.accumulate is a loop
  over the length.
  """
  xp = values.__array_namespace__()
  shift = 1
  while shift < values.shape[1]:
    # The first `shift` columns are compared with themselves, which changes
    # nothing.
    earlier = xp.concatenate([values[:, :shift], values[:, :-shift]], axis=1)
    values = xp.maximum(values, earlier)
    shift *= 2
  return values


def _find(tables: LookupTables, hashes: Array, tokens: Array) -> Array:
  """Returns the entry of each hash, or of the piece if the hash has none.

  All arrays are [batch, length].
  """
  xp = tokens.__array_namespace__()
  bits = tables.bucket_starts.shape[0].bit_length() - 1
  buckets = (hashes >> np.uint32(32 - bits)).astype(np.int32)
  position = _take(tables.bucket_starts, buckets)
  # A binary search counts the keys of the bucket that are below the hash. All
  # keys after the bucket are above it, so that the end of the bucket need not
  # be known.
  for size in (2**i for i in reversed(range(tables.num_probes))):
    below = _take(tables.keys, position + (size - 1)) < hashes
    position = position + below.astype(np.int32) * size
  is_known = _take(tables.keys, position) == hashes
  word_ids = _take(tables.key_word_ids, position)
  back_off = _take(tables.piece_word_ids, tokens)
  # A hash that equals the key of the padding finds its entry, -1.
  return xp.where(is_known & (word_ids >= 0), word_ids, back_off)
