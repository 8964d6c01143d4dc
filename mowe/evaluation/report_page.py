"""The report as one HTML file that needs nothing else."""

import base64
import html
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --faint: #59636e;
  --page: #ffffff; --card: #f6f8fa; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3;
  --faint: #9198a1; --page: #0d1117; --card: #151b23; --line: #3d444d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--text);
  background: var(--page); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { color: var(--faint); margin: .25rem 0 .75rem; }
/* The figure keeps its white ground: its colours are chosen for it. */
img { display: block; width: 100%; min-width: 52rem; background: #ffffff; }
/* What is wide scrolls in its own box, so that the page never does. */
.scroll { overflow-x: auto; border: 1px solid var(--line);
  border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .45rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
thead th { background: var(--card); white-space: nowrap; }
.numbers td + td, .numbers th + th { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.texts td { min-width: 9rem; overflow-wrap: anywhere; }
"""


def render(
  title: str, rows: Rows, relations: Rows, samples: Rows, figure_png: bytes
) -> str:
  """Returns the page; all texts are escaped here.

  Args:
    title: heading of the page.
    rows: the table of models, headings first.
    relations: exact match by relation and model; empty leaves it out.
    samples: questions with answers of each model; empty leaves it out.
    figure_png: the bytes of the figure.
  """
  image = base64.b64encode(figure_png).decode('ascii')
  sections = [
    f'<h1>{html.escape(title)}</h1>',
    _table(rows, 'numbers'),
    '<h2>Figures</h2>',
    f'<div class="scroll"><img src="data:image/png;base64,{image}" '
    'alt="Loss by step, and exact match by compute and by parameters, of each '
    'model"></div>',
  ]
  if relations:
    sections += ['<h2>Exact match by relation</h2>']
    sections += [_table(relations, 'numbers')]
  if samples:
    sections += ['<h2>Sample questions</h2>', _table(samples, 'texts')]
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


def _table(rows: Rows, style: str) -> str:
  heading, *body = rows
  head = ''.join(
    f'<th scope="col">{html.escape(cell)}</th>' for cell in heading
  )
  lines = '\n'.join(
    '<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>'
    for row in body
  )
  return (
    f'<div class="scroll"><table class="{style}">\n'
    f'<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
  )
