"""Loads a vocabulary of SentencePiece pieces, of bytes, or of whole words."""

import os

from mowe.words import (
  base_vocabulary,
  byte_vocabulary,
  sentencepiece_vocabulary,
  word_vocabulary,
)


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
