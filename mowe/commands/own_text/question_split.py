"""Splits questions: for training, for choosing a checkpoint, and to be reported.

What chooses a checkpoint must not be reported, or the report is too good. All
questions about one thing are in one part, so that none is answered by another.
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
  files: QuestionFiles,
  folder: pathlib.Path,
  bad: bad_records.BadRecords,
) -> dict[str, str]:
  """Writes a file for each part, and returns their paths.

  The part of a question depends on its field `entity`, or on its text if it has
  none, and on nothing else: more questions leave the others where they are.

  Args:
    files: where the questions are.
    folder: the folder to write in.
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
      f'Every part of the questions must have some, but {empty[0]} has none of '
      f'the {sum(map(len, parts.values())):,} in {", ".join(files.training)}. '
      'Give more questions, or files of their own with --choosing and '
      '--reported.'
    )
  paths = {}
  for name, records in parts.items():
    # JSON is written in ASCII, because a text may hold half of a surrogate
    # pair, which UTF-8 cannot encode.
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    paths[name] = str(folder / f'{name}.jsonl')
    atomic_files.write_atomically(paths[name], lines.encode())
  print(
    f'Questions: {len(parts[TRAINING]):,} for training, '
    f'{len(parts[CHOOSING]):,} for choosing, {len(parts[REPORTED]):,} to be '
    'reported.'
  )
  return paths


def _read(files, bad):
  return text_files.read_records(files, record_fields.QUESTIONS, bad=bad)


def _part_of(record: dict[str, Any]) -> str:
  number = part_number(record.get('entity') or record['question'], _PARTS)
  return {0: CHOOSING, 1: REPORTED}.get(number, TRAINING)


def part_number(about: Any, num_parts: int) -> int:
  """Returns to which of some parts a thing belongs, from 0, by its name alone."""
  digest = hashlib.sha256(str(about).encode('utf-8', 'replace')).digest()
  return int.from_bytes(digest[:8], 'big') % num_parts
