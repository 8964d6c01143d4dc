"""Makes a vocabulary of the text that a model will see."""

import itertools
import os
from collections.abc import Sequence

from mowe.data.text import text_files
from mowe.words import (
  base_vocabulary,
  sentencepiece_vocabulary,
  word_vocabulary,
)

_NUM_PIECES = 32_000


def train_vocabulary(
  output: str | os.PathLike,
  files: Sequence[str],
  *,
  size: int | None = None,
  field: str = 'text',
  questions: Sequence[str] = (),
  words: bool = False,
) -> base_vocabulary.Vocabulary:
  """Trains SentencePiece on texts, and on questions if they are given.

  Args:
    output: the file to write.
    files: paths or globs of texts (.txt, .jsonl, .gz).
    size: pieces, padding, EOS and unknown; sentinels come on top. None: 32,000
      pieces, or all words.
    field: the field of a JSON line that holds the text.
    questions: paths or globs of .jsonl with `question`: a question mark, say,
      is an unknown piece to a vocabulary of an encyclopedia alone.
    words: whole words between white space instead of pieces.

  Raises:
    ValueError: as `text_files.read_records` and `train_sentencepiece`.
  """
  texts = (one[field] for one in text_files.read_records(files, (field,)))
  if questions:
    records = text_files.read_records(questions, ('question',))
    texts = itertools.chain(texts, (one['question'] for one in records))
  if words:
    return word_vocabulary.build_word_vocabulary(texts, output, size)
  return sentencepiece_vocabulary.train_sentencepiece(
    texts, output, size or _NUM_PIECES
  )
