"""Renders a report as one HTML file that needs no other file."""

import base64
import html
from collections.abc import Sequence

from mowe.comparison.report import report_figure, report_tables

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --faint: #59636e;
  --page: #ffffff; --card: #f6f8fa; --line: #d1d9e0; --right: #1a7f37;
  --wrong: #b3261e; --bar: #0072B2; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3;
  --faint: #9198a1; --page: #0d1117; --card: #151b23; --line: #3d444d;
  --right: #3fb950; --wrong: #ff7b72; --bar: #56B4E9; }
  .on-light { display: none !important; } }
@media (prefers-color-scheme: light) { .on-dark { display: none !important; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1rem 4rem;
  color: var(--text); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .75rem 0 .5rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem; overflow-wrap: anywhere; }
p { color: var(--faint); margin: .4rem 0; font-size: .9rem; }
ul.names { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem;
  margin: .75rem 0; padding: 0; font-size: .92rem; }
ul.names span { display: inline-block; width: .75rem; height: .75rem;
  border-radius: .2rem; margin-right: .4rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
figure { margin: 0; padding: .8rem .8rem .4rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .3rem; }
img { display: block; width: 100%; height: auto; }
/* What is wide scrolls in its own box, so that the page never does. */
.scroll { overflow-x: auto; border: 1px solid var(--line);
  border-radius: .6rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%;
  font-size: .88rem; }
/* Whole pixels, and lines within each cell: those of the column that stays
   would drift. */
th, td { padding: 7px 10px; line-height: 21px; text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
thead th, tbody tr:not(:last-child) td {
  box-shadow: inset 0 -1px var(--line); }
thead th { background: var(--card); font-weight: 600; }
/* Names stay in sight while numbers scroll. */
tr > :first-child { text-align: left; position: sticky; left: 0;
  background: var(--page); min-width: 6rem; max-width: 11rem;
  white-space: normal; overflow-wrap: break-word; font-weight: 500; }
thead tr > :first-child { background: var(--card); }
svg.bars { display: block; width: 8rem; height: 26px; fill: var(--bar);
  margin-left: auto; }
.examples { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); }
article { border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem; background: var(--card); overflow-wrap: anywhere; }
article h3 { margin: 0 0 .3rem; font-size: 1rem; }
article dl { display: grid; grid-template-columns: minmax(4rem, auto) 1fr;
  gap: .15rem .9rem; margin: .5rem 0 0; font-size: .9rem; }
dt { color: var(--faint); }
dd { margin: 0; }
.right::after { content: " ✓"; color: var(--right); font-weight: 700; }
.wrong::after { content: " ✗"; color: var(--wrong); font-weight: 700; }
.words { display: flex; flex-wrap: wrap; gap: .3rem; margin-top: .6rem; }
.words span { border: 1px solid var(--line); border-radius: .4rem;
  padding: 0 .4rem; font-size: .82rem; background: var(--page); }
.words small { color: var(--faint); font-size: .74rem; }
"""


def render(
  title: str,
  notes: Sequence[str],
  tables: Sequence[report_tables.Table],
  examples: Sequence[report_tables.Example],
  figures: Sequence[report_figure.Figure],
) -> str:
  """Returns the page, in which all texts are escaped.

  Args:
    title: heading of the page.
    notes: sentences below the heading.
    tables: all tables; the first one lists the models in the order of the
      figures.
    examples: questions that the models answered differently.
    figures: all figures, with their titles.
  """
  names = [str(row[0]) for row in tables[0].rows[1:]]
  first, *rest = tables
  sections = [f'<h1>{html.escape(title)}</h1>']
  sections += [f'<p>{html.escape(note)}</p>' for note in notes]
  sections += [_names(names), _figures(figures), _section(first)]
  sections += [_section(table) for table in rest]
  if examples:
    sections.append('<h2>Questions on which models differ</h2>')
    sections.append(
      '<div class="examples">\n'
      + '\n'.join(map(_example, examples))
      + '\n</div>'
    )
  body = '\n'.join(sections)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _names(names: Sequence[str]) -> str:
  """Returns the list of models with their colours."""
  light, dark = (
    report_figure.colors(theme, len(names))
    for theme in (report_figure.LIGHT, report_figure.DARK)
  )
  items = (
    f'<li><span class="on-light" style="background:{light[i]}"></span>'
    f'<span class="on-dark" style="background:{dark[i]}"></span>'
    f'{html.escape(name)}</li>'
    for i, name in enumerate(names)
  )
  return f'<ul class="names">{"".join(items)}</ul>'


def _figures(figures: Sequence[report_figure.Figure]) -> str:
  cards = []
  for figure in figures:
    title = html.escape(figure.title)
    images = ''.join(
      f'<img class="on-{theme}" alt="{title} of each model" '
      f'src="data:image/svg+xml;base64,{base64.b64encode(image).decode()}">'
      for theme, image in (('light', figure.light), ('dark', figure.dark))
    )
    cards.append(f'<figure><figcaption>{title}</figcaption>{images}</figure>')
  return f'<div class="figures">\n{chr(10).join(cards)}\n</div>'


def _section(table: report_tables.Table) -> str:
  parts = [f'<h2>{html.escape(table.title)}</h2>']
  if table.rows:
    parts.append(_table(table.rows))
  parts += [f'<p>{html.escape(note)}</p>' for note in table.notes]
  return '\n'.join(parts)


def _table(rows: Sequence[Sequence[report_tables.Cell]]) -> str:
  heading, *body = rows
  head = ''.join(f'<th scope="col">{_cell(cell)}</th>' for cell in heading)
  lines = '\n'.join(
    '<tr>' + ''.join(f'<td>{_cell(cell)}</td>' for cell in row) + '</tr>'
    for row in body
  )
  return (
    f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
    f'<tbody>\n{lines}\n</tbody></table></div>'
  )


def _cell(cell: report_tables.Cell) -> str:
  if not isinstance(cell, report_tables.Bars):
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
