"""Shows a step of a longer command as the command that does this step alone."""

import shlex
from collections.abc import Sequence
from typing import Any


def say(verb: str, *arguments: Any, **options: Any) -> None:
  """Prints the command that does what is about to be done."""
  words = ['mowe', verb, *map(str, arguments)]
  for name, value in options.items():
    values = value if isinstance(value, tuple) else (value,)
    words += [f'--{name}', *map(str, values)]
  print_command(words)


def print_command(words: Sequence[str]) -> None:
  """Prints a command as it can be typed, with gin's own quotes in it."""
  print('$', *map(_quoted, words), flush=True)


def _quoted(word: str) -> str:
  if "'" in word and not set('"$`\\!') & set(word):
    return f'"{word}"'
  return shlex.quote(word)
