"""Renders a report as Markdown."""

import html
from collections.abc import Sequence

from mowe.comparison.report import report_contents, report_tables, table_cells
from mowe.words import terminal_text


def render(
  report: report_contents.Report,
  headline: str,
  tables: Sequence[table_cells.Table],
  examples: Sequence[report_tables.Example],
  figure: str,
) -> str:
  """Returns the report as Markdown, in which all texts are escaped.

  Args:
    report: what the report is made of.
    headline: the result in a sentence.
    tables: all tables.
    examples: questions that the models answered differently.
    figure: name of the file with the figures.
  """
  parts = [f'# {_text(report.title)}', f'**{_text(headline)}**']
  parts += map(_text, report.notes)
  parts.append(f'![EM, losses and sizes of all models]({figure})')
  for table in tables:
    parts += [f'## {_text(table.title)}', of_rows(table.rows)]
    parts += [_text(note) for note in table.notes]
  if examples:
    parts.append('## Questions on which models differ')
  parts += map(_example, examples)
  if report.provenance:
    parts.append('## How it was made')
    parts.append(
      '\n'.join(f'- {_text(n)}: {_text(v)}' for n, v in report.provenance)
    )
  return '\n\n'.join(parts) + '\n'


def of_rows(rows: Sequence[Sequence[table_cells.Cell]]) -> str:
  """Returns rows, the headings first, as a table in Markdown."""
  heading, *body = (
    '| ' + ' | '.join(_cell(cell) for cell in row) + ' |' for row in rows
  )
  # The first column is aligned to the left, numbers to the right.
  rule = '|---|' + '---:|' * (len(rows[0]) - 1)
  return '\n'.join((heading, rule, *body))


def _cell(cell: table_cells.Cell) -> str:
  text = table_cells.plain(cell)
  if isinstance(cell, table_cells.Bars):
    return text
  return (
    f'**{_text(text)}**' if isinstance(cell, table_cells.Best) else _text(text)
  )


def _example(example: report_tables.Example) -> str:
  lines = [
    f'**{_text(example.question)}** (right: '
    f'{_text(" / ".join(example.answers))})',
    '',
  ]
  lines += [
    f'- {_text(name)}: {_text(prediction) or "(nothing)"} '
    f'{"✓" if is_right else "✗"}'
    for name, prediction, is_right in example.predictions
  ]
  lines += [
    f'- experts of {_text(name)}: '
    + ', '.join(
      f'{_text(word)} {"none" if expert is None else expert}'
      for word, expert in words
    )
    for name, words in example.words
  ]
  return '\n'.join(lines)


def _text(text: str) -> str:
  """Escapes a text, so that it is neither Markdown, HTML nor codes."""
  text = terminal_text.escaped(' '.join(text.split()))
  for mark in '\\|*_`[]#':
    text = text.replace(mark, f'\\{mark}')
  return html.escape(text, quote=False)
