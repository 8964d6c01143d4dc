"""Splits questions: for training, for choosing a checkpoint, and to be reported.

What chooses a checkpoint must not be reported, or the report is too good. All
questions of a file about one thing are in one part, so that none is answered by
another.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from mowe.data.text import bad_records, record_fields, text_files
from mowe.words import atomic_files

TRAINING, CHOOSING, REPORTED = 'training', 'choosing', 'reported'
# Of so many things one is asked about for choosing, and one in the report.
_PARTS = 10


@dataclasses.dataclass(frozen=True)
class QuestionFiles:
  """Files of questions, each with `question` and `answers`.

  Attributes:
    training: paths or globs of the questions to train on.
    choosing: those by which the checkpoint is chosen; () takes a tenth of those
      for training.
    reported: those that are reported; () takes a tenth of those for training.
  """

  training: Sequence[str]
  choosing: Sequence[str] = ()
  reported: Sequence[str] = ()


def split(
  files: QuestionFiles, bad: bad_records.BadRecords
) -> dict[str, list[dict[str, Any]]]:
  """Returns the questions of each part.

  The part of a question depends on its field `entity`, or on its text if it has
  none, and on nothing else: more questions leave the others where they are.

  Args:
    files: where the questions are.
    bad: takes the errors of records that cannot be read.

  Raises:
    ValueError: a part has no question, or a record cannot be read.
  """
  parts: dict[str, list[Any]] = {TRAINING: [], CHOOSING: [], REPORTED: []}
  given = {CHOOSING: files.choosing, REPORTED: files.reported}
  for record in _read(files.training, bad):
    name = _part_of(record)
    parts[TRAINING if given.get(name) else name].append(record)
  for name, own in given.items():
    if own:
      parts[name] = list(_read(own, bad))
  empty = [name for name, records in parts.items() if not records]
  if empty:
    raise ValueError(
      'There must be questions for training, for choosing and to be reported, '
      f'but of those in {", ".join(files.training)} none is {empty[0]}: a tenth '
      'is for each of the last two. Give more questions, or files of their own '
      'with --choosing and --reported.'
    )
  print(
    f'Questions: {len(parts[TRAINING]):,} for training, '
    f'{len(parts[CHOOSING]):,} for choosing, {len(parts[REPORTED]):,} to be '
    'reported.'
  )
  trained = set(map(_about, parts[TRAINING]))
  if known := sum(_about(one) in trained for one in parts[REPORTED]):
    print(
      f'{known:,} of those to be reported are about something that questions '
      'for training are about, too: their answers may be known from there.'
    )
  return parts


def digest(records: list[dict[str, Any]]) -> str:
  """Returns a digest of questions."""
  return hashlib.sha256(_as_lines(records)).hexdigest()


def write(
  parts: dict[str, list[dict[str, Any]]], folder: pathlib.Path
) -> dict[str, str]:
  """Writes a file for each part into a folder, and returns their paths."""
  paths = {name: folder / f'{name}.jsonl' for name in parts}
  for name, records in parts.items():
    atomic_files.write_atomically(paths[name], _as_lines(records))
  return {name: str(path) for name, path in paths.items()}


def _as_lines(records: list[dict[str, Any]]) -> bytes:
  # JSON is written in ASCII, because a text may hold half of a surrogate pair,
  # which UTF-8 cannot encode.
  return ''.join(json.dumps(record) + '\n' for record in records).encode()


def _read(files, bad):
  return text_files.read_records(files, record_fields.QUESTIONS, bad=bad)


def _part_of(record: dict[str, Any]) -> str:
  number = part_number(_about(record), _PARTS)
  return {0: CHOOSING, 1: REPORTED}.get(number, TRAINING)


def _about(record: dict[str, Any]) -> str:
  """What a question is about."""
  return str(record.get('entity') or record['question'])


def part_number(about: Any, num_parts: int) -> int:
  """Returns to which of some parts a thing belongs, from 0, by its name alone."""
  digest = hashlib.sha256(str(about).encode('utf-8', 'replace')).digest()
  return int.from_bytes(digest[:8], 'big') % num_parts
