"""What transformers says of a tokenizer beside its SentencePiece model."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from mowe.words import base_vocabulary, json_files

_SETTINGS = 'tokenizer_config.json'
_TOKENIZER = 'tokenizer.json'
_MOST_SENTINELS = 100_000
_ADVICE = 'Copy the file again from where it was whole.'


class Tokenizer(NamedTuple):
  """Settings of a tokenizer.

  Attributes:
    extra_ids: how many sentinels it adds to its SentencePiece model; None if
      the files do not say.
    added: ids of the texts that somebody added as tokens, in the order of the
      ids; -1 for a text of which the files do not say it.
  """

  extra_ids: int | None
  added: dict[str, int]


def read(
  folder: str | os.PathLike, vocabulary: base_vocabulary.Vocabulary
) -> Tokenizer:
  """Reads the settings of the tokenizer in a folder of `save_pretrained`.

  Args:
    folder: the folder; it may lack both files.
    vocabulary: its SentencePiece model. What is a piece of it was not added.

  Raises:
    ValueError: a file is damaged, or its number of sentinels is none.
  """
  settings = _read(folder, _SETTINGS)
  extra_ids = settings.get('extra_ids')
  is_number = type(extra_ids) is int and 0 <= extra_ids <= _MOST_SENTINELS
  if extra_ids is not None and not is_number:
    raise ValueError(
      f'extra_ids of {pathlib.Path(folder) / _SETTINGS} must be a number of '
      f'sentinels up to {_MOST_SENTINELS:,}, but is {extra_ids!r}. {_ADVICE}'
    )
  # Both files have all of them, where both are there.
  tokens = [
    (token.get('id'), token.get('content'))
    for token in _items(_read(folder, _TOKENIZER).get('added_tokens'))
  ]
  decoder = settings.get('added_tokens_decoder')
  if isinstance(decoder, Mapping):
    tokens += [
      (int(key) if key.isdecimal() else None, token.get('content'))
      for key, token in decoder.items()
      if isinstance(token, Mapping)
    ]
  names = {vocabulary.piece(i) for i in range(vocabulary.size)}
  added = {
    text: number if type(number) is int else -1
    for number, text in tokens
    if isinstance(text, str)
    and text
    and text not in names
    and not text.startswith('<extra_id_')
  }
  return Tokenizer(
    extra_ids, dict(sorted(added.items(), key=lambda item: item[1]))
  )


def _read(folder, name) -> dict[str, Any]:
  path = pathlib.Path(folder) / name
  return json_files.read_object(path, _ADVICE) if path.is_file() else {}


def _items(value: Any) -> list[Mapping[str, Any]]:
  """The objects of a list; nothing of another value."""
  if not isinstance(value, list):
    return []
  return [one for one in value if isinstance(one, Mapping)]
