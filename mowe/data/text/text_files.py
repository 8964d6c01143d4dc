"""Reads records from text files and JSON-lines files, plain or packed."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mowe.data.text import file_formats, record_fields

_UNITS = ('line', 'paragraph')


def match_files(patterns: str | Sequence[str]) -> list[str]:
  """Returns the files that match paths or globs, sorted, each once.

  In a glob, `**` stands for folders at any depth.

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
    found = [pattern]
    if not os.path.isfile(pattern):
      found = glob.glob(pattern, recursive=True)
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
  fields: Mapping[str, record_fields.Check] | None = None,
  unit: str = 'line',
) -> Iterator[dict[str, Any]]:
  """Yields one dict per record, file after file in the order of their names.

  Some files have one JSON object per line; see `file_formats.has_json_lines`.
  All others are text, and give records {'text': ...}. Blank lines are skipped.

  Args:
    patterns: paths or globs of the files.
    fields: the fields that every record must have, each with a check of its
      value; None for {'text': record_fields.text}.
    unit: what is one record of a text file: 'line', or 'paragraph', the lines
      up to a blank line, joined by spaces.

  Raises:
    ValueError: no file matches, a file holds no record or is of a format that
      is not read, a line is damaged, or a field holds something else than it
      must. The message has the file's name and the number of the line.
  """
  if unit not in _UNITS:
    raise ValueError(
      f'unit must be one of {_UNITS}, but is {unit!r}. Choose one of them.'
    )
  # This function is no generator, so that a missing file is reported by the
  # call itself.
  if fields is None:
    fields = {'text': record_fields.text}
  paths = match_files(patterns)
  for path in paths:
    file_formats.has_json_lines(path)
  return _records_of(paths, fields, unit)


def read_lines(path: str) -> Iterator[str]:
  """Yields the lines of a text file, also blank ones, without line breaks.

  Raises:
    ValueError: the file is not UTF-8, or is packed and not whole.
  """
  return (line for _, line in _read_lines(path, stripped='\r\n'))


def _records_of(
  paths: list[str], fields: Mapping[str, record_fields.Check], unit: str
) -> Iterator[dict[str, Any]]:
  for path in paths:
    lines = _read_lines(path)
    if file_formats.has_json_lines(path):
      records = (_parse_object(path, *line) for line in lines)
    elif unit == 'paragraph':
      records = _join_paragraphs(lines)
    else:
      records = ((number, {'text': line}) for number, line in lines if line)
    count = 0
    for number, record in (item for item in records if item is not None):
      _check_fields(record, fields, path, number)
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
  try:
    with file_formats.open_bytes(path) as file:
      for number, line in enumerate(file, start=1):
        encoding = 'utf-8-sig' if number == 1 else 'utf-8'
        yield number, line.decode(encoding).strip(stripped)
  except UnicodeDecodeError as error:
    raise ValueError(
      f'Text must be UTF-8, but {path}, line {number}, is not: {error}. '
      'Convert the file, for example with iconv.'
    ) from error
  except file_formats.DAMAGED as error:
    raise file_formats.broken_off(path, number, error) from None


def _check_fields(record, fields, path, number) -> None:
  """Replaces the values of fields by what their checks return."""
  for name, check in fields.items():
    if name not in record:
      raise ValueError(
        f'Every record must have the field {name!r}, but {path}, line '
        f'{number}, has only {sorted(record)}. Add the field, or name the field '
        'that holds it.'
      )
    try:
      record[name] = check(record[name])
    except record_fields.FieldError as error:
      shown = json.dumps(record[name], ensure_ascii=True)
      shown = shown if len(shown) <= 80 else shown[:77] + '...'
      raise ValueError(
        f'The field {name!r} of a record {error}, but in {path}, line {number}, '
        f'it is {shown}. Correct the line, or name another field.'
      ) from None


def _parse_object(
  path: str, number: int, line: str
) -> tuple[int, dict[str, Any]] | None:
  if not line:
    return None
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    # Python limits the digits of a number and the depth of a value.
    raise ValueError(
      f'Every line must be one JSON object, but {path}, line {number}, is '
      f'not JSON: {error}. Write one object per line, without line breaks.'
    ) from error
  if not isinstance(record, dict):
    raise ValueError(
      f'Every line must be one JSON object, but {path}, line {number}, is a '
      f'{type(record).__name__}. Write {{"text": ...}} on each line.'
    )
  if '\\ud' in line or '\\uD' in line:
    # Half of a pair of surrogates is no character: files cannot hold it.
    record = _without_halves(record)
  return number, record


def _without_halves(value: Any) -> Any:
  """Replaces lone surrogates by '?', as they are when text is encoded."""
  if isinstance(value, str):
    return value.encode('utf-8', 'replace').decode()
  if isinstance(value, list):
    return [_without_halves(one) for one in value]
  if isinstance(value, dict):
    return {_without_halves(k): _without_halves(v) for k, v in value.items()}
  return value


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
