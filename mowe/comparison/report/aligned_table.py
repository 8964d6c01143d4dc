"""Writes tables for a terminal, with columns that stand below each other."""

from collections.abc import Sequence

from rich import cells

from mowe.comparison.report import table_cells
from mowe.words import terminal_text

_BETWEEN = '  '


def aligned(rows: Sequence[Sequence[table_cells.Cell]]) -> str:
  """Returns rows, the headings first, as lines of text.

  The first column is aligned to the left, all others to the right.

  Args:
    rows: at least one row, all with as many cells.
  """
  texts = [list(map(_text, row)) for row in rows]
  widths = [
    max(map(cells.cell_len, column)) for column in zip(*texts, strict=True)
  ]
  heading, *body = (_line(row, widths) for row in texts)
  rule = _BETWEEN.join('─' * width for width in widths)
  return '\n'.join((heading, rule, *body))


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
  # A letter may be two columns wide, and a mark on a letter none.
  gaps = [
    ' ' * (width - cells.cell_len(text))
    for text, width in zip(texts, widths, strict=True)
  ]
  first, *others = zip(texts, gaps, strict=True)
  parts = [''.join(first), *(gap + text for text, gap in others)]
  return _BETWEEN.join(parts).rstrip()


def _text(cell: table_cells.Cell) -> str:
  return terminal_text.escaped(' '.join(table_cells.plain(cell).split()))
