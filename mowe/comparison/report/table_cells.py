"""What the tables of a report are made of, and how numbers are written.

A cell is text, and 'n/a' stands for a number that is not known. A column of
which no number is known is left out.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

NONE = 'n/a'
_BLOCKS = '▁▂▃▄▅▆▇█'
# The most bars in a picture of loads. With more experts, a bar is the mean of
# several.
_MOST_BARS = 48


@dataclasses.dataclass(frozen=True)
class Best:
  """Text of a cell with the best value of its column."""

  text: str


@dataclasses.dataclass(frozen=True)
class Bars:
  """A small picture of bars, with heights from 0 to 1, in a cell of a table."""

  heights: tuple[float, ...]

  @classmethod
  def of_shares(cls, shares: Sequence[float]) -> 'Bars':
    """Makes bars of loads in falling order, with heights in logarithms."""
    ordered = sorted(shares, reverse=True)
    number = min(_MOST_BARS, len(ordered))
    ends = [round(i * len(ordered) / number) for i in range(number + 1)]
    mean = sum(ordered) / len(ordered) or 1.0
    means = [
      sum(ordered[a:b]) / (b - a) / mean
      for a, b in zip(ends, ends[1:], strict=False)
    ]
    top = math.log1p(means[0]) or 1.0
    return cls(tuple(math.log1p(value) / top for value in means))

  def as_text(self) -> str:
    """Returns about eight of the bars, as letters that are blocks."""
    step = max(1, len(self.heights) // 8)
    return ''.join(
      _BLOCKS[round(height * (len(_BLOCKS) - 1))]
      for height in self.heights[::step]
    )


Cell = str | Best | Bars
# A heading, and the cells below it.
Column = tuple[str, Sequence[Cell]]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table with what has to be known to read it.

  Attributes:
    title: title above the table.
    rows: rows of the table, the headings first. The first cell of a row names
      what the row is about.
    notes: sentences below the table.
    is_main: whether a terminal shows it, too.
  """

  title: str
  rows: Sequence[Sequence[Cell]]
  notes: Sequence[str] = ()
  is_main: bool = False

  @classmethod
  def of_columns(
    cls,
    title: str,
    columns: Iterable[Column],
    notes: Sequence[str] = (),
    is_main: bool = False,
  ) -> 'Table':
    """Makes a table of columns, without those of which nothing is known."""
    known = [
      (heading, *cells)
      for heading, cells in columns
      if any(cell not in (NONE, '') for cell in cells)
    ]
    return cls(title, list(zip(*known, strict=True)), notes, is_main)


def values(
  heading: str,
  numbers: Sequence[float | None],
  write: Callable[[float], str],
  best: Callable[[Iterable[float]], float] | None = None,
) -> Column:
  """Returns a column of numbers.

  Args:
    heading: its heading.
    numbers: the numbers; None stands for one that is not known.
    write: makes text of a number.
    best: `max` or `min`, to mark the best number of several that differ. All
      that read alike are marked.
  """
  texts = [NONE if number is None else write(number) for number in numbers]
  known = [number for number in numbers if _is_number(number)]
  marked = None
  if best is not None and len(set(texts) - {NONE}) > 1 and known:
    marked = write(best(known))
  return heading, [Best(text) if text == marked else text for text in texts]


def _is_number(number: float | None) -> bool:
  return number is not None and math.isfinite(number)


def plain(cell: Cell) -> str:
  """Returns the text of a cell, without marks."""
  if isinstance(cell, Bars):
    return cell.as_text()
  return cell.text if isinstance(cell, Best) else cell


def decimals(places: int) -> Callable[[float], str]:
  """Returns what writes a number with so many decimals."""
  return lambda number: f'{number:.{places}f}'


def whole(number: float) -> str:
  """Writes a whole number, with commas between thousands."""
  return f'{number:,.0f}'


def interval(ends: tuple[float, float]) -> str:
  """Writes both ends of an interval with one decimal."""
  return '{:.1f} – {:.1f}'.format(*ends)


def percent(share: float) -> str:
  """Writes a share, from 0 to 1, as a percentage with one decimal."""
  return f'{100 * share:.1f} %'


def count(number: float) -> str:
  """Writes a number with three digits and a unit: 77000000 is 77M."""
  for unit in ('', 'K', 'M', 'G'):
    if number < 999.5:
      return f'{number:.3g}{unit}'
    number /= 1000
  return f'{number:.3g}T'


def gibibytes(number: float) -> str:
  """Writes a number of bytes in GiB."""
  return f'{number / 2**30:.2f} GiB'


def duration(seconds: float) -> str:
  """Writes a time in seconds, minutes, or hours and minutes."""
  if seconds < 100:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  return (
    f'{minutes // 60}h {minutes % 60:02}m'
    if minutes >= 60
    else f'{minutes} min'
  )
