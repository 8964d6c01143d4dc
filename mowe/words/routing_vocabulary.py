"""The routing vocabulary says which words have which experts, in one file.

An entry is a word, with hashes of the piece sequences of its spellings as keys,
or a piece of the subword vocabulary, to which unknown words back off. Entries
are numbered by falling count. The map from entries to experts is data, so that
it can be hashed or balanced without a change in any model.
"""

import dataclasses
import functools
import hashlib
import heapq
import io
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from mowe.words import atomic_files, base_vocabulary, lookup

Array = lookup.Array
Assign = Callable[[np.ndarray, int, np.ndarray], np.ndarray]

_FORMAT = 'mowe routing vocabulary'
_VERSION = 1
_ARRAYS = {
  'words_utf8': np.uint8,
  'word_offsets': np.int64,
  'counts': np.int64,
  'is_piece': np.bool_,
  'keys': np.uint32,
  'key_word_ids': np.int32,
  'piece_kinds': np.uint8,
  'piece_word_ids': np.int32,
  'experts': np.int32,
  'collisions': np.int32,
}
_SCALARS = ('num_experts', 'num_skipped', 'subwords_sha256', 'subwords_size')


def assign_by_hash(
  loads: np.ndarray, num_experts: int, skipped: np.ndarray
) -> np.ndarray:
  """Returns the paper's experts <int32>[V]: entry id modulo `num_experts`.

  Source: MoWE, arXiv 2311.10768, section 2.

  Args:
    loads: <int64>[V], tokens of each entry; this function ignores them.
    num_experts: number of experts.
    skipped: <bool>[V], entries without an expert, which get `num_experts`.
  """
  experts = np.arange(len(loads), dtype=np.int32) % np.int32(num_experts)
  return np.where(skipped, np.int32(num_experts), experts)


def assign_balanced(
  loads: np.ndarray, num_experts: int, skipped: np.ndarray
) -> np.ndarray:
  """Returns experts <int32>[V] that are about equally loaded.

  Entries are taken by falling load, and each goes to the expert with the least
  load so far. Entries with equal loads go to experts with equal loads in the
  order of their numbers. The arguments are those of `assign_by_hash`.
  """
  experts = np.full(len(loads), num_experts, np.int32)
  order = np.argsort(-loads, kind='stable')
  order = order[~skipped[order]]
  # Entries that were never seen have no load, so that all of them would go to
  # the one lightest expert. Counted as one token in total, they spread out.
  unseen = 1.0 / max(1, len(loads))
  lightest = [(0.0, expert) for expert in range(num_experts)]
  for word_id, load in zip(order.tolist(), loads[order].tolist(), strict=True):
    total, expert = lightest[0]
    experts[word_id] = expert
    heapq.heapreplace(lightest, (total + max(load, unseen), expert))
  return experts


@dataclasses.dataclass(frozen=True)
class ExpertLoads:
  """How the tokens of the counted text fall on the experts.

  Attributes:
    shares: <float64>[num_experts], fraction of all tokens that each expert has.
    without_expert: fraction of all tokens that have no expert.
    max_over_mean: load of the busiest expert in units of the mean.
  """

  shares: np.ndarray
  without_expert: float
  max_over_mean: float


@dataclasses.dataclass(frozen=True)
class ExplainedPiece:
  """How one piece of a text is routed, as `RoutingVocabulary.explain` says.

  Attributes:
    piece: the piece as the subword vocabulary writes it.
    word: the word that the piece is in, lower-cased.
    word_id: the entry of the piece; None for specials.
    count: number of tokens of that entry in the counted text.
    expert: the expert of the piece; None if it has none.
    reason: how the entry was found, or why the piece has no expert.
  """

  piece: str
  word: str
  word_id: int | None
  count: int
  expert: int | None
  reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class RoutingVocabulary:
  """Words and pieces, their counts, keys and experts.

  V is the number of entries, `num_words`. A routing vocabulary is made by
  `vocabulary_builder.build_routing_vocabulary` or read by `load`.

  Attributes:
    words_utf8: <uint8>[bytes], the texts of all entries, one after the other.
    word_offsets: <int64>[V + 1], where each text begins in `words_utf8`.
    counts: <int64>[V], falling, the number of tokens that the encoder routes to
      each entry in the counted text. A word of three pieces adds three at each
      occurrence.
    is_piece: <bool>[V], whether an entry is a piece, to which unknown words
      back off, and not a word.
    keys: <uint32>[num_keys], rising, the hashes of the spellings of the words.
    key_word_ids: <int32>[num_keys], the entry of each key.
    piece_kinds: <uint8>[subwords_size], the kind of each piece, as from
      `Vocabulary.piece_kinds`.
    piece_word_ids: <int32>[subwords_size], the entry of each piece; V for
      specials.
    experts: <int32>[V + 1], the expert of each entry; `num_experts` for an
      entry without an expert, and in the last place, which is that of specials.
    collisions: <int32>[n, 2], pairs of words with a spelling of equal hash; the
      first word of a pair kept the key.
    num_experts: number of experts.
    num_skipped: number of the most frequent entries, which have no expert.
    subwords_sha256: digest of the subword vocabulary that this one was built
      for.
    subwords_size: size of that subword vocabulary, with sentinels.
  """

  words_utf8: np.ndarray
  word_offsets: np.ndarray
  counts: np.ndarray
  is_piece: np.ndarray
  keys: np.ndarray
  key_word_ids: np.ndarray
  piece_kinds: np.ndarray
  piece_word_ids: np.ndarray
  experts: np.ndarray
  collisions: np.ndarray
  num_experts: int
  num_skipped: int
  subwords_sha256: str
  subwords_size: int

  @property
  def num_words(self) -> int:
    """Number of entries, both words and pieces."""
    return len(self.counts)

  def word(self, i: int) -> str:
    """Returns the text of an entry: a word in lower case, or a piece."""
    if not 0 <= i < self.num_words:
      raise ValueError(
        f'A word id must be in 0..{self.num_words - 1}, but is {i}. Ids come '
        'from lookup.whole_words; the number of words itself marks specials.'
      )
    start, end = self.word_offsets[i : i + 2]
    return self.words_utf8[start:end].tobytes().decode('utf-8')

  @functools.cached_property
  def sha256(self) -> str:
    """Hex digest of the content, which is equal for equal vocabularies."""
    digest = hashlib.sha256()
    for name in _SCALARS:
      digest.update(f'{name}={getattr(self, name)}\n'.encode())
    for name in _ARRAYS:
      array = np.ascontiguousarray(getattr(self, name))
      digest.update(f'{name} {array.dtype.str} {array.shape}\n'.encode())
      digest.update(array.data.cast('B') if array.size else b'')
    return digest.hexdigest()

  @functools.cached_property
  def tables(self) -> lookup.LookupTables:
    """The tables that `lookup` reads, as NumPy arrays."""
    keys, key_word_ids, bucket_starts, num_probes = lookup.index_keys(
      self.keys, self.key_word_ids
    )
    return lookup.LookupTables(
      piece_kinds=self.piece_kinds,
      piece_hashes=lookup.hash_pieces(self.subwords_size),
      piece_word_ids=self.piece_word_ids,
      keys=keys,
      key_word_ids=key_word_ids,
      bucket_starts=bucket_starts,
      experts=self.experts,
      num_probes=num_probes,
      num_experts=self.num_experts,
    )

  def encoder_ids(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """Returns routing ids <int32>[batch, length] by the word of each token.

    Args:
      tokens: <int>[batch, length], a NumPy or JAX array.
      segment_ids: <int32>[batch, length], the segments of a packed batch; None
        if each row is one text.
    """
    word_ids = lookup.whole_words(self.tables, tokens, segment_ids)
    return lookup.to_experts(self.tables, tokens, word_ids)

  def decoder_ids(
    self, tokens: Array, segment_ids: Array | None = None
  ) -> Array:
    """Returns routing ids <int32>[batch, length] by the word up to each token.

    Args:
      tokens: <int>[batch, length], the inputs of the decoder.
      segment_ids: <int32>[batch, length], the segments of a packed batch; None
        if each row is one text.
    """
    word_ids = lookup.words_so_far(self.tables, tokens, segment_ids)
    return lookup.to_experts(self.tables, tokens, word_ids)

  def decoder_step(self, tokens: Array, state: Array) -> tuple[Array, Array]:
    """Returns the routing ids of one step of decoding.

    Args:
      tokens: <int>[batch, 1], the tokens of this step.
      state: <uint32>[batch, 2], the state that the step before returned, or
        `initial_state`.

    Returns:
      Routing ids <int32>[batch, 1], and the state for the next step.
    """
    word_ids, state = lookup.next_word_so_far(self.tables, tokens, state)
    return lookup.to_experts(self.tables, tokens, word_ids), state

  def initial_state(self, batch: int) -> np.ndarray:
    """Returns the state before the first token, <uint32>[batch, 2]."""
    return np.zeros((batch, 2), np.uint32)

  def check_subwords(self, vocabulary: base_vocabulary.Vocabulary) -> None:
    """Raises ValueError unless it was built for this subword vocabulary."""
    expected = (self.subwords_sha256, self.subwords_size)
    found = (vocabulary.sha256, vocabulary.size)
    if expected != found:
      raise ValueError(
        'The routing vocabulary must be built for the subword vocabulary in '
        f'use: it was built for sha256 {expected[0]} with {expected[1]} ids, '
        f'but sha256 {found[0]} with {found[1]} ids is in use. Load the '
        'subword vocabulary it was built for (with as many extra_ids), or '
        'build the routing vocabulary again with build_routing_vocabulary.'
      )

  def check_num_experts(self, num_experts: int) -> None:
    """Raises ValueError unless a model has as many experts as it."""
    if num_experts != self.num_experts:
      raise ValueError(
        'The model must have as many experts as its routing vocabulary, '
        f'{self.num_experts}, but has {num_experts}. Set the model to '
        f'{self.num_experts}, or save '
        f'RoutingVocabulary.with_experts({num_experts}) for it.'
      )

  def with_experts(
    self,
    num_experts: int,
    *,
    assign: Assign = assign_by_hash,
    num_skipped: int | None = None,
  ) -> 'RoutingVocabulary':
    """Returns a vocabulary of the same words with other experts.

    Args:
      num_experts: number of experts.
      assign: `assign_by_hash`, `assign_balanced`, or a function like them.
      num_skipped: number of the most frequent entries that get no expert; None
        leaves it as it is.
    """
    if num_skipped is None:
      num_skipped = self.num_skipped
    experts = assign_experts(self.counts, num_experts, assign, num_skipped)
    return dataclasses.replace(
      self, experts=experts, num_experts=num_experts, num_skipped=num_skipped
    )

  def loads(self) -> ExpertLoads:
    """Returns the load of each expert that is expected in the encoder."""
    per_expert = np.bincount(
      self.experts[:-1], weights=self.counts, minlength=self.num_experts + 1
    )
    shares = per_expert / max(1, int(self.counts.sum()))
    mean = shares[:-1].mean()
    return ExpertLoads(
      shares=shares[:-1],
      without_expert=float(shares[-1]),
      max_over_mean=float(shares[:-1].max() / mean) if mean else 1.0,
    )

  def explain(
    self, text: str, vocabulary: base_vocabulary.Vocabulary
  ) -> list[ExplainedPiece]:
    """Returns how each piece of a text is routed in the encoder."""
    self.check_subwords(vocabulary)
    ids = vocabulary.encode(text)
    if not ids:
      return []
    tokens = np.array([ids], np.int32)
    word_ids = lookup.whole_words(self.tables, tokens)[0]
    routing_ids = lookup.to_experts(self.tables, tokens, word_ids[None])[0]
    starts = lookup.word_starts(self.tables, tokens)[0]
    words = np.split(ids, np.flatnonzero(starts)[1:])
    rows = []
    for word in words:
      text_of_word = vocabulary.spell(word.tolist()).lower()
      for piece in word.tolist():
        word_id, routing_id = int(word_ids[len(rows)]), routing_ids[len(rows)]
        has_entry = word_id < self.num_words
        has_expert = 0 <= routing_id < self.num_experts
        row = ExplainedPiece(
          piece=vocabulary.piece(piece),
          word=text_of_word,
          word_id=word_id if has_entry else None,
          count=int(self.counts[word_id]) if has_entry else 0,
          expert=int(routing_id) if has_expert else None,
          reason=self._reason(piece, word_id, has_expert),
        )
        rows.append(row)
    return rows

  def _reason(self, piece: int, word_id: int, has_expert: bool) -> str:
    if word_id == self.num_words:
      return 'special'
    if piece == base_vocabulary.UNK_ID:
      reason = 'unknown piece'
    elif self.piece_kinds[piece] == base_vocabulary.ALONE:
      reason = 'punctuation or symbol'
    elif self.is_piece[word_id]:
      reason = 'backed off to the piece'
    else:
      reason = 'whole word'
    if not has_expert:
      reason += f', one of the {self.num_skipped} most frequent: skipped'
    return reason

  def save(self, path: str | os.PathLike) -> None:
    """Writes an .npz file without pickles, which appears only when complete."""
    header = {
      'format': _FORMAT,
      'version': _VERSION,
      'sha256': self.sha256,
      **{name: getattr(self, name) for name in _SCALARS},
    }
    header_utf8 = np.frombuffer(json.dumps(header).encode(), np.uint8)
    arrays = {name: getattr(self, name) for name in _ARRAYS}
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, header=header_utf8, **arrays)
    atomic_files.write_atomically(path, content.getbuffer())


def assign_experts(
  counts: np.ndarray, num_experts: int, assign: Assign, num_skipped: int
) -> np.ndarray:
  """Returns the field `experts` of a vocabulary, <int32>[V + 1].

  Args:
    counts: <int64>[V], falling, tokens of each entry.
    num_experts: number of experts.
    assign: the function that maps entries to experts.
    num_skipped: number of the most frequent entries that get no expert.

  Raises:
    ValueError: a number is out of range.
  """
  if num_experts < 1 or not 0 <= num_skipped <= len(counts):
    raise ValueError(
      'num_experts must be at least 1 and num_skipped from 0 to the number of '
      f'entries, {len(counts)}, but they are {num_experts} and {num_skipped}. '
      'Change them, or build a larger vocabulary.'
    )
  skipped = np.arange(len(counts)) < num_skipped
  experts = assign(counts, num_experts, skipped).astype(np.int32)
  return np.append(experts, np.int32(num_experts))


def load(path: str | os.PathLike) -> RoutingVocabulary:
  """Reads a file of `RoutingVocabulary.save` and verifies its digest.

  Raises:
    FileNotFoundError: there is no file at `path`.
    ValueError: the file has another format or version, or it is damaged.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(
      'The routing vocabulary must be a file of RoutingVocabulary.save, but '
      f'there is no file at {path!r}. Give another path, or make one with '
      'build_routing_vocabulary.'
    )
  try:
    with np.load(path, allow_pickle=False) as file:
      header = json.loads(file['header'].tobytes())
      _check_format(header, path)
      arrays = {name: file[name] for name in _ARRAYS}
  except _Refused:
    raise
  # A flipped bit can make the readers of zip and npy raise nearly anything.
  except Exception as error:
    raise ValueError(_unreadable(path, repr(error))) from error
  for name, dtype in _ARRAYS.items():
    if arrays[name].dtype != dtype:
      raise ValueError(_damaged(path, f'{name} is {arrays[name].dtype}'))
  scalars = {name: header.get(name) for name in _SCALARS}
  vocabulary = RoutingVocabulary(**arrays, **scalars)
  if vocabulary.sha256 != header.get('sha256'):
    raise ValueError(
      _damaged(
        path,
        f'its content has sha256 {vocabulary.sha256} and its header says '
        f'{header.get("sha256")}',
      )
    )
  return vocabulary


def num_experts(routing: RoutingVocabulary) -> int:
  """The number of experts that the words of a vocabulary share."""
  return routing.num_experts


def format_explanation(rows: list[ExplainedPiece]) -> str:
  """Returns the rows of `RoutingVocabulary.explain` as a plain-text table."""
  table = [('piece', 'word', 'id', 'count', 'expert', 'how')]
  for row in rows:
    cells: tuple[Any, ...] = (
      row.piece,
      row.word,
      '-' if row.word_id is None else row.word_id,
      row.count,
      '-' if row.expert is None else row.expert,
      row.reason,
    )
    table.append(tuple(str(cell) for cell in cells))
  widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  lines = []
  for row in table:
    cells = [
      # Columns of numbers are aligned to the right.
      cell.rjust(width) if 2 <= i <= 4 else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)


class _Refused(ValueError):
  """An error of `load` whose message needs nothing added."""


def _check_format(header: Any, path: str) -> None:
  if not isinstance(header, dict) or header.get('format') != _FORMAT:
    raise _Refused(_unreadable(path, 'its header names another format'))
  if header.get('version') != _VERSION:
    raise _Refused(
      f'The routing vocabulary must be of format version {_VERSION}, but '
      f'{path!r} is of version {header.get("version")}. Read it with the mowe '
      'release that wrote it, or build it again with build_routing_vocabulary.'
    )


def _unreadable(path: str, found: str) -> str:
  return (
    'The routing vocabulary must be a file of RoutingVocabulary.save, but '
    f'{path!r} is damaged or is not one: {found}. Copy the file again, or make '
    'one with build_routing_vocabulary.'
  )


def _damaged(path: str, found: str) -> str:
  return (
    'The routing vocabulary must be as it was saved, but '
    f'{path!r} is damaged: {found}. Copy the file again, or build it again '
    'with build_routing_vocabulary.'
  )
