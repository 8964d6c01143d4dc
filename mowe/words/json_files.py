"""Reads small JSON files; an error names the file."""

import json
import os
import pathlib
from typing import Any


def read_object(path: str | os.PathLike[str], advice: str) -> dict[str, Any]:
  """Returns the JSON object that a file holds.

  Args:
    path: the file.
    advice: a sentence on what to do if it is damaged.

  Raises:
    ValueError: it is not JSON, or not an object.
  """
  path = pathlib.Path(path)
  try:
    value = json.loads(path.read_text('utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{path} must be JSON, but is not: {error}. {advice}'
    ) from None
  if not isinstance(value, dict):
    raise ValueError(
      f'{path} must be a JSON object, but is a {type(value).__name__}. {advice}'
    )
  return value
