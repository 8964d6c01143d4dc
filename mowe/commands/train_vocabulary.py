"""Trains a SentencePiece vocabulary on the text that a model will see."""

import itertools
import os
from collections.abc import Sequence

from mowe.data import text_files
from mowe.words import subwords


def train_vocabulary(
  output: str | os.PathLike,
  files: Sequence[str],
  *,
  size: int,
  field: str = 'text',
  questions: Sequence[str] = (),
) -> subwords.SentencePieceVocabulary:
  """Trains on texts, and on questions if they are given.

  Args:
    output: the .model file to write.
    files: paths or globs of texts (.txt, .jsonl, .gz).
    size: pieces, padding, EOS and unknown; sentinels come on top.
    field: of a JSON line, that holds the text.
    questions: paths or globs of .jsonl with `question`: a question mark, say,
      is an unknown piece to a vocabulary of an encyclopedia alone.

  Raises:
    ValueError: as `text_files.read_records` and `train_sentencepiece`.
  """
  texts = (one[field] for one in text_files.read_records(files, (field,)))
  if questions:
    records = text_files.read_records(questions, ('question',))
    texts = itertools.chain(texts, (one['question'] for one in records))
  return subwords.train_sentencepiece(texts, output, size)
