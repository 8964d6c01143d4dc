"""`mowe train-vocabulary`: makes a subword vocabulary from text files."""

import dataclasses
import itertools
import os
from collections.abc import Sequence

from mowe.data.text import bad_records, record_fields, text_files
from mowe.words import (
  base_vocabulary,
  sentencepiece_vocabulary,
  word_vocabulary,
)

_NUM_PIECES = 32_000


@dataclasses.dataclass(frozen=True)
class Pieces:
  """How SentencePiece finds pieces; see `train_sentencepiece`.

  Attributes:
    model_type: 'unigram' as in T5, or 'bpe'.
    character_coverage: fraction of the characters that get a piece, from 0.98
      to 1.
    byte_fallback: whether other characters are written as bytes, and not as
      unknown.
  """

  model_type: str = 'unigram'
  character_coverage: float = 0.9999
  byte_fallback: bool = False


def train_vocabulary(
  output: str | os.PathLike,
  files: Sequence[str],
  *,
  size: int | None = None,
  at_most: bool = False,
  field: str = 'text',
  questions: Sequence[str] = (),
  words: bool = False,
  pieces: Pieces = Pieces(),
  skip_bad_records: bool = False,
) -> base_vocabulary.Vocabulary:
  """Trains a vocabulary on texts, and on questions if they are given.

  Args:
    output: the file to write.
    files: paths or globs of text files (.txt or .jsonl, also .gz).
    size: number of ids, with padding, EOS and unknown but without sentinels.
      None: 32,000 for pieces, or as many as the text fills; or all words.
    at_most: whether fewer ids are taken if the text does not fill `size`.
    field: the field of .jsonl records that holds the text.
    questions: paths or globs of .jsonl files whose records have `question`.
      They matter because an encyclopedia, for example, may have no question
      marks, which would then be unknown.
    words: whether to take whole words between white space instead of pieces of
      SentencePiece.
    pieces: how pieces are found; not read for words.
    skip_bad_records: whether records that cannot be read are left out; it is then
      printed how many they were.

  Returns:
    The vocabulary that was saved.

  Raises:
    ValueError: a file cannot be read (see `text_files.read_records`), or the
      text is too small for `size` (see `train_sentencepiece`).
  """
  bad = bad_records.BadRecords(skip_bad_records)
  records = text_files.read_records(
    files, record_fields.all_texts([field]), bad=bad
  )
  texts = (one[field] for one in records)
  if questions:
    fields = record_fields.all_texts(['question'])
    records = text_files.read_records(questions, fields, bad=bad)
    texts = itertools.chain(texts, (one['question'] for one in records))
  if words:
    vocabulary = word_vocabulary.build_word_vocabulary(texts, output, size)
  else:
    vocabulary = sentencepiece_vocabulary.train_sentencepiece(
      texts,
      output,
      size or _NUM_PIECES,
      is_exact=size is not None and not at_most,
      **dataclasses.asdict(pieces),
    )
  bad.say()
  return vocabulary
