"""Reads JSON files that are one value: lists of records, SQuAD and TriviaQA."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def is_one_value(first_line: str) -> bool:
  """Returns whether a .json file is one value, and not one object per line.

  Args:
    first_line: the first line of the file that is not blank.
  """
  try:
    value = json.loads(first_line)
  except (ValueError, RecursionError):
    # A value that is written over several lines breaks its first one here.
    return first_line.rstrip().endswith(('{', '[', ','))
  return isinstance(value, list) or _list_of(value) is not None


def records(text: str, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the records of a file, numbered from 1 on.

  A list gives its objects. The files of SQuAD and of TriviaQA, as these are
  distributed, give a record with `question` and `answers` for each question.

  Args:
    text: the whole file.
    path: its path, for messages.

  Raises:
    ValueError: it is not JSON, or of another form.
  """
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'A .json file must be JSON, but {path} is not: {error}. Correct it, or '
      'write one object per line.'
    ) from None
  entries = _list_of(value)
  found = value if isinstance(value, list) else entries
  if found is None or not all(isinstance(one, dict) for one in found):
    raise ValueError(
      'A .json file must hold one object per line, a list of objects, or the '
      f"data of SQuAD or TriviaQA under 'data' or 'Data', but {path} is "
      f'{text.strip()[:60]!r}... Write a list of objects.'
    )
  if entries is None:
    yield from enumerate(found, start=1)
    return
  number = 0
  for place, entry in enumerate(found, start=1):
    try:
      questions = list(_questions(entry))
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(
        f'Questions must have the form of SQuAD, but record {place} of {path} '
        f'has another one: {error!r}. Write a list of objects with the fields '
        'question and answers.'
      ) from None
    for question in questions:
      number += 1
      yield number, question


def _list_of(value: Any) -> list[Any] | None:
  """The entries of SQuAD or TriviaQA; None for another value."""
  for name, of_entry in (('data', 'paragraphs'), ('Data', 'Question')):
    found = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(found, list) or not found:
      continue
    if isinstance(found[0], Mapping) and of_entry in found[0]:
      return found
  return None


def _questions(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """The questions of an entry of SQuAD or TriviaQA."""
  if 'paragraphs' in record:
    for paragraph in record['paragraphs']:
      for question in paragraph['qas']:
        answers = [one['text'] for one in question.get('answers', [])]
        yield question | {
          'answers': answers,
          'context': paragraph.get('context'),
          'title': record.get('title'),
        }
  else:
    answer = record.get('Answer')
    given = {'question': record['Question']}
    if isinstance(answer, Mapping):
      given['answers'] = {
        'value': answer.get('Value'),
        'aliases': answer.get('Aliases'),
      }
    yield record | given
