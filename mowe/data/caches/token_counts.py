"""Counts how often each token id occurs in a token cache."""

import os

import numpy as np

from mowe.data.caches import token_cache

# Number of tokens counted at a time, which bounds the memory that is needed.
_CHUNK = 1 << 22


def count_tokens(cache: str | os.PathLike, num_ids: int) -> np.ndarray:
  """Counts the ids of all texts, inputs and targets of a cache.

  Args:
    cache: the folder of a token cache.
    num_ids: number of ids to count, at least the size of the cache's
      vocabulary.

  Returns:
    <int64>[num_ids], the count of each id. Sentinels have the count 0, because
    masking makes them and not the text.

  Raises:
    ValueError: there is no cache, or its vocabulary has more ids.
  """
  opened = token_cache.TokenCache.open(cache)
  size = opened.vocabulary['size']
  if size > num_ids:
    raise ValueError(
      f'num_ids must be at least the size of the vocabulary of {cache}, '
      f'{size}, but is {num_ids}. Set it to vocab_size of the model.'
    )
  counts = np.zeros(num_ids, np.int64)
  for feature in opened.features:
    if feature == 'spans':  # Spans are positions, not ids.
      continue
    tokens = opened.stream(feature)
    for start in range(0, len(tokens), _CHUNK):
      counts += np.bincount(tokens[start : start + _CHUNK], minlength=num_ids)
  return counts
