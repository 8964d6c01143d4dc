"""Token caches of running text, for language models and their evaluation.

All text is kept, blank lines too, and counted as it was before it was cut into
tokens: perplexity per word and bits per byte need these counts.
"""

import functools
import gzip
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mowe.data.caches import cache_builders, token_cache
from mowe.data.text import text_files
from mowe.words import base_vocabulary, byte_vocabulary

KIND = 'language_model'

# What is one text of a file: a record or line with an EOS after it, or the
# whole file as it is.
UNITS = ('line', 'file')

_BLOCK = 1 << 16  # Bytes of a file that are read at once.


def cache_texts(
  files: Sequence[str],
  path: str | os.PathLike,
  subwords: base_vocabulary.Vocabulary,
  *,
  field: str = 'text',
  unit: str = 'line',
  overwrite: bool = False,
  num_workers: int = 1,
  progress: cache_builders.Progress | None = None,
) -> token_cache.TokenCache:
  """Caches running text as 'targets'.

  With unit 'line', a text is a line of a text file (WikiText) or a record of
  JSON lines, and an EOS follows each: it stands for the line break, is
  predicted, and counts as a word and as a byte. With unit 'file' the bytes of
  all files follow each other, with no EOS (enwik8).

  Args:
    files: paths or globs.
    path: the folder to write.
    subwords: the vocabulary; a ByteVocabulary for unit 'file'.
    field: of JSON records, holds the text.
    unit: 'line' or 'file'.
    overwrite, num_workers, progress: as in `cache_builders.cache_text`.

  Returns:
    The cache, opened; an existing one if it was made from the same things. Its
    `totals` are 'texts', 'words' (between white space) and 'bytes'.

  Raises:
    ValueError: an unknown unit or one that does not fit the vocabulary, or
      another cache is at `path`.
  """
  if unit not in UNITS:
    raise ValueError(
      f'unit must be one of {UNITS} for running text, but is {unit!r}. Choose '
      'one of these.'
    )
  is_bytes = isinstance(subwords, byte_vocabulary.ByteVocabulary)
  if unit == 'file' and not is_bytes:
    raise ValueError(
      'Whole files are cut into bytes, but the vocabulary is no byte '
      f'vocabulary: it is {type(subwords).__name__}. Use --vocabulary bytes, '
      "or unit 'line'."
    )
  sources = text_files.describe_sources(files)
  recipe = {
    'format_version': token_cache.FORMAT_VERSION,
    'kind': KIND,
    'vocabulary': token_cache.describe_vocabulary(subwords),
    'sources': [{**source, 'unit': unit} for source in sources],
    'fields': [field],
  }
  if unit == 'file':
    records, encode = _blocks(files), encode_blocks
  else:
    records = _texts(files, field)
    encode = functools.partial(encode_texts, subwords=subwords)
  return cache_builders.build(
    path, recipe, records, encode, overwrite, num_workers, progress
  )


def encode_texts(
  records: Sequence[Mapping[str, str]],
  subwords: base_vocabulary.Vocabulary,
) -> cache_builders.EncodedExamples:
  """Tokenises texts, an EOS after each, and counts words and bytes."""
  texts = [record['text'] for record in records]
  ids = subwords.encode_batch(texts)
  targets = [[*of_text, subwords.eos_id] for of_text in ids]
  totals = {
    'texts': len(texts),
    'words': sum(len(text.split()) + 1 for text in texts),
    'bytes': sum(len(text.encode('utf-8', 'replace')) + 1 for text in texts),
  }
  return cache_builders.EncodedExamples(
    {'targets': cache_builders.flatten(targets)}, [{}] * len(texts), totals
  )


def encode_blocks(
  records: Sequence[Mapping[str, bytes]],
) -> cache_builders.EncodedExamples:
  """Bytes as the ids of a ByteVocabulary, and how many."""
  blocks = [record['bytes'] for record in records]
  flat = np.frombuffer(b''.join(blocks), np.uint8).astype(np.int32)
  lengths = np.array([len(block) for block in blocks], np.int64)
  targets = flat + base_vocabulary.BYTE_OFFSET, lengths
  totals = {'bytes': int(lengths.sum())}
  return cache_builders.EncodedExamples(
    {'targets': targets}, [{}] * len(blocks), totals
  )


def _texts(files: Sequence[str], field: str) -> Iterator[dict[str, str]]:
  for path in text_files.match_files(files):
    if path.removesuffix('.gz').endswith(('.jsonl', '.json')):
      for record in text_files.read_records(path, fields=(field,)):
        yield {'text': record[field]}
    else:
      yield from ({'text': line} for line in text_files.read_lines(path))


def _blocks(files: Iterable[str]) -> Iterator[dict[str, bytes]]:
  for path in text_files.match_files(list(files)):
    opener = gzip.open if path.endswith('.gz') else open
    with opener(path, 'rb') as file:
      while block := file.read(_BLOCK):
        yield {'bytes': block}
