"""Loads a vocabulary of SentencePiece pieces, of bytes, or of whole words."""

import os

from mowe.words import (
  base_vocabulary,
  byte_vocabulary,
  sentencepiece_vocabulary,
  word_vocabulary,
)

_GRANULE = 128


def load_subwords(
  path: str | os.PathLike, extra_ids: int | None = None
) -> base_vocabulary.Vocabulary:
  """Returns the vocabulary of a file, or of bytes for 'bytes'.

  A file holds a SentencePiece model, or words (see `word_vocabulary`).

  Args:
    path: the file, or 'bytes'.
    extra_ids: how many sentinels are added as the last ids; None adds 100, but
      none to a SentencePiece model that has sentinels of its own.

  Raises:
    FileNotFoundError: there is no file at `path`.
    ValueError: extra_ids is negative, or the file is no vocabulary.
  """
  if extra_ids is not None and extra_ids < 0:
    raise ValueError(
      f'extra_ids must be 0 or more, but is {extra_ids}. Give the number of '
      'sentinels, 100 in T5.'
    )
  number = base_vocabulary.NUM_SENTINELS if extra_ids is None else extra_ids
  if os.fspath(path) == 'bytes':
    return byte_vocabulary.ByteVocabulary(number)
  if os.path.isfile(path) and word_vocabulary.is_word_vocabulary(path):
    return word_vocabulary.WordVocabulary(path, number)
  return sentencepiece_vocabulary.SentencePieceVocabulary(path, extra_ids)


def embedding_rows(vocabulary: base_vocabulary.Vocabulary) -> int:
  """The rows of an embedding: its ids, sentinels included, and padding.

  The number is a multiple of 128, as T5's 32,128 for 32,100 ids is: products
  with such a matrix fill the tiles of an accelerator, and it can be split over
  many devices.
  """
  return -(-vocabulary.size // _GRANULE) * _GRANULE
