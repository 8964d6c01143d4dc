"""Builds token caches of running text, for language models.

All text is kept, blank lines too. Words and bytes are counted before the text
is cut into tokens, because perplexity per word and bits per byte need these
counts.
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mowe.data.caches import cache_builders, token_cache
from mowe.data.text import bad_records, file_formats, record_fields, text_files
from mowe.words import base_vocabulary, byte_vocabulary

KIND = 'language_model'

# What is one text of a file: a line or a record, which an EOS follows, or the
# whole file as it is.
UNITS = ('line', 'file')

_BLOCK = 1 << 16  # Number of bytes of a file that are read at once.


def cache_texts(
  files: Sequence[str],
  path: str | os.PathLike,
  subwords: base_vocabulary.Vocabulary,
  *,
  field: str = 'text',
  unit: str = 'line',
  sources: Sequence[Mapping[str, Any]] | None = None,
  bad: bad_records.BadRecords | None = None,
  overwrite: bool = False,
  num_workers: int = 1,
  progress: cache_builders.Progress | None = None,
) -> token_cache.TokenCache:
  """Caches running text as 'targets'.

  With unit 'line', a text is a line of a text file (as in WikiText) or a record
  of JSON lines. An EOS follows each text. It stands for the line break: it is
  predicted, and it counts as a word and as a byte. With unit 'file' the bytes
  of all files follow each other, with no EOS (as in enwik8).

  Args:
    files: paths or globs of the files to read.
    path: the folder to write.
    subwords: the vocabulary; it must be a ByteVocabulary for unit 'file'.
    field: name of the field of JSON records that holds the text.
    unit: what is one text, 'line' or 'file'.
    sources: what the fingerprint says of the files, as from
      `text_files.describe_sources`; None describes them here.
    bad: takes the errors of texts that cannot be read; None raises the first.
    overwrite: replaces a cache at `path` that was made from other things.
    num_workers: number of processes that tokenise.
    progress: called with the number of records done so far; None reports
      nothing.

  Returns:
    The cache, opened. An existing cache is opened if it was made from the same
    things. Its `totals` are 'texts', 'words' (between white space) and 'bytes'.

  Raises:
    ValueError: the unit is unknown or does not fit the vocabulary, or another
      cache is at `path`.
  """
  _check_unit(unit, subwords)
  if sources is None:
    sources = text_files.describe_sources(files)
  recipe = {
    'format_version': token_cache.FORMAT_VERSION,
    'kind': KIND,
    'vocabulary': token_cache.describe_vocabulary(subwords),
    'sources': [{**source, 'unit': unit} for source in sources],
    'fields': [field],
  }
  if unit == 'file':
    records, encode = _blocks(files, sources), encode_blocks
  else:
    records = _texts(files, sources, field, bad)
    encode = functools.partial(encode_texts, subwords=subwords)
  return cache_builders.build(
    path, recipe, records, encode, overwrite, num_workers, progress
  )


def _check_unit(unit: str, subwords: base_vocabulary.Vocabulary) -> None:
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


def encode_texts(
  records: Sequence[Mapping[str, str]],
  subwords: base_vocabulary.Vocabulary,
) -> cache_builders.EncodedExamples:
  """Tokenises texts, appends an EOS to each, and counts words and bytes."""
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
  """Turns bytes into ids of a ByteVocabulary, and counts them."""
  blocks = [record['bytes'] for record in records]
  flat = np.frombuffer(b''.join(blocks), np.uint8).astype(np.int32)
  lengths = np.array([len(block) for block in blocks], np.int64)
  targets = flat + base_vocabulary.BYTE_OFFSET, lengths
  totals = {'bytes': int(lengths.sum())}
  return cache_builders.EncodedExamples(
    {'targets': targets}, [{}] * len(blocks), totals
  )


def _texts(
  files: Sequence[str],
  sources: Sequence[Mapping[str, Any]],
  field: str,
  bad: bad_records.BadRecords | None,
) -> Iterator[dict[str, str]]:
  paths = text_files.match_files(files)
  digests = text_files.digests_of(paths, sources)
  for path, source in zip(paths, sources, strict=True):
    if file_formats.has_records(path):
      fields = record_fields.all_texts([field])
      for record in text_files.read_records(
        path, fields, sources=[source], bad=bad
      ):
        yield {'text': record[field]}
    else:
      lines = text_files.read_lines(path, sha256=digests[path], bad=bad)
      yield from ({'text': line} for line in lines)


def _blocks(
  files: Sequence[str], sources: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, bytes]]:
  paths = text_files.match_files(files)
  for path, sha256 in text_files.digests_of(paths, sources).items():
    num_lines = 0
    try:
      with file_formats.open_bytes(path, sha256) as file:
        while block := file.read(_BLOCK):
          yield {'bytes': block}
          num_lines += block.count(b'\n')
    except file_formats.DAMAGED as error:
      raise file_formats.broken_off(path, num_lines, error) from None
