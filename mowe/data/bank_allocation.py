"""Allots rows to banks by the text of a token cache."""

import os
import pathlib
from collections.abc import Iterator

import numpy as np

from mowe.data.caches import token_cache
from mowe.words.addresses import address_base, bank_address, bank_widths

# Texts are looked up many at a time, as packed rows of about so many tokens.
_AT_ONCE = 2**16


def allotted(
  address: address_base.Address,
  cache_dir: str | os.PathLike[str],
  task: str,
  num_rows: int,
  widest: int,
  most_tokens: int = 10_000_000,
) -> bank_address.Banks:
  """Returns banks whose widths follow from the text of a task.

  Source: L3, arXiv 2601.21461; see `bank_widths`.

  Args:
    address: names the bank of each token; it has one slot.
    cache_dir: folder of the token caches.
    task: name of the token cache, whose targets are the text.
    num_rows: number of rows of all banks together.
    widest: the most rows of one bank.
    most_tokens: how many tokens are read at most, from the start of the cache.

  Raises:
    ValueError: the address has several slots, there is no such cache, or there
      are fewer rows than banks.
  """
  if address.num_slots != 1:
    raise ValueError(
      'Banks can only be allotted to an address with one row for each token, '
      f'but {type(address).__name__} has {address.num_slots} slots. Give it '
      'one slot, or give Banks one width for all.'
    )
  cache = token_cache.TokenCache.open(pathlib.Path(cache_dir) / task)
  counts = bank_widths.count_codewords(
    _texts(cache, address, most_tokens), address.num_rows
  )
  widths = bank_widths.share_rows(counts, address.num_rows, num_rows, widest)
  return bank_address.Banks(address, widths)


def _texts(cache, address, most_tokens) -> Iterator[list[int]]:
  """Yields the bank of each token of each text; tokens without one are out."""
  stream, offsets = cache.stream('targets'), cache.offsets('targets')
  number = int(np.searchsorted(offsets, most_tokens, side='right')) - 1
  first = 0
  while first < max(number, 1) and first < cache.num_examples:
    last = int(np.searchsorted(offsets, offsets[first] + _AT_ONCE))
    last = min(max(last, first + 1), max(number, 1))
    start, end = offsets[first], offsets[last]
    tokens = np.asarray(stream[start:end], np.int32)[None, :]
    lengths = np.diff(offsets[first : last + 1])
    segments = np.repeat(np.arange(1, last - first + 1), lengths)
    segments = segments.astype(np.int32)[None, :]
    banks = address.encoder_rows(tokens, segments)[0, :, 0]
    for i in range(first, last):
      of_text = banks[offsets[i] - start : offsets[i + 1] - start]
      yield of_text[of_text >= 0].tolist()
    first = last
