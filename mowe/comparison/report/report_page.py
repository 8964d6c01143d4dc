"""Renders a report as one HTML file that needs no other file."""

import base64
import html
import importlib.resources
import json
from collections.abc import Iterator, Sequence
from typing import Any

from mowe.comparison.report import (
  figure_colors,
  report_contents,
  report_figure,
  report_tables,
  table_cells,
)


def render(
  report: report_contents.Report,
  headline: str,
  tables: Sequence[table_cells.Table],
  examples: Sequence[report_tables.Example],
  numbers: Any,
) -> str:
  """Returns the page, in which all texts are escaped.

  Args:
    report: what the report is made of.
    headline: the result in a sentence.
    tables: all tables.
    examples: questions that the models answered differently.
    numbers: all numbers as a tree for JSON, which the page offers as a file.
  """
  title = html.escape(report.title)
  sections = list(_sections(report, tables, examples, numbers))
  contents = ''.join(
    f'<li><a href="#{name}">{html.escape(heading)}</a></li>'
    for name, heading, _ in sections
  )
  notes = ''.join(f'<p>{html.escape(note)}</p>' for note in report.notes)
  body = '\n'.join(
    '<section>\n'
    f'<h2 id="{name}">{html.escape(heading)}</h2>\n{content}\n</section>'
    for name, heading, content in sections
  )
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_style()}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="headline">{html.escape(headline)}</p>
{notes}
</header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
{body}
</main>
</body>
</html>
"""


def _style() -> str:
  """The style sheet, after the colours of both themes."""

  def variables(theme):
    names = theme.variables() | {'page': theme.page, 'card': theme.card}
    return ''.join(f'--{name}:{color};' for name, color in names.items())

  light, dark = map(variables, (figure_colors.LIGHT, figure_colors.DARK))
  sheet = importlib.resources.files(__package__) / 'page.css'
  return (
    f':root{{{light}}}\n'
    f'@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n'
    f'{sheet.read_text("utf-8")}'
  )


def _sections(
  report, tables, examples, numbers
) -> Iterator[tuple[str, str, str]]:
  """Yields the id, the heading and the content of each section."""
  yield (
    'figures',
    'Figures',
    _legend([result.name for result in report.results])
    + _figures(report_figure.page_figures(report)),
  )
  for number, table in enumerate(tables):
    name = f'table-{number}'
    notes = ''.join(f'<p>{html.escape(note)}</p>' for note in table.notes)
    yield name, table.title, _table(table, name) + notes
  if examples:
    articles = '\n'.join(map(_example, examples))
    yield (
      'examples',
      'Questions on which models differ',
      f'<div class="examples">\n{articles}\n</div>',
    )
  yield 'provenance', 'How it was made', _provenance(report, numbers)


def _legend(names: Sequence[str]) -> str:
  """Returns the list of models with their markers and colours."""
  items = (
    f'<li><span aria-hidden="true">{report_figure.model_mark(i)}</span>'
    f'{html.escape(name)}</li>'
    for i, name in enumerate(names)
  )
  return f'<ul class="legend" aria-label="Models">{"".join(items)}</ul>'


def _figures(figures: Sequence[report_figure.Figure]) -> str:
  cards = []
  for number, figure in enumerate(figures):
    label = html.escape(f'{figure.title}. {figure.data}.', quote=True)
    tall = ' class="tall"' if figure.is_tall else ''
    svg = figure.svg.replace(
      '<svg ', f'<svg role="img" aria-label="{label}" ', 1
    )
    cards.append(
      f'<figure{tall}><figcaption id="caption-{number}">'
      f'{html.escape(figure.title)}</figcaption>{svg}</figure>'
    )
  return f'<div class="figures">\n{chr(10).join(cards)}\n</div>'


def _table(table: table_cells.Table, name: str) -> str:
  """Returns a table in a box that scrolls, also with the keyboard."""
  heading, *body = table.rows
  head = ''.join(f'<th scope="col">{_cell(cell)}</th>' for cell in heading)
  lines = '\n'.join(map(_row, body))
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">'
    f'<table>\n<caption>{html.escape(table.title)}</caption>\n'
    f'<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
  )


def _row(row: Sequence[table_cells.Cell]) -> str:
  name, *cells = row
  return (
    f'<tr><th scope="row">{_cell(name)}</th>'
    + ''.join(f'<td>{_cell(cell)}</td>' for cell in cells)
    + '</tr>'
  )


def _cell(cell: table_cells.Cell) -> str:
  if isinstance(cell, table_cells.Best):
    return f'<strong>{html.escape(cell.text)}</strong>'
  if not isinstance(cell, table_cells.Bars):
    return html.escape(cell)
  number = len(cell.heights)
  bars = ''.join(
    f'<rect x="{i + 0.08:.2f}" width="0.84" y="{1 - height:.3f}" '
    f'height="{height:.3f}"/>'
    for i, height in enumerate(cell.heights)
  )
  return (
    f'<svg class="bars" viewBox="0 0 {number} 1" preserveAspectRatio="none" '
    f'role="img" aria-label="loads of the experts">{bars}</svg>'
  )


def _example(example: report_tables.Example) -> str:
  right = html.escape(' / '.join(example.answers))
  relation = (
    f' <small>({html.escape(example.relation)})</small>'
    if example.relation
    else ''
  )
  answers = ''.join(
    f'<dt>{html.escape(name)}</dt>'
    f'<dd class="{"right" if is_right else "wrong"}">'
    f'{html.escape(prediction) or "(nothing)"}</dd>'
    for name, prediction, is_right in example.predictions
  )
  words = ''.join(
    f'<p>Experts of {html.escape(name)}</p><div class="words">'
    + ''.join(
      f'<span>{html.escape(word)} '
      f'<small>{"none" if expert is None else expert}</small></span>'
      for word, expert in words
    )
    + '</div>'
    for name, words in example.words
  )
  return (
    f'<article><h3>{html.escape(example.question)}{relation}</h3>'
    f'<p>Right: {right}</p><dl>{answers}</dl>{words}</article>'
  )


def _provenance(report: report_contents.Report, numbers: Any) -> str:
  """Returns what made the results, and a link to the file of all numbers."""
  items = ''.join(
    f'<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>'
    for name, value in report.provenance
  )
  text = json.dumps(numbers, separators=(',', ':'), ensure_ascii=False)
  content = base64.b64encode(text.encode('utf-8', 'replace')).decode()
  return (
    f'<dl class="provenance">{items}</dl>\n'
    '<p><a download="results.json" href="data:application/json;base64,'
    f'{content}">All numbers as a file, results.json</a></p>'
  )
