"""Reads records from text files and JSON-lines files, plain or gzipped."""

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

_UNITS = ('line', 'paragraph')


def match_files(patterns: str | Sequence[str]) -> list[str]:
  """Returns the files that match paths or globs, sorted, each once.

  Raises:
    ValueError: a pattern matches no file.
  """
  patterns = [patterns] if isinstance(patterns, str) else list(patterns)
  if not patterns:
    raise ValueError(
      'At least one file or pattern must be given, but the list is empty. '
      'Give a path such as corpus/*.jsonl.gz.'
    )
  paths = set()
  for pattern in map(os.fspath, patterns):
    # A name that exists is taken as it is, because it may contain a bracket.
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
    found = [path for path in found if os.path.isfile(path)]
    if not found:
      raise ValueError(
        f'Every pattern must match a file, but {pattern!r} matches none '
        f'(looked from {os.getcwd()}). Check the path and its quoting.'
      )
    paths.update(found)
  return sorted(paths)


def describe_sources(patterns: str | Sequence[str]) -> list[dict[str, Any]]:
  """Returns name, bytes and sha256 of each file, for a cache's fingerprint."""
  sources = []
  for path in match_files(patterns):
    with open(path, 'rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
    sources.append(
      {
        'name': os.path.basename(path),
        'bytes': os.path.getsize(path),
        'sha256': digest,
      }
    )
  return sources


def read_records(
  patterns: str | Sequence[str],
  fields: Sequence[str] = ('text',),
  unit: str = 'line',
) -> Iterator[dict[str, Any]]:
  """Yields one dict per record, file after file in the order of their names.

  A file that ends in `.jsonl` or `.json`, or in one of these and `.gz`, has one
  JSON object per line. All other files are text, gzipped if they end in `.gz`,
  and give records {'text': ...}. Blank lines are skipped.

  Args:
    patterns: paths or globs of the files.
    fields: names of the fields that every record must have.
    unit: what is one record of a text file: 'line', or 'paragraph', the lines
      up to a blank line, joined by spaces.

  Raises:
    ValueError: no file matches, a file holds no record, or a line is damaged.
      The message has the file's name and the number of the line.
  """
  if unit not in _UNITS:
    raise ValueError(
      f'unit must be one of {_UNITS}, but is {unit!r}. Choose one of them.'
    )
  # This function is no generator, so that a missing file is reported by the
  # call itself.
  return _records_of(match_files(patterns), tuple(fields), unit)


def read_lines(path: str) -> Iterator[str]:
  """Yields the lines of a text file, also blank ones, without line breaks.

  Raises:
    ValueError: the file is not UTF-8, or not a whole gzip file.
  """
  return (line for _, line in _read_lines(path, stripped='\r\n'))


def _records_of(
  paths: list[str], fields: tuple[str, ...], unit: str
) -> Iterator[dict[str, Any]]:
  for path in paths:
    name = path.removesuffix('.gz')
    is_json = name.endswith(('.jsonl', '.json'))
    lines = _read_lines(path)
    if is_json:
      records = (_parse_object(path, *line) for line in lines)
    elif unit == 'paragraph':
      records = _join_paragraphs(lines)
    else:
      records = ((number, {'text': line}) for number, line in lines if line)
    count = 0
    for number, record in (item for item in records if item is not None):
      for field in fields:
        if field not in record:
          raise ValueError(
            f'Every record must have the field {field!r}, but {path}, line '
            f'{number}, has only {sorted(record)}. Add the field, or name '
            'the field that holds it.'
          )
      count += 1
      yield record
    if not count:
      raise ValueError(
        f'A file must hold at least one record, but {path} is empty or '
        'blank. Remove it from the list, or write it again.'
      )


def _read_lines(
  path: str, stripped: str | None = None
) -> Iterator[tuple[int, str]]:
  """Yields line numbers, from 1 on, and stripped lines."""
  number = 0
  opener = gzip.open if path.endswith('.gz') else open
  try:
    with opener(path, 'rb') as file:
      for number, line in enumerate(file, start=1):
        encoding = 'utf-8-sig' if number == 1 else 'utf-8'
        yield number, line.decode(encoding).strip(stripped)
  except UnicodeDecodeError as error:
    raise ValueError(
      f'Text must be UTF-8, but {path}, line {number}, is not: {error}. '
      'Convert the file, for example with iconv.'
    ) from error
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(
      f'A .gz file must be a whole gzip file, but {path} breaks off after '
      f'line {number}: {error}. Copy or download it again.'
    ) from error


def _parse_object(
  path: str, number: int, line: str
) -> tuple[int, dict[str, Any]] | None:
  if not line:
    return None
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'Every line must be one JSON object, but {path}, line {number}, is '
      f'not JSON: {error}. Write one object per line, without line breaks.'
    ) from error
  if not isinstance(record, dict):
    raise ValueError(
      f'Every line must be one JSON object, but {path}, line {number}, is a '
      f'{type(record).__name__}. Write {{"text": ...}} on each line.'
    )
  return number, record


def _join_paragraphs(
  lines: Iterator[tuple[int, str]],
) -> Iterator[tuple[int, dict[str, Any]]]:
  first, parts = 0, []
  for number, line in lines:
    if line:
      first = first if parts else number
      parts.append(line)
    elif parts:
      yield first, {'text': ' '.join(parts)}
      parts = []
  if parts:
    yield first, {'text': ' '.join(parts)}
