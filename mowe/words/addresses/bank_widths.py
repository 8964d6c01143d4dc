"""Shares the rows of a table out to the banks of tokens, by their text.

A token that ends many frequent sequences gets a wide bank. The sequences are
the codewords of an LZ78 parse of a text.

Source: L3, arXiv 2601.21461.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence

Codeword = tuple[int, ...]


def count_codewords(
  texts: Iterable[Sequence[int]],
  num_ids: int,
  *,
  as_listed: bool = False,
) -> dict[Codeword, int]:
  """Counts the codewords of an LZ78 parse, in the order of their creation.

  All single ids are codewords from the beginning. At each place the parse takes
  the longest known codeword, counts it, makes a new codeword of it and the id
  after it, and goes on behind that id. The codewords of a text are known in
  later texts.

  Args:
    texts: lists of ids, each of which is parsed by itself.
    num_ids: number of different ids.
    as_listed: counts the end of a text as a listing that is attributed to the
      paper does: a last single id is not counted, and a rest that is a known
      codeword counts for the codeword without its last id, while its own count
      becomes 1.

  Returns:
    Codeword -> how often the parse took it.
  """
  # A codeword is known by the number of the codeword that it extends, and its
  # last id. Its tuple is made in the end.
  numbers: dict[tuple[int, int], int] = {(-1, i): i for i in range(num_ids)}
  counts = [0] * num_ids
  for text in texts:
    end = len(text)
    last = end - as_listed
    place = 0
    while place < last:
      number, after = text[place], place + 1
      while after < last and (number, text[after]) in numbers:
        number = numbers[number, text[after]]
        after += 1
      counts[number] += 1
      if after < end:
        longer = numbers.setdefault((number, text[after]), len(counts))
        if longer == len(counts):
          counts.append(1)
        else:
          # Only at the end of a text, and only as listed.
          counts[longer] = 1
      place = after + 1
  codewords: list[Codeword] = []
  for before, last in numbers:
    codewords.append((*codewords[before], last) if before >= 0 else (last,))
  return dict(zip(codewords, counts, strict=True))


def share_rows(
  codewords: Mapping[Codeword, int],
  num_ids: int,
  num_rows: int,
  widest: int,
) -> tuple[int, ...]:
  """Returns the width of the bank of each id.

  Each has one row. Then codewords, the most frequent first and of equal ones
  the older first, give one row each to their last id, unless its bank is as
  wide as it may be, until all rows are given.

  Args:
    codewords: counts of `count_codewords`.
    num_ids: number of different ids.
    num_rows: number of rows of all banks together.
    widest: the most rows of one bank.

  Raises:
    ValueError: there are fewer rows than ids, or a bank may have none.
  """
  if num_rows < num_ids or widest < 1:
    raise ValueError(
      'Banks must have at least one row each, but there are '
      f'{num_rows:,} rows for {num_ids:,} banks of at most {widest}. Raise the '
      'number of rows.'
    )
  widths = collections.Counter({i: 1 for i in range(num_ids)})
  left = num_rows - num_ids
  # The sort is stable, so that of equal ones the older stays before.
  for codeword, _ in sorted(codewords.items(), key=lambda item: -item[1]):
    if not left:
      break
    if widths[codeword[-1]] < widest:
      widths[codeword[-1]] += 1
      left -= 1
  return tuple(widths[i] for i in range(num_ids))
