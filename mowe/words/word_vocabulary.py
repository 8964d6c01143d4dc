"""A vocabulary of whole words between white space, as WikiText has."""

import collections
import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from mowe.words import atomic_files, base_vocabulary

# The first line of a file; each line after it is one word.
_HEADER = 'mowe words 1'
_FIRST = 3  # The id of the first word, after padding, EOS and unknown.

# WikiText writes this for a word that it leaves out.
UNKNOWN = '<unk>'


class WordVocabulary(base_vocabulary.Vocabulary):
  """Words of a file as ids 3, 4, ..., then T5's sentinels.

  A word that is not in the file is id 2, as is `<unk>` in a text.

  Attributes:
    path: the file it was read from.
    size: number of ids: words, padding, EOS, unknown and sentinels.
    extra_ids: number of sentinels.
    sha256: hex digest of the file.

  Raises:
    FileNotFoundError: there is no file at `path`.
    ValueError: the file was not written by `build_word_vocabulary`.
  """

  def __init__(self, path: str | os.PathLike, extra_ids: int = 100):
    self.path = os.fspath(path)
    self.extra_ids = extra_ids
    content = pathlib.Path(self.path).read_bytes()
    self.sha256 = hashlib.sha256(content).hexdigest()
    header, *self._words = content.decode().splitlines()
    if header != _HEADER:
      raise ValueError(
        f'A word vocabulary must begin with the line {_HEADER!r}, but '
        f'{self.path} begins with {header[:40]!r}. Build it with `mowe '
        'train-vocabulary --words`.'
      )
    self._ids = {word: i for i, word in enumerate(self._words, start=_FIRST)}
    self.size = _FIRST + len(self._words) + extra_ids

  def __reduce__(self):
    return type(self), (self.path, self.extra_ids)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of the words of a text, without EOS."""
    find = self._ids.get
    return [find(word, base_vocabulary.UNK_ID) for word in text.split()]

  def encode_with_offsets(
    self, text: str
  ) -> tuple[list[int], list[int], list[int]]:
    """Returns the ids of a text; id i is the word `text[starts[i]:ends[i]]`."""
    starts, ends, place = [], [], 0
    words = text.split()
    for word in words:
      place = text.index(word, place)
      starts.append(place)
      place += len(word)
      ends.append(place)
    return self.encode(text), starts, ends

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text up to EOS, without padding, sentinels by name."""
    parts = [
      run if isinstance(run, str) else ' '.join(map(self.piece, run))
      for run in self._runs(ids)
      if run
    ]
    return ' '.join(parts)

  def piece(self, i: int) -> str:
    """Returns the written form of one id."""
    i = int(i)
    if i >= self.size - self.extra_ids:
      return f'<extra_id_{self.size - 1 - i}>'
    return ('<pad>', '</s>', UNKNOWN)[i] if i < _FIRST else self._words[i - 3]

  def spell(self, ids: Sequence[int]) -> str:
    """Returns the text of one word."""
    return ''.join(map(self.piece, ids))

  def piece_kinds(self) -> np.ndarray:
    """Returns the kind of each id, <uint8>[size]; all words are STARTS."""
    kinds = np.full(self.size, base_vocabulary.SPECIAL, np.uint8)
    kinds[base_vocabulary.UNK_ID] = base_vocabulary.ALONE
    kinds[_FIRST : self.size - self.extra_ids] = base_vocabulary.STARTS
    return kinds


def is_word_vocabulary(path: str | os.PathLike) -> bool:
  """Returns whether a file was written by `build_word_vocabulary`."""
  with open(path, 'rb') as file:
    return file.read(len(_HEADER) + 1) == f'{_HEADER}\n'.encode()


def build_word_vocabulary(
  texts: Iterable[str],
  path: str | os.PathLike,
  size: int | None = None,
  extra_ids: int = 100,
) -> WordVocabulary:
  """Writes the words of texts to a file, the most frequent first.

  Args:
    texts: texts whose words are separated by white space.
    path: the file to write; it appears only when it is complete.
    size: number of ids in the file: words, padding, EOS and unknown; None keeps
      all words.
    extra_ids: number of sentinels of the vocabulary that is returned.

  Raises:
    ValueError: the texts have no word, or size leaves no room for one.
  """
  counts: collections.Counter[str] = collections.Counter()
  for text in texts:
    counts.update(text.split())
  counts.pop(UNKNOWN, None)
  if not counts or (size is not None and size <= _FIRST):
    raise ValueError(
      'A word vocabulary must have room for words and find some, but there are '
      f'{len(counts)} and size is {size}. Give text, and a size above {_FIRST}.'
    )
  # Equally frequent words are sorted: the same texts give the same file.
  words = sorted(counts, key=lambda word: (-counts[word], word))
  words = words[: None if size is None else size - _FIRST]
  content = '\n'.join([_HEADER, *words]) + '\n'
  atomic_files.write_atomically(path, content.encode())
  return WordVocabulary(path, extra_ids)
