"""Pieces that differ in case, accents or spaces alone share one id.

Source: the demo of Engram, arXiv 2601.07372, which compresses a vocabulary of
129,280 pieces to 99,092 ids before it hashes n-grams.
"""

import re
import unicodedata
from collections.abc import Sequence

from mowe.words import base_vocabulary

_SPACES = re.compile(r'[ \t\r\n]+')
# A private-use character. It protects a text that is one space from being
# stripped.
_LONE_SPACE = '\ue000'
_REPLACEMENT = '\ufffd'


def compressed_ids(
  pieces: Sequence[str], texts: Sequence[str]
) -> tuple[int, ...]:
  """Returns the new id of each piece, numbered in order of first appearance.

  Args:
    pieces: the pieces as the vocabulary writes them.
    texts: the text of each piece alone. One with U+FFFD is not valid UTF-8, and
      the piece itself is its key.
  """
  new_ids: dict[str, int] = {}
  return tuple(
    new_ids.setdefault(_key(piece, text), len(new_ids))
    for piece, text in zip(pieces, texts, strict=True)
  )


def of_vocabulary(vocabulary: base_vocabulary.Vocabulary) -> tuple[int, ...]:
  """Returns the new id of each id of a subword vocabulary, [size].

  Padding, the end of a sequence, the unknown piece and sentinels keep ids of
  their own.
  """
  pieces = [vocabulary.piece(i) for i in range(vocabulary.size)]
  is_special = vocabulary.piece_kinds() == base_vocabulary.SPECIAL
  is_special[base_vocabulary.UNK_ID] = True
  # The text of a mark that begins a word is empty: the mark is its own key.
  texts = [
    piece if is_special[i] else vocabulary.decode([i]) or piece
    for i, piece in enumerate(pieces)
  ]
  return compressed_ids(pieces, texts)


def _key(piece: str, text: str) -> str:
  """The text that pieces with one id have in common."""
  if _REPLACEMENT in text:
    return piece
  normal = unicodedata.normalize('NFD', unicodedata.normalize('NFKC', text))
  normal = ''.join(c for c in normal if unicodedata.category(c)[0] != 'M')
  # Character by character, so that no rule of a word's end applies.
  normal = ''.join(map(str.lower, normal))
  normal = _SPACES.sub(' ', normal)
  if normal == ' ':
    normal = _LONE_SPACE
  normal = normal.strip().replace(_LONE_SPACE, ' ')
  return normal or text
