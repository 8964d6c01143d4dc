"""Reads records from files of text, JSON lines and tables, plain or packed."""

import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mowe.data.text import (
  bad_records,
  file_formats,
  json_documents,
  record_fields,
  table_rows,
)

_UNITS = ('line', 'paragraph')


def match_files(patterns: str | Sequence[str]) -> list[str]:
  """Returns the files that match paths or globs, sorted, each once.

  In a glob, `**` stands for folders at any depth, and `~` for the home folder.
  A folder that Hugging Face's `datasets` saved stands for the files in it.

  Raises:
    ValueError: a pattern matches no file, or is another folder.
  """
  patterns = [patterns] if isinstance(patterns, str) else list(patterns)
  if not patterns:
    raise ValueError(
      'At least one file or pattern must be given, but the list is empty. '
      'Give a path such as corpus/*.jsonl.gz.'
    )
  paths = set()
  for pattern in map(os.path.expanduser, patterns):
    # A name that exists is taken as it is, because it may contain a bracket.
    found = [pattern]
    if os.path.isdir(pattern):
      found = table_rows.files_of_dataset(pattern)
    elif not os.path.isfile(pattern):
      found = glob.glob(pattern, recursive=True)
    found = [path for path in found if os.path.isfile(path)]
    if not found:
      if re.match(r'[a-z][a-z0-9+.-]+://', pattern):
        raise ValueError(
          'Files must be on a file system of this machine, but '
          f'{pattern!r} names another place. Copy them here, or mount that '
          'place.'
        )
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
  *,
  check: Callable[[dict[str, Any]], Any] | None = None,
  sources: Sequence[Mapping[str, Any]] | None = None,
  bad: bad_records.BadRecords | None = None,
) -> Iterator[dict[str, Any]]:
  """Yields one dict per record, file after file in the order of their names.

  Files of records are told by the endings of their names: JSON lines, .csv,
  .tsv, .parquet, .arrow and .feather; see `file_formats.has_records`. A .json
  file may also be one list, or the data of SQuAD or TriviaQA. All other files
  are text, and give records {'text': ...}. Blank lines are skipped.

  Args:
    patterns: paths or globs of the files.
    fields: the fields that every record must have, each with a check of its
      value; None for {'text': record_fields.text}.
    unit: what is one record of a text file: 'line', or 'paragraph', the lines
      up to a blank line, joined by spaces.
    check: called with each record, to raise ValueError for one that cannot be
      used; None checks the fields alone.
    sources: what `describe_sources` gave; what is read must still be the same
      files. None reads the files as they are.
    bad: takes the errors of records that cannot be read; None raises the first.

  Raises:
    BadRecordError: a line is damaged, or a field holds something else than it
      must. The message has the file's name and the number of the line.
    ModuleNotFoundError: a table needs pyarrow, which is not installed.
    ValueError: no file matches, a file holds no record or is of a format that
      is not read, or is not the one that was described.
  """
  if unit not in _UNITS:
    raise ValueError(
      f'unit must be one of {_UNITS}, but is {unit!r}. Choose one of them.'
    )
  # This function is no generator, so that a missing file is reported by the
  # call itself.
  if fields is None:
    fields = {'text': record_fields.text}
  digests = digests_of(paths := match_files(patterns), sources)
  for path in paths:
    file_formats.ending(path)
  bad = bad or bad_records.BadRecords()
  return (
    record
    for path in paths
    for record in _records_of(path, digests.get(path), fields, unit, check, bad)
  )


def read_lines(
  path: str,
  *,
  sha256: str | None = None,
  bad: bad_records.BadRecords | None = None,
) -> Iterator[str]:
  """Yields the lines of a text file, also blank ones, without line breaks.

  Args:
    path: the file.
    sha256: the digest that the file must have; None reads it as it is.
    bad: takes the errors of lines that are not UTF-8; None raises the first.

  Raises:
    BadRecordError: a line is not UTF-8.
    ValueError: the file is packed and not whole, or has another digest.
  """
  bad = bad or bad_records.BadRecords()
  return (
    line.strip('\r\n')
    for _, line in _decoded(path, _read_lines(path, sha256), bad)
  )


def digests_of(
  paths: Sequence[str], sources: Sequence[Mapping[str, Any]] | None
) -> dict[str, str]:
  """Returns path -> sha256 of files that were described before.

  Raises:
    ValueError: they are other files by number or name.
  """
  if sources is None:
    return {}
  names = [os.path.basename(path) for path in paths]
  if names != [source['name'] for source in sources]:
    raise ValueError(
      'Files must stay where they are while they are read, but there are now '
      f'{len(names)} and were {len(sources)}. Run the command again when '
      'nothing changes them.'
    )
  return {
    path: source['sha256'] for path, source in zip(paths, sources, strict=True)
  }


def _records_of(
  path: str,
  sha256: str | None,
  fields: Mapping[str, record_fields.Check],
  unit: str,
  check: Callable[[dict[str, Any]], Any] | None,
  bad: bad_records.BadRecords,
) -> Iterator[dict[str, Any]]:
  count, num_bad = 0, bad.number
  for place, record in _rows_of(path, sha256, unit, bad):
    try:
      _check_record(record, fields, check, f'{path}, {place}')
    except bad_records.BadRecordError as error:
      bad.take(error)
      continue
    count += 1
    yield record
  if not count:
    found = 'is empty or blank'
    if num_bad := bad.number - num_bad:
      found = f'has {num_bad:,} that cannot be read, the last one: {bad.last}'
    raise ValueError(
      f'A file must hold at least one record, but {path} {found.rstrip(".")}. '
      'Remove it from the list, or write it again.'
    )


def _rows_of(
  path: str, sha256: str | None, unit: str, bad: bad_records.BadRecords
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields where each record of a file stands, such as 'line 3', and it."""
  ending = file_formats.ending(path)
  if ending in table_rows.ARROW_ENDINGS:
    for number, row in table_rows.of_arrow(path, sha256):
      yield f'row {number}', row
    return
  lines = _decoded(path, _read_lines(path, sha256), bad)
  if ending in table_rows.SEPARATORS:
    texts = (line for _, line in lines)
    separator = table_rows.SEPARATORS[ending]
    for number, row in table_rows.of_lines(path, texts, separator, bad):
      yield f'line {number}', row
    return
  if ending == '.json':
    first = next((line for line in lines if line[1].strip()), (1, ''))
    lines = itertools.chain([first], lines)
    if json_documents.is_one_value(first[1]):
      text = ''.join(line for _, line in lines)
      for number, record in json_documents.records(text, path):
        yield f'record {number}', _without_halves(record)
      return
  stripped = ((number, line.strip()) for number, line in lines)
  is_json = file_formats.has_json_lines(path)
  if not is_json and unit == 'paragraph':
    stripped = _join_paragraphs(stripped)
  for number, line in stripped:
    if not line:
      continue
    try:
      record = _parse_object(path, number, line) if is_json else {'text': line}
    except bad_records.BadRecordError as error:
      bad.take(error)
      continue
    yield f'line {number}', record


def _read_lines(path: str, sha256: str | None) -> Iterator[tuple[int, bytes]]:
  """Yields line numbers, from 1 on, and lines."""
  number = 0
  try:
    with file_formats.open_bytes(path, sha256) as file:
      for number, line in enumerate(file, start=1):
        yield number, line
  except file_formats.DAMAGED as error:
    raise file_formats.broken_off(path, number, error) from None


def _decoded(
  path: str,
  lines: Iterator[tuple[int, bytes]],
  bad: bad_records.BadRecords,
) -> Iterator[tuple[int, str]]:
  for number, line in lines:
    try:
      text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
    except UnicodeDecodeError as error:
      bad.take(
        bad_records.BadRecordError(
          f'Text must be UTF-8, but {path}, line {number}, is not: {error}. '
          'Convert the file, for example with iconv.'
        )
      )
      continue
    yield number, text


def _check_record(record, fields, check, place) -> None:
  """Replaces the values of fields by what their checks return."""
  for name, check_field in fields.items():
    if name not in record:
      raise bad_records.BadRecordError(
        f'Every record must have the field {name!r}, but {place}, has only '
        f'{sorted(record)}. Add the field, or name the field '
        'that holds it.'
      )
    try:
      record[name] = check_field(record[name])
    except record_fields.FieldError as error:
      shown = json.dumps(record[name], ensure_ascii=True, default=str)
      shown = shown if len(shown) <= 80 else shown[:77] + '...'
      raise bad_records.BadRecordError(
        f'The field {name!r} of a record {error}, but in {place}, it is '
        f'{shown}. Correct the line, or name another field.'
      ) from None
  if check is not None:
    try:
      check(record)
    except ValueError as error:
      raise bad_records.BadRecordError(f'{place}: {error}') from None


def _parse_object(path: str, number: int, line: str) -> dict[str, Any]:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    # Python limits the digits of a number and the depth of a value.
    raise bad_records.BadRecordError(
      f'Every line must be one JSON object, but {path}, line {number}, is '
      f'not JSON: {error}. Write one object per line, without line breaks.'
    ) from error
  if not isinstance(record, dict):
    raise bad_records.BadRecordError(
      f'Every line must be one JSON object, but {path}, line {number}, is a '
      f'{type(record).__name__}. Write {{"text": ...}} on each line.'
    )
  if '\\ud' in line or '\\uD' in line:
    # Half of a pair of surrogates is no character: files cannot hold it.
    record = _without_halves(record)
  return record


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
) -> Iterator[tuple[int, str]]:
  first, parts = 0, []
  for number, line in lines:
    if line:
      first = first if parts else number
      parts.append(line)
    elif parts:
      yield first, ' '.join(parts)
      parts = []
  if parts:
    yield first, ' '.join(parts)
