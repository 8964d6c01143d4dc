"""Reads SentencePiece models as vocabularies, and trains them."""

import functools
import hashlib
import io
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from mowe.words import atomic_files, author_symbols, base_vocabulary

_WORD_START = '\u2581'  # The mark that SentencePiece puts where a space was.

# The names of a sentinel that is a piece, as in the files of mT5.
_SENTINEL_NAMES = ('<extra_id_{}>', f'{_WORD_START}<extra_id_{{}}>')

# It stands before a text, so that the text is encoded as after a space.
_BEFORE = 'a'

# The trainer skips lines of more bytes, its max_sentence_length. Longer ones,
# in scripts with several bytes for each character, are cut into parts of some
# hundred characters.
_MOST_BYTES = 4192
_PART_BYTES = 1500

# The errors that releases of sentencepiece raise for lone surrogates in a text.
_NOT_UTF8 = (RuntimeError, TypeError, UnicodeEncodeError)


def _has_letter(text: str) -> bool:
  return any(unicodedata.category(char)[0] in 'LNM' for char in text)


class SentencePieceVocabulary(base_vocabulary.Vocabulary):
  """A SentencePiece model file with T5's sentinels after its pieces.

  If no sentinels are added, pieces that are called like sentinels are the
  sentinels, as in mT5. By default 100 are added to a file without such pieces.
  Symbols behind such sentinels are tokens that somebody added to a tokenizer.
  They cut a text in parts that are encoded one by one, as in transformers.

  Attributes:
    path: the file it was read from.
    size: number of ids, which are the pieces of the file and the sentinels.
    extra_ids: number of sentinels that are added.
    sentinels: see `Vocabulary.sentinels`.
    sha256: hex digest of the file. It does not cover the number of sentinels,
      so compare `size` too.

  Raises:
    FileNotFoundError: there is no file at `path`.
    ValueError: the file is not a SentencePiece model, or its padding, EOS and
      unknown pieces do not have the ids 0, 1, 2.
  """

  def __init__(self, path: str | os.PathLike, extra_ids: int | None = None):
    self.path = os.fspath(path)
    if not os.path.isfile(self.path):
      raise FileNotFoundError(
        'The subword vocabulary must be a SentencePiece model file, but there '
        f"is no file at {self.path!r}. Give the path of a spiece.model, 'bytes'"
        ' for a byte vocabulary, or train one with '
        '`mowe train-vocabulary`.'
      )
    model = pathlib.Path(self.path).read_bytes()
    self.sha256 = hashlib.sha256(model).hexdigest()
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(model)
      num_pieces = self._processor.GetPieceSize()
    except (RuntimeError, ValueError, TypeError):
      num_pieces = 0
    if num_pieces == 0:
      raise ValueError(
        'The subword vocabulary must be a SentencePiece model, but '
        f'{self.path!r} ({len(model):,} bytes, beginning {model[:12]!r}) '
        'cannot be read as one. Copy the file again, or give another path.'
      )
    found = (
      self._processor.pad_id(),
      self._processor.eos_id(),
      self._processor.unk_id(),
    )
    if found != (
      base_vocabulary.PAD_ID,
      base_vocabulary.EOS_ID,
      base_vocabulary.UNK_ID,
    ):
      raise ValueError(
        'The ids of padding, EOS and unknown must be 0, 1 and 2 as in T5, but '
        f'are {found} in {self.path!r} (-1: absent). Train the vocabulary with '
        '`mowe train-vocabulary`, or with pad_id=0, eos_id=1, unk_id=2, '
        'bos_id=-1.'
      )
    self._texts = [self._piece_text(i) for i in range(num_pieces)]
    self._own_sentinels = range(0) if extra_ids else self._find_sentinels()
    if extra_ids is None:
      has_own = bool(self._own_sentinels)
      extra_ids = 0 if has_own else base_vocabulary.NUM_SENTINELS
    self.extra_ids = extra_ids
    self.size = num_pieces + extra_ids
    self._added = self._find_added()

  def __reduce__(self):
    return type(self), (self.path, self.extra_ids)

  @property
  def sentinels(self) -> range:
    """See `Vocabulary.sentinels`."""
    return self._own_sentinels or super().sentinels

  @functools.cached_property
  def _user_defined(self) -> frozenset[int]:
    return author_symbols.find(self._processor.serialized_model_proto())

  def _find_sentinels(self) -> range:
    """The ids of those pieces of the file that are called like sentinels.

    They must be neighbours in their order. Otherwise the file has none.
    """
    for name in _SENTINEL_NAMES:
      ids = []
      while (i := self._processor.PieceToId(name.format(len(ids)))) != (
        base_vocabulary.UNK_ID
      ):
        ids.append(i)
      if not ids:
        continue
      for step in (-1, 1):
        found = range(ids[0], ids[0] + step * len(ids), step)
        if ids == list(found):
          return found
    return range(0)

  def _find_added(self) -> re.Pattern | None:
    """Matches the longest of the tokens that were added; None without any."""
    last = max(self._own_sentinels, default=self.size)
    if last + 1 >= self.size:
      return None
    texts = [self._texts[i] for i in self._user_defined if i > last]
    if not texts:
      return None
    return re.compile(
      f'({"|".join(map(re.escape, sorted(texts, key=len, reverse=True)))})'
    )

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    if self._added is not None:
      return self.encode_with_offsets(text)[0]
    try:
      return self._processor.encode(text)
    except _NOT_UTF8:
      return self._processor.encode(_without_surrogates(text))

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text, without EOS."""
    texts = list(texts)
    if self._added is not None:
      return [self.encode(text) for text in texts]
    try:
      # One thread, because callers that want more use several processes.
      return self._processor.encode(texts, num_threads=1)
    except _NOT_UTF8:
      return [self.encode(text) for text in texts]

  def encode_after_space(self, texts: Sequence[str]) -> list[list[int]]:
    """See `Vocabulary.encode_after_space`."""
    before = self.encode(_BEFORE)
    if self.encode(f'{_BEFORE} {_BEFORE}') == 2 * before:
      # The first word of a text is marked like all others.
      return self.encode_batch(texts)
    encoded = self.encode_batch([f'{_BEFORE} {text}' for text in texts])
    return [ids[len(before) :] for ids in encoded]

  def encode_with_offsets(
    self, text: str
  ) -> tuple[list[int], list[int], list[int]]:
    """Returns the ids of a text and the characters each one stands for.

    Piece i stands for `text[starts[i]:ends[i]]`, in characters of the text as
    given (before SentencePiece's normalisation). The white space in front of a
    word belongs to no piece: a bare word-start mark is empty.
    """
    text = _without_surrogates(text)
    parts = [text] if self._added is None else self._added.split(text)
    ids, starts, ends, place = [], [], [], 0
    for number, part in enumerate(parts):
      # Every second part is a token that was added.
      found = (
        [(self._processor.PieceToId(part), 0, len(part))]
        if number % 2
        else self._pieces_of(part)
      )
      for piece, start, end in found:
        ids.append(piece)
        starts.append(place + start)
        ends.append(place + end)
      place += len(part)
    return ids, starts, ends

  def _pieces_of(self, text: str) -> list[tuple[int, int, int]]:
    """The id, the start and the end of each piece of a text."""
    try:
      found = self._processor.encode(text, out_type='offset_mapping')
      ids, spans = found['ids'], found['offsets']
    except (ValueError, RuntimeError):  # sentencepiece before 0.2.2
      pieces = self._processor.encode(text, out_type='immutable_proto').pieces
      ids = [piece.id for piece in pieces]
      spans = [(piece.begin, piece.end) for piece in pieces]
    pieces = []
    for piece, (start, end) in zip(ids, spans, strict=True):
      while start < end and text[start].isspace():
        start += 1
      pieces.append((piece, start, end))
    return pieces

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text up to EOS, without padding, sentinels by name."""
    parts = [
      run if isinstance(run, str) else self._processor.decode(run)
      for run in self._runs(ids)
      if run
    ]
    return ' '.join(part for part in parts if part)

  def piece(self, i: int) -> str:
    """Returns the written form of one id."""
    if i >= self.size - self.extra_ids:
      return f'<extra_id_{self.size - 1 - i}>'
    return self._processor.IdToPiece(int(i))

  def spell(self, ids: Sequence[int]) -> str:
    """Returns the text of the pieces of one word, without word-start marks."""
    if any(self._processor.IsByte(i) for i in ids):
      return self._processor.decode([int(i) for i in ids])
    return ''.join([self._texts[i] for i in ids])

  def piece_kinds(self) -> np.ndarray:
    """Returns the kind of each id, <uint8>[size].

    A bare word-start mark is STARTS, because T5 writes it before a word whose
    first letter has no piece with a mark; the letters that follow continue it.
    The unknown piece is ALONE, because the text that it stands for is lost, and
    so is a symbol that the file's author defined, such as `<sep>`, unless it is
    written like a word.
    """
    kinds = np.full(self.size, base_vocabulary.SPECIAL, np.uint8)
    for i in range(self.size - self.extra_ids):
      kinds[i] = self._kind(i)
    return kinds

  def _kind(self, i: int) -> int:
    if i == base_vocabulary.UNK_ID:
      return base_vocabulary.ALONE
    if self._processor.IsControl(i) or self._processor.IsUnused(i):
      return base_vocabulary.SPECIAL
    if i in self._own_sentinels:
      return base_vocabulary.SPECIAL
    if self._processor.IsByte(i):
      return base_vocabulary.byte_kind(
        int(self._processor.IdToPiece(i)[1:-1], 16)
      )
    piece = self._processor.IdToPiece(i)
    if piece == _WORD_START:
      return base_vocabulary.STARTS
    if i in self._user_defined and not self._texts[i].isalnum():
      return base_vocabulary.ALONE
    if not _has_letter(piece):
      return base_vocabulary.ALONE
    return (
      base_vocabulary.STARTS
      if piece.startswith(_WORD_START)
      else base_vocabulary.CONTINUES
    )

  def _piece_text(self, i: int) -> str:
    return self._processor.IdToPiece(i).replace(_WORD_START, '')


def train_sentencepiece(
  texts: Iterable[str],
  model_path: str | os.PathLike,
  vocab_size: int,
  *,
  model_type: str = 'unigram',
  character_coverage: float = 0.9999,
  max_lines: int = 2_000_000,
  byte_fallback: bool = False,
  is_exact: bool = True,
) -> SentencePieceVocabulary:
  """Trains a SentencePiece model with T5's ids and normalisation.

  The same texts give the same file.

  Args:
    texts: texts of any length to train on.
    model_path: the file to write; it appears only when it is complete.
    vocab_size: number of ids in the file: pieces, padding, EOS and unknown.
      Sentinels are added when the file is loaded.
    model_type: 'unigram' as in T5, or 'bpe'.
    character_coverage: fraction of the characters that get a piece, from 0.98
      to 1; 0.9995 suits scripts with thousands of characters.
    max_lines: number of lines of text to train on; the rest is not read.
    byte_fallback: encode characters without a piece as bytes, not as unknown.
    is_exact: whether a text that cannot fill vocab_size is refused; if not, it
      gives fewer ids.

  Raises:
    ValueError: there is no text, vocab_size is larger or smaller than what
      the text can fill, or character_coverage is out of its range.
  """
  if not 0.98 <= character_coverage <= 1:
    raise ValueError(
      'character_coverage must be from 0.98 to 1, which are the bounds of '
      f'SentencePiece, but is {character_coverage}. 0.9995 suits scripts with '
      'thousands of characters, and 0.9999 all others.'
    )
  model = io.BytesIO()
  lines = _Kept(_lines(texts, max_lines))
  try:
    sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=iter(lines),
      model_writer=model,
      vocab_size=vocab_size,
      model_type=model_type,
      character_coverage=character_coverage,
      byte_fallback=byte_fallback,
      hard_vocab_limit=is_exact,
      normalization_rule_name='nmt_nfkc',
      pad_id=base_vocabulary.PAD_ID,
      eos_id=base_vocabulary.EOS_ID,
      unk_id=base_vocabulary.UNK_ID,
      bos_id=-1,
      pad_piece='<pad>',
      num_threads=4,  # Fixed, because the sums of floats depend on it.
      minloglevel=3,
    )
  except RuntimeError as error:
    if lines.error is not None:
      raise lines.error from None
    raise ValueError(_training_problem(str(error), vocab_size)) from error
  atomic_files.write_atomically(model_path, model.getvalue())
  return SentencePieceVocabulary(model_path)


def _lines(texts: Iterable[str], max_lines: int) -> Iterator[str]:
  """Yields lines of some thousand bytes; the trainer skips longer ones."""
  num_lines = 0
  for text in texts:
    for paragraph in _without_surrogates(text).splitlines():
      # They are cut between words where a word ends soon.
      for words in re.findall(r'\S.{0,1000}\S{0,1000}', paragraph):
        for line in _cut(words):
          if num_lines == max_lines:
            return
          num_lines += 1
          yield line


def _cut(text: str) -> Iterator[str]:
  """Yields a text, or if it is too long its parts, cut between characters."""
  content = text.encode()
  if len(content) <= _MOST_BYTES:
    yield text
    return
  while content:
    part = content[:_PART_BYTES].decode(errors='ignore')
    yield part
    content = content[len(part.encode()) :]


class _Kept:
  """Passes items on, and keeps the error with which they end.

  The trainer raises another one, which names its own lines of C++.
  """

  def __init__(self, items: Iterable[str]):
    self._items = items
    self.error: Exception | None = None

  def __iter__(self) -> Iterator[str]:
    try:
      yield from self._items
    except Exception as error:
      self.error = error
      raise


def _training_problem(message: str, vocab_size: int) -> str:
  too_high = re.search(r'too high .*<= (\d+)', message)
  too_low = re.search(r'smaller than required_chars\. \d+ vs (\d+)', message)
  if too_high:
    return (
      'vocab_size must not exceed what the text can fill, '
      f'{too_high.group(1)} pieces, but is {vocab_size}. Set vocab_size='
      f'{too_high.group(1)} or less, or give more text.'
    )
  if too_low:
    return (
      'vocab_size must hold every character of the text (and, with '
      'byte_fallback, every byte), at least '
      f'{too_low.group(1)}, but is {vocab_size}. Set vocab_size='
      f'{too_low.group(1)} or more, or a lower character_coverage.'
    )
  if 'sentences_.empty' in message:
    return (
      'The texts must hold at least one line, but all were empty. Check that '
      'the files are not empty and are read as text.'
    )
  return (
    'SentencePiece must be able to train on the texts, but stopped with: '
    f'{message!r}. Check vocab_size ({vocab_size}) and the texts.'
  )


def _without_surrogates(text: str) -> str:
  """Replaces lone surrogates, which JSON can hold but UTF-8 cannot, by '?'."""
  return text.encode('utf-8', 'replace').decode('utf-8')
