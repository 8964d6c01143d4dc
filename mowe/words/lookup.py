"""From token ids to the words they are in, and from words to experts.

Pure functions over arrays; the same code runs on numpy (the host, which plans a
batch) and jax.numpy (the model). A word is known by a rolling 32-bit hash of
its piece ids,

  h = mix(piece)             at the first piece of the word,
  h = h_before * P + mix(piece)    mod 2^32, after it,

which is looked up in a sorted table. A word that is not there backs off to the
entry of each of its pieces. A word that was never seen is taken for an entry
with probability num_keys / 2^32: 0.1% with four million keys.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from mowe.words import base_vocabulary

Array = Any  # numpy.ndarray or jax.Array.

# P % 8 == 5 gives powers of P the longest period, 2^30.
_MULTIPLIER = 0x9E3779B5
_INVERSE = pow(_MULTIPLIER, -1, 2**32)
_SEED = 0x6D6F7765
_PADDING_KEY = np.uint32(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True, eq=False)
class LookupTables:
  """Everything the look-up reads. Arrays may be numpy or jax.

  Under jit, pass `arrays()` as an argument and put it back with
  `dataclasses.replace(tables, **arrays)`: tables that are closed over become
  constants, which XLA folds slowly.

  Attributes:
    piece_kinds: <uint8>[vocab], see `subwords`.
    piece_hashes: <uint32>[vocab], `hash_pieces(vocab)`.
    piece_word_ids: <int32>[vocab], the entry of each piece; the number of words
      for specials.
    keys: <uint32>[num_keys + padding], rising hashes.
    key_word_ids: <int32>[num_keys + padding]; -1 for padding.
    bucket_starts: <int32>[2^bits], the first key with these top bits.
    experts: <int32>[num_words + 1], the expert of each word, `num_experts` for
      those without one; the last is the entry of specials.
    num_probes: halvings that find a key in the largest bucket.
    num_experts: the routing id of a real token without an expert.
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
    """Returns the arrays by name, a jax pytree."""
    fields = [field.name for field in dataclasses.fields(self)]
    return {
      name: getattr(self, name)
      for name in fields
      if not name.startswith('num_')
    }


def hash_pieces(vocab_size: int) -> np.ndarray:
  """Returns the fixed mix of each piece id, <uint32>[vocab] (murmur3's)."""
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

  Word i is `pieces[offsets[i]:offsets[i + 1]]` and has at least one piece.
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
    key_word_ids: <int32>[num_keys].
  """
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
  """Returns <bool>[batch, length]: a word starts here."""
  tokens, xp = _as_ids(tokens)
  kinds = _take(tables.piece_kinds, tokens)
  goes_on = (kinds[:, 1:] == base_vocabulary.CONTINUES) & (
    kinds[:, :-1] < base_vocabulary.ALONE
  )
  if segment_ids is not None:
    goes_on = goes_on & (segment_ids[:, 1:] == segment_ids[:, :-1])
  first = xp.ones_like(tokens[:, :1], dtype=bool)
  return xp.concatenate([first, ~goes_on], axis=1)


def whole_words(
  tables: LookupTables, tokens: Array, segment_ids: Array | None = None
) -> Array:
  """Returns the word that each token is in.

  Args:
    tables: of a `RoutingVocabulary`.
    tokens: [batch, length] of any number type. Ids beyond the vocabulary (T5
      pads its embedding) count as its last one, a special.
    segment_ids: <int32>[batch, length] of a packed batch, or None.

  Returns:
    <int32>[batch, length], the entry of the token's word, or of the token when
    the word has none; the number of words for specials.

  Raises:
    ValueError: `tokens` has another number of axes.
  """
  tokens, xp = _as_ids(tokens)
  starts = word_starts(tables, tokens, segment_ids)
  hashes = _hash_so_far(tables, tokens, starts)
  length = tokens.shape[1]
  # The word's hash stands at its last piece: find that from the right. A row
  # ends a word, and its first token always starts one.
  reverse = xp.arange(length - 1, -1, -1, dtype=np.int32)[None, :]
  is_last = xp.concatenate([starts[:, 1:], starts[:, :1]], axis=1)
  from_end = xp.where(is_last, reverse, xp.zeros_like(tokens))
  ends = (length - 1) - _running_max(from_end[:, ::-1])[:, ::-1]
  hashes = xp.take_along_axis(hashes, ends, axis=1)
  return _find(tables, hashes, tokens)


def words_so_far(
  tables: LookupTables, tokens: Array, segment_ids: Array | None = None
) -> Array:
  """As `whole_words`, of the word from its first piece to each token.

  It depends on earlier tokens only, as a decoder needs.
  """
  tokens, _ = _as_ids(tokens)
  starts = word_starts(tables, tokens, segment_ids)
  return _find(tables, _hash_so_far(tables, tokens, starts), tokens)


def next_word_so_far(
  tables: LookupTables, tokens: Array, state: Array
) -> tuple[Array, Array]:
  """One step of `words_so_far`, for decoding.

  Args:
    tables: of a `RoutingVocabulary`.
    tokens: [batch, 1], the tokens of this step.
    state: <uint32>[batch, 2], the hash of the word so far and 1 where a piece
      that continues a word would continue it. Zeros before the first token.

  Returns:
    word ids <int32>[batch, 1] and the state for the next step.
  """
  tokens, xp = _as_ids(tokens)
  kinds = _take(tables.piece_kinds, tokens)
  mixes = _take(tables.piece_hashes, tokens)
  goes_on = (kinds == base_vocabulary.CONTINUES) & (state[:, 1:] == 1)
  longer = state[:, :1] * np.uint32(_MULTIPLIER) + mixes
  hashes = xp.where(goes_on, longer, mixes)
  is_open = (kinds < base_vocabulary.ALONE).astype(np.uint32)
  state = xp.concatenate([hashes, is_open], axis=1)
  return _find(tables, hashes, tokens), state


def to_experts(tables: LookupTables, tokens: Array, word_ids: Array) -> Array:
  """Returns routing ids <int32>[batch, length]: -1 where a token is padding."""
  tokens, xp = _as_ids(tokens)
  experts = _take(tables.experts, word_ids)
  return xp.where(tokens <= base_vocabulary.PAD_ID, np.int32(-1), experts)


def _as_ids(tokens: Array) -> tuple[Array, Any]:
  if tokens.ndim != 2:
    raise ValueError(
      f'tokens must have the shape [batch, length], but have {tokens.shape}. '
      'Give one text as tokens[None, :].'
    )
  # t5x initialises a model with float tokens.
  tokens = tokens.astype(np.int32)
  return tokens, tokens.__array_namespace__()


def _take(table: Array, indices: Array) -> Array:
  # 'clip': numpy's default checks each index, jax's fills with nonsense.
  return indices.__array_namespace__().take(table, indices, mode='clip')


def _hash_so_far(tables: LookupTables, tokens: Array, starts: Array) -> Array:
  """<uint32>[batch, length]: the hash of the word up to each token.

  With sums S_i = sum_{j<=i} mix_j P^-j, a word that starts at s has the hash
  (S_i - S_{s-1}) P^i: no loop over the length.
  """
  xp = tokens.__array_namespace__()
  powers, inverse_powers = _powers(tokens.shape[1])
  terms = _take(tables.piece_hashes, tokens) * inverse_powers
  sums = xp.cumsum(terms, axis=1, dtype=np.uint32)
  positions = xp.arange(tokens.shape[1], dtype=np.int32)[None, :]
  start_of = _running_max(xp.where(starts, positions, xp.zeros_like(tokens)))
  before = xp.take_along_axis(sums - terms, start_of, axis=1)
  return (sums - before) * powers


@functools.lru_cache(maxsize=64)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
  """P^i and P^-i mod 2^32, both <uint32>[1, length]."""
  rows = []
  for base in (_MULTIPLIER, _INVERSE):
    row = np.full((1, length), base, np.uint32)
    row[:, :1] = 1
    rows.append(np.cumprod(row, axis=1, dtype=np.uint32))
  return rows[0], rows[1]


def _running_max(values: Array) -> Array:
  """Running maximum along the last axis of [batch, length].

  By doubling: jax.numpy.maximum.accumulate is a loop over the length.
  """
  xp = values.__array_namespace__()
  shift = 1
  while shift < values.shape[1]:
    # The first `shift` columns meet themselves, which changes nothing.
    earlier = xp.concatenate([values[:, :shift], values[:, :-shift]], axis=1)
    values = xp.maximum(values, earlier)
    shift *= 2
  return values


def _find(tables: LookupTables, hashes: Array, tokens: Array) -> Array:
  """The entry of each hash, or of the piece where there is none."""
  xp = tokens.__array_namespace__()
  bits = tables.bucket_starts.shape[0].bit_length() - 1
  buckets = (hashes >> np.uint32(32 - bits)).astype(np.int32)
  position = _take(tables.bucket_starts, buckets)
  # Halving counts the keys of the bucket below the hash. Keys after the bucket
  # are above it, so the bucket's end need not be known.
  for size in (2**i for i in reversed(range(tables.num_probes))):
    below = _take(tables.keys, position + (size - 1)) < hashes
    position = position + below.astype(np.int32) * size
  is_known = _take(tables.keys, position) == hashes
  word_ids = _take(tables.key_word_ids, position)
  back_off = _take(tables.piece_word_ids, tokens)
  # A hash equal to the padding key finds the padding's entry, -1.
  return xp.where(is_known & (word_ids >= 0), word_ids, back_off)
