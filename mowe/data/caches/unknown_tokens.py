"""Counts what a subword vocabulary cannot write in a token cache."""

import numpy as np

from mowe.data.caches import token_cache
from mowe.words import base_vocabulary

# Number of tokens read at a time, which bounds the memory that is needed.
_CHUNK = 1 << 22


def share(cache: token_cache.TokenCache) -> float:
  """Returns which part of all texts, inputs and targets is unknown."""
  num_unknown = num_tokens = 0
  for feature in cache.features:
    if feature == 'spans':  # Spans are positions, not ids.
      continue
    tokens = cache.stream(feature)
    num_tokens += len(tokens)
    for start in range(0, len(tokens), _CHUNK):
      part = tokens[start : start + _CHUNK]
      num_unknown += np.count_nonzero(part == base_vocabulary.UNK_ID)
  return num_unknown / max(1, num_tokens)


def num_unwritable(
  cache: token_cache.TokenCache, vocabulary: base_vocabulary.Vocabulary
) -> int:
  """Counts the questions of which no accepted answer can be written.

  A model cannot answer them, however good it is.

  Args:
    cache: a token cache; questions without public answers are not counted.
    vocabulary: its subword vocabulary.
  """
  number = 0
  for record in cache.records():
    encoded = vocabulary.encode_batch(list(record.get('answers') or ()))
    number += bool(encoded) and all(
      base_vocabulary.UNK_ID in tokens for tokens in encoded
    )
  return number
