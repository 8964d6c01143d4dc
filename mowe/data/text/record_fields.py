"""What the fields of records must hold.

A check takes the value of a field, and returns it in the form that the rest of
the package reads. It raises `FieldError` with a sentence on what must hold.
"""

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], Any]


class FieldError(ValueError):
  """A field holds something else than it must; the message says what it must."""


def text(value: Any) -> str:
  """Takes a text."""
  if not isinstance(value, str):
    raise FieldError('must be a text in quotes')
  return value


def text_or_number(value: Any) -> str | int | float:
  """Takes what can stand in a prompt."""
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    raise FieldError('must be a text or a number')
  return value


def answers(value: Any) -> list[str]:
  """Takes the answers to a question, and returns them as a list.

  They are one text or a list of texts, or as SQuAD has them {"text": [...]}, or
  as TriviaQA has them {"value": ..., "aliases": [...]}. A whole number counts
  as its digits.
  """
  if isinstance(value, Mapping):
    if isinstance(value.get('text'), list):
      value = value['text']
    elif isinstance(value.get('value'), str):
      aliases = value.get('aliases')
      value = [value['value'], *(aliases if isinstance(aliases, list) else [])]
      value = list(dict.fromkeys(value))
  if not isinstance(value, list):
    value = [value]
  found = [
    str(one) if isinstance(one, int) and not isinstance(one, bool) else one
    for one in value
  ]
  if not found or not all(
    isinstance(one, str) and one.strip() for one in found
  ):
    raise FieldError(
      'must be an answer, or a list of answers of which none is empty'
    )
  return found


def all_texts(names: Any) -> dict[str, Check]:
  """Returns the check `text` for each of some names."""
  return dict.fromkeys(names, text)


QUESTIONS: Mapping[str, Check] = {'question': text, 'answers': answers}
