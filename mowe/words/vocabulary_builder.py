"""Builds a routing vocabulary from texts.

The builder counts the chunks of text between white space, encodes each
distinct chunk once, cuts it into words by the rule of `lookup`, and keeps the
most frequent words. The result does not depend on the number of processes.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mowe.words import base_vocabulary, lookup, routing_vocabulary

# Called to report progress: with the name of the phase, and how many texts,
# chunks or words of it are done.
Progress = Callable[[str, int], None]

_MAX_SPELLINGS = 8
_TEXTS_PER_BLOCK = 2000
_CHUNKS_PER_BLOCK = 20_000
# Of the first texts, so many characters are encoded whole. The share of tokens
# in known words must be this part of what it is word by word.
_SAMPLE_CHARACTERS = 200_000
_LEAST_PART = 0.9


@dataclasses.dataclass(frozen=True)
class BuildReport:
  """What a build of a routing vocabulary saw and left out.

  Attributes:
    num_texts: number of texts that were read.
    num_chunks: number of distinct chunks between white space that were kept.
    num_pruned_chunks: number of rare chunks that were forgotten to bound the
      memory. A chunk that is forgotten, met again and forgotten again counts
      twice.
    num_pruned_occurrences: how often the forgotten chunks had occurred; these
      occurrences are missing in all counts.
    num_distinct_words: number of distinct words that were found, lower-cased.
    num_kept_words: number of words that became entries.
    known_share: fraction of the counted tokens that lie in a kept word. All
      other tokens, punctuation included, back off to their pieces.
    num_collisions: number of pairs of words with a spelling of equal hash; the
      more frequent word kept the key.
  """

  num_texts: int
  num_chunks: int
  num_pruned_chunks: int
  num_pruned_occurrences: int
  num_distinct_words: int
  num_kept_words: int
  known_share: float
  num_collisions: int


@dataclasses.dataclass(frozen=True)
class ChunkCounts:
  """Occurrences of the chunks between white space, and what was forgotten.

  Attributes:
    counts: how often each kept chunk occurred.
    num_texts: number of texts that were read.
    num_pruned_chunks: as in BuildReport.
    num_pruned_occurrences: as in BuildReport.
  """

  counts: dict[str, int]
  num_texts: int
  num_pruned_chunks: int
  num_pruned_occurrences: int


@dataclasses.dataclass(frozen=True)
class _Sequences:
  """The distinct piece sequences of words.

  Attributes:
    pieces: <int32>[pieces], all sequences one after the other.
    offsets: <int64>[n + 1], where each sequence begins in `pieces`.
    counts: <int64>[n], how often each sequence occurred.
    texts: the n sequences as lower-cased words.
  """

  pieces: np.ndarray
  offsets: np.ndarray
  counts: np.ndarray
  texts: list[str]

  def __getitem__(self, i: int) -> bytes:
    return self.pieces[self.offsets[i] : self.offsets[i + 1]].tobytes()


def build_routing_vocabulary(
  texts: Iterable[str] | Iterable[list[str]],
  vocabulary: base_vocabulary.Vocabulary,
  *,
  num_words: int,
  num_experts: int,
  names: Iterable[str] | None = None,
  assign: routing_vocabulary.Assign = routing_vocabulary.assign_by_hash,
  num_skipped: int = 16,
  num_workers: int = 0,
  max_chunks: int = 20_000_000,
  progress: Progress | None = None,
) -> tuple[routing_vocabulary.RoutingVocabulary, BuildReport]:
  """Counts the words of texts and returns their routing vocabulary.

  Args:
    texts: single texts, or lists of texts; a list goes to a worker as it is.
    vocabulary: the subword vocabulary of the model.
    num_words: how many words to keep, the most frequent ones. Every piece has
      an entry of its own besides.
    num_experts: number of experts.
    names: names whose words alone are kept, as the paper does with Wikidata;
      None keeps all words.
    assign: the function that maps entries to experts.
    num_skipped: how many of the most frequent entries get no expert.
    num_workers: number of processes that count and encode; 0 works in this
      process. Processes are spawned, so a script needs
      `if __name__ == '__main__'`.
    max_chunks: number of distinct chunks that are held in memory; beyond it
      the rare ones are forgotten.
    progress: called with the name of the phase and how much of it is done;
      None reports nothing.

  Returns:
    The routing vocabulary, and the report on its build.

  Raises:
    ValueError: the texts hold no word, a number is out of range, or the
      vocabulary writes words in a text differently than alone.
  """
  progress = progress or _no_progress
  _check_numbers(num_words, max_chunks)
  sample: list[str] = []
  with _Workers(vocabulary, num_workers) as run:
    chunks = _count_chunks(_sampled(texts, sample), run, max_chunks, progress)
    sequences = _cut_chunks(chunks.counts, vocabulary, run, progress)
    allowed = None
    if names is not None:
      named = collections.Counter(part for n in names for part in n.split())
      allowed = frozenset(_cut_chunks(named, vocabulary, run, progress).texts)
  _check_words(sequences)
  progress('select', 0)
  words, num_distinct = _select(sequences, vocabulary, num_words, allowed)
  spellings = _spellings(words, sequences, vocabulary)
  keys, key_words, collisions = _keys(spellings, vocabulary)
  _check_running_text(sample, keys, vocabulary)
  entries = _number_entries(
    words, keys, key_words, collisions, sequences, vocabulary
  )
  experts = routing_vocabulary.assign_experts(
    entries['counts'], num_experts, assign, num_skipped
  )
  built = routing_vocabulary.RoutingVocabulary(
    **entries,
    keys=keys,
    piece_kinds=vocabulary.piece_kinds(),
    experts=experts,
    num_experts=num_experts,
    num_skipped=num_skipped,
    subwords_sha256=vocabulary.sha256,
    subwords_size=vocabulary.size,
  )
  progress('done', built.num_words)
  return built, _report(
    built, chunks, num_distinct=num_distinct, num_kept=len(words)
  )


def _check_numbers(num_words: int, max_chunks: int) -> None:
  if num_words < 0 or max_chunks < 2:
    raise ValueError(
      'num_words must be at least 0 and max_chunks at least 2, but they are '
      f'{num_words} and {max_chunks}. Change them.'
    )


def _check_words(sequences: _Sequences) -> None:
  if not sequences.texts:
    raise ValueError(
      'The texts must hold at least one word, but all were empty. Check the '
      'files and the field that is read from them.'
    )


def _sampled(
  texts: Iterable[str] | Iterable[list[str]], sample: list[str]
) -> Iterator[str] | Iterator[list[str]]:
  """Passes texts on, and puts the first of them into a list."""
  num_characters = 0
  for item in texts:
    if not isinstance(item, str):
      item = list(item)
    for text in [item] if isinstance(item, str) else item:
      if num_characters < _SAMPLE_CHARACTERS:
        sample.append(text[:_SAMPLE_CHARACTERS])
        num_characters += len(text)
    yield item


def _check_running_text(
  sample: list[str], keys: np.ndarray, vocabulary: base_vocabulary.Vocabulary
) -> None:
  """Raises ValueError if words are not found where they stand in texts."""
  chunks = [chunk for text in sample for chunk in text.split()]
  counted = _known_share(
    vocabulary.encode_after_space(chunks), keys, vocabulary
  )
  # Other white space than spaces may have pieces of its own, so that the first
  # words of lines are unknown. This is no reason to refuse a vocabulary.
  whole = [' '.join(text.split()) for text in sample]
  found = _known_share(vocabulary.encode_batch(whole), keys, vocabulary)
  if found < _LEAST_PART * counted:
    raise ValueError(
      'A subword vocabulary must write a word in a text as it writes it alone, '
      f'but {found:.0%} of the tokens in the first texts lie in a known word, '
      f'and {counted:.0%} if words are encoded one by one. Take a vocabulary '
      'whose pieces begin with the mark of a space and do not go beyond a word '
      '(in SentencePiece: treat_whitespace_as_suffix=False, '
      'split_by_whitespace=True).'
    )


def _known_share(
  encoded: list[list[int]],
  keys: np.ndarray,
  vocabulary: base_vocabulary.Vocabulary,
) -> float:
  """The fraction of the tokens of words that lie in a word with a key.

  Pieces that are no part of a word are left out, such as spaces among bytes.
  """
  kinds = vocabulary.piece_kinds()
  words = [
    word
    for word, _ in cut_words(encoded, kinds)
    if kinds[np.frombuffer(word, np.int32, 1)[0]] < base_vocabulary.ALONE
  ]
  if not words:
    return 0.0
  lengths = np.array([len(word) // 4 for word in words], np.int64)
  hashes = lookup.hash_words(
    lookup.hash_pieces(vocabulary.size),
    np.frombuffer(b''.join(words), np.int32),
    np.concatenate([[0], np.cumsum(lengths)]),
  )
  is_known = np.isin(hashes, keys)
  return float(lengths[is_known].sum() / lengths.sum())


def _report(
  built: routing_vocabulary.RoutingVocabulary,
  chunks: ChunkCounts,
  *,
  num_distinct: int,
  num_kept: int,
) -> BuildReport:
  known = int(built.counts[~built.is_piece].sum())
  return BuildReport(
    num_texts=chunks.num_texts,
    num_chunks=len(chunks.counts),
    num_pruned_chunks=chunks.num_pruned_chunks,
    num_pruned_occurrences=chunks.num_pruned_occurrences,
    num_distinct_words=num_distinct,
    num_kept_words=num_kept,
    known_share=known / max(1, int(built.counts.sum())),
    num_collisions=len(built.collisions),
  )


# Functions that count chunks.


def _count_chunks(
  texts: Iterable[str] | Iterable[list[str]],
  run: Callable,
  max_chunks: int,
  progress: Progress,
) -> ChunkCounts:
  """Counts the chunks of texts; blocks are merged in the order of the texts."""
  counts: dict[str, int] = {}
  num_texts = num_pruned = occurrences = 0
  for block, size in run(_count_block, _blocks(texts)):
    num_texts += size
    for chunk, count in block.items():
      counts[chunk] = counts.get(chunk, 0) + count
    threshold = 0
    # Prune to half of the limit, because the next block would otherwise prune
    # again.
    target = max_chunks // 2 if len(counts) > max_chunks else max_chunks
    while len(counts) > target:
      threshold += 1
      rare = [chunk for chunk, count in counts.items() if count <= threshold]
      num_pruned += len(rare)
      occurrences += sum(counts.pop(chunk) for chunk in rare)
    progress('count', num_texts)
  return ChunkCounts(counts, num_texts, num_pruned, occurrences)


def _count_block(texts: list[str]) -> tuple[dict[str, int], int]:
  counts = collections.Counter()
  for text in texts:
    counts.update(text.split())
  return dict(counts), len(texts)


def _blocks(texts: Iterable[str] | Iterable[list[str]]) -> Iterator[list[str]]:
  block: list[str] = []
  for item in texts:
    if not isinstance(item, str):
      yield list(item)
      continue
    block.append(item)
    if len(block) == _TEXTS_PER_BLOCK:
      yield block
      block = []
  if block:
    yield block


# Functions that cut chunks into words.


def _cut_chunks(
  counts: dict[str, int],
  vocabulary: base_vocabulary.Vocabulary,
  run: Callable,
  progress: Progress,
) -> _Sequences:
  """Returns the distinct piece sequences of the words in the chunks."""
  # Sorted, because the order of the dict depends on how texts came in lists.
  items = sorted(counts.items())
  blocks = (
    items[i : i + _CHUNKS_PER_BLOCK]
    for i in range(0, len(items), _CHUNKS_PER_BLOCK)
  )
  merged: dict[bytes, int] = {}
  done = 0
  for block, size in run(_cut_block, blocks):
    for sequence, count in block.items():
      merged[sequence] = merged.get(sequence, 0) + count
    done += size
    progress('encode', done)
  ordered = sorted(merged)
  lengths = np.array([len(sequence) // 4 for sequence in ordered], np.int64)
  pieces = np.frombuffer(b''.join(ordered), np.int32)
  texts = [
    vocabulary.spell(np.frombuffer(sequence, np.int32).tolist()).lower()
    for sequence in ordered
  ]
  return _Sequences(
    pieces=pieces,
    offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    counts=np.array([merged[sequence] for sequence in ordered], np.int64),
    texts=texts,
  )


def _cut_block(
  block: list[tuple[str, int]],
) -> tuple[dict[bytes, int], int]:
  vocabulary, kinds = _worker_vocabulary()
  encoded = vocabulary.encode_after_space([chunk for chunk, _ in block])
  merged: dict[bytes, int] = {}
  for sequence, row in cut_words(encoded, kinds):
    merged[sequence] = merged.get(sequence, 0) + block[row][1]
  return merged, len(block)


def cut_words(
  encoded: list[list[int]], kinds: np.ndarray
) -> Iterator[tuple[bytes, int]]:
  """Yields each word's pieces, as the bytes of int32 ids, and its row.

  The rule is that of `lookup.word_starts`, for rows of any length.

  Args:
    encoded: rows of piece ids.
    kinds: <uint8>[subwords], as from `Vocabulary.piece_kinds`.
  """
  lengths = np.array([len(row) for row in encoded], np.int64)
  pieces = np.array([i for row in encoded for i in row], np.int32)
  if not len(pieces):
    return
  of_piece = kinds[pieces]
  goes_on = np.zeros(len(pieces), bool)
  goes_on[1:] = (of_piece[1:] == base_vocabulary.CONTINUES) & (
    of_piece[:-1] < base_vocabulary.ALONE
  )
  ends = np.cumsum(lengths)
  row_starts = (ends - lengths)[lengths > 0]
  goes_on[row_starts] = False
  starts = np.flatnonzero(~goes_on)
  rows = np.searchsorted(ends, starts, side='right')
  content = pieces.tobytes()
  bounds = np.append(starts, len(pieces)) * 4
  bounds = bounds.tolist()
  for i, row in enumerate(rows.tolist()):
    yield content[bounds[i] : bounds[i + 1]], row


# Functions that choose words and their spellings.


def _select(
  sequences: _Sequences,
  vocabulary: base_vocabulary.Vocabulary,
  num_words: int,
  allowed: frozenset[str] | None,
) -> tuple[list[str], int]:
  """Returns the most frequent words, and how many distinct words there are.

  Words are ordered by falling count and then by text.
  """
  kinds = vocabulary.piece_kinds()
  # A word of one ALONE piece is left out because the entry of the piece stands
  # for it already. A bare word-start mark is left out because it has no text.
  is_word = (
    kinds[sequences.pieces[sequences.offsets[:-1]]] < base_vocabulary.ALONE
  )
  totals: dict[str, int] = {}
  for i in np.flatnonzero(is_word).tolist():
    text = sequences.texts[i]
    if text:
      totals[text] = totals.get(text, 0) + int(sequences.counts[i])
  kept = [text for text in totals if allowed is None or text in allowed]
  kept.sort(key=lambda text: (-totals[text], text))
  return kept[:num_words], len(totals)


def _spellings(
  words: list[str],
  sequences: _Sequences,
  vocabulary: base_vocabulary.Vocabulary,
) -> list[list[bytes]]:
  """Returns up to 8 piece sequences of each word.

  The usual spellings come first (lower, Capitalised, UPPER, each as after a
  space and as the first word of a text), because a model may meet them even if
  the counted text has none of them. The spellings that were observed follow by falling count: those with
  other capitals, and those after punctuation.
  """
  word_ids = {word: i for i, word in enumerate(words)}
  spellings: list[dict[bytes, None]] = [{} for _ in words]
  variants = [
    (i, variant)
    for i, word in enumerate(words)
    for variant in dict.fromkeys((word, word.capitalize(), word.upper()))
  ]
  kinds = vocabulary.piece_kinds()
  ways = [vocabulary.encode_after_space]
  if vocabulary.encode_batch(['a']) != vocabulary.encode_after_space(['a']):
    ways.append(vocabulary.encode_batch)
  starts = range(0, len(variants), _CHUNKS_PER_BLOCK)
  for begin, encode in itertools.product(starts, ways):
    block = variants[begin : begin + _CHUNKS_PER_BLOCK]
    encoded = encode([variant for _, variant in block])
    for sequence, row in cut_words(encoded, kinds):
      # A variant is no spelling of the word if it was cut in two (it has an
      # unknown letter) or spells another word (the upper case of one letter
      # can be two letters).
      i = block[row][0]
      ids = np.frombuffer(sequence, np.int32).tolist()
      if ids == encoded[row] and vocabulary.spell(ids).lower() == words[i]:
        spellings[i][sequence] = None
  for s in np.argsort(-sequences.counts, kind='stable').tolist():
    i = word_ids.get(sequences.texts[s])
    if i is not None and len(spellings[i]) < _MAX_SPELLINGS:
      spellings[i][sequences[s]] = None
  return [list(of_word) for of_word in spellings]


def _keys(
  spellings: list[list[bytes]], vocabulary: base_vocabulary.Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the keys of words, and the collisions between them.

  Returns:
    keys: <uint32>[num_keys], rising, the hashes of the spellings.
    key_words: <int>[num_keys], the rank of the word of each key.
    collisions: <int>[n, 2], ranks of the word that kept a key and of the word
      that lost it.
  """
  flat = [sequence for of_word in spellings for sequence in of_word]
  words = np.repeat(
    np.arange(len(spellings)), [len(of_word) for of_word in spellings]
  )
  lengths = np.array([len(sequence) // 4 for sequence in flat], np.int64)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  pieces = np.frombuffer(b''.join(flat), np.int32)
  piece_hashes = lookup.hash_pieces(vocabulary.size)
  hashes = lookup.hash_words(piece_hashes, pieces, offsets)
  # Punctuation and specials are words of one piece and keep their own entries,
  # so that a key with the hash of one of them has to go.
  alone = piece_hashes[vocabulary.piece_kinds() >= base_vocabulary.ALONE]
  free = ~np.isin(hashes, alone)
  hashes, words = hashes[free], words[free]
  order = np.lexsort((words, hashes))
  hashes, words = hashes[order], words[order]
  is_first = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
  keepers = words[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
  lost = keepers != words
  collisions = np.stack([keepers[lost], words[lost]], axis=1)
  collisions = np.unique(collisions, axis=0)
  return hashes[is_first], words[is_first], collisions


# Functions that number the entries.


def _number_entries(
  words: list[str],
  keys: np.ndarray,
  key_words: np.ndarray,
  collisions: np.ndarray,
  sequences: _Sequences,
  vocabulary: base_vocabulary.Vocabulary,
) -> dict[str, np.ndarray]:
  """Returns the fields of a RoutingVocabulary that need the entries' order."""
  kinds = vocabulary.piece_kinds()
  pieces = np.flatnonzero(kinds != base_vocabulary.SPECIAL)
  counts = _tokens_of_entries(
    len(words), keys, key_words, sequences, vocabulary.size
  )
  counts = np.concatenate([counts[: len(words)], counts[len(words) + pieces]])
  order = np.argsort(-counts, kind='stable')
  ranks = np.empty(len(counts), np.int32)
  ranks[order] = np.arange(len(counts), dtype=np.int32)
  texts = words + [vocabulary.piece(int(piece)) for piece in pieces]
  blobs = [texts[i].encode() for i in order.tolist()]
  lengths = np.array([len(blob) for blob in blobs], np.int64)
  piece_word_ids = np.full(vocabulary.size, len(counts), np.int32)
  piece_word_ids[pieces] = ranks[len(words) :]
  return {
    'words_utf8': np.frombuffer(b''.join(blobs), np.uint8),
    'word_offsets': np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    'counts': counts[order],
    'is_piece': order >= len(words),
    'key_word_ids': ranks[key_words],
    'piece_word_ids': piece_word_ids,
    'collisions': ranks[collisions].reshape(-1, 2),
  }


def _tokens_of_entries(
  num_words: int,
  keys: np.ndarray,
  key_words: np.ndarray,
  sequences: _Sequences,
  vocab_size: int,
) -> np.ndarray:
  """Returns the tokens that each word and piece receives, <int64>[entries].

  The entries are the words by rank, then all pieces of the vocabulary by id.
  """
  piece_hashes = lookup.hash_pieces(vocab_size)
  hashes = lookup.hash_words(piece_hashes, sequences.pieces, sequences.offsets)
  lengths = np.diff(sequences.offsets)
  entries = num_words + sequences.pieces.astype(np.int64)
  if len(keys):
    position = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
    is_known = keys[position] == hashes
    found = np.repeat(key_words[position], lengths)
    entries = np.where(np.repeat(is_known, lengths), found, entries)
  counts = np.zeros(num_words + vocab_size, np.int64)
  np.add.at(counts, entries, np.repeat(sequences.counts, lengths))
  return counts


# Worker processes.

# The vocabulary of this process, and the kinds of its pieces.
_state: dict[str, tuple[base_vocabulary.Vocabulary, np.ndarray]] = {}


def _worker_vocabulary() -> tuple[base_vocabulary.Vocabulary, np.ndarray]:
  return _state['vocabulary']


def _start_worker(vocabulary: base_vocabulary.Vocabulary) -> None:
  _state['vocabulary'] = (vocabulary, vocabulary.piece_kinds())


class _Workers:
  """A context manager that gives `run`, a map over several processes.

  `run(function, items)` yields the results in the order of the items. At most
  two items for each process are under way, so that reading never runs ahead of
  counting.
  """

  def __init__(self, vocabulary: base_vocabulary.Vocabulary, num_workers: int):
    self._vocabulary = vocabulary
    self._num_workers = num_workers
    self._pool = None

  def __enter__(self) -> Callable:
    if not self._num_workers:
      _start_worker(self._vocabulary)
      return map
    self._pool = concurrent.futures.ProcessPoolExecutor(
      self._num_workers,
      # Not by fork, because the parent may run the threads of JAX.
      mp_context=multiprocessing.get_context('spawn'),
      initializer=_start_worker,
      initargs=(self._vocabulary,),
    )
    return self._run

  def __exit__(self, *unused) -> None:
    _state.clear()
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)

  def _run(self, function: Callable, items: Iterable) -> Iterator:
    pending = collections.deque()
    for item in items:
      pending.append(self._pool.submit(function, item))
      if len(pending) >= 2 * self._num_workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


def _no_progress(phase: str, done: int) -> None:
  del phase, done
