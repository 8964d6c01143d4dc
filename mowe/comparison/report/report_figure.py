"""Draws the figures of a report, for light and for dark pages."""

import dataclasses
import io
import math
import os
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker

from mowe.comparison.report import answer_comparison, report_contents

# With more models, the bars of a group would be too thin. The table of the same
# numbers has them all.
_MOST_IN_GROUPS = 10
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')


@dataclasses.dataclass(frozen=True)
class Theme:
  """The colours of a page.

  Attributes:
    text: colour of titles.
    faint: colour of labels.
    grid: colour of the grid lines.
    page: colour of the background.
    models: colours of the models. They are those of Okabe and Ito, which
      colour-blind readers can tell apart, without yellow and black, then a grey
      and a brown.
  """

  text: str
  faint: str
  grid: str
  page: str
  models: tuple[str, ...]


LIGHT = Theme(
  text='#1b1f24',
  faint='#59636e',
  grid='#e6e9ec',
  page='#ffffff',
  models=(
    *('#0072B2', '#D55E00', '#009E73', '#B8528F', '#2A93C9', '#B97F00'),
    *('#6E7781', '#7A4B2A'),
  ),
)
DARK = Theme(
  text='#e6edf3',
  faint='#9198a1',
  grid='#2a313a',
  page='#0d1117',
  models=(
    *('#56B4E9', '#F0803C', '#2FC69B', '#E08BBE', '#9CCBF0', '#F2B53A'),
    *('#9198A1', '#C89B7B'),
  ),
)

Panel = Callable[[mpl_axes.Axes, report_contents.Report, Theme], None]


@dataclasses.dataclass(frozen=True)
class Figure:
  """One figure in both themes, as SVG.

  Attributes:
    title: what the figure shows.
    light: the image for light pages.
    dark: the image for dark pages.
  """

  title: str
  light: bytes
  dark: bytes


def page_figures(report: report_contents.Report) -> list[Figure]:
  """Draws each panel as its own figure, so that rows of them fit the page."""
  return [
    Figure(title, _svg(draw, report, LIGHT), _svg(draw, report, DARK))
    for title, draw in _panels(report)
  ]


def write_png(
  report: report_contents.Report, path: str | os.PathLike[str]
) -> None:
  """Writes all panels as one picture.

  pyplot is not used, because it would need a display and keep figures alive.
  """
  panels = _panels(report)
  columns = min(3, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = mpl_figure.Figure(
    figsize=(4.9 * columns, 4.1 * rows), dpi=120, layout='constrained'
  )
  figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
  all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes in all_axes:
    axes.set_visible(False)
  for axes, (title, draw) in zip(all_axes, panels, strict=False):
    axes.set_visible(True)
    draw(axes, report, LIGHT)
    axes.set_title(title, loc='left', color=LIGHT.text, fontsize=12, pad=10)
  # The legend is that of the second panel, whose points have markers; the bars
  # of the first have none.
  handles, labels = figure.axes[1].get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc='outside lower center',
    ncols=min(len(labels), 5),
    frameon=False,
    labelcolor=LIGHT.text,
    fontsize=11,
  )
  figure.savefig(path, facecolor=LIGHT.page)


def _panels(report) -> list[tuple[str, Panel]]:
  panels: list[tuple[str, Panel]] = [
    ('Exact match', _scores),
    ('EM by compute', _by_flops),
    ('EM by size', _by_size),
  ]
  if any(result.curve for result in report.results):
    panels.append(('Training loss', _curves))
  if any(result.held_out_curve for result in report.results):
    panels.append(('Loss on held-out text', _held_out_curves))
  if len(answer_comparison.grid(report.results).em) > 1:
    panels.append(('EM by address and payload', _grid))
  frequency = answer_comparison.by_frequency(report.questions, report.num_bins)
  if len(frequency.groups) > 1 and len(report.results) <= _MOST_IN_GROUPS:
    panels.append(('EM by frequency of the entity', _by_frequency))
  return panels


def _svg(draw: Panel, report, theme: Theme) -> bytes:
  # Letters are drawn as outlines, which look the same everywhere. With a fixed
  # salt, the same report gives the same file.
  with matplotlib.rc_context({'svg.hashsalt': 'mowe', 'svg.fonttype': 'path'}):
    figure = mpl_figure.Figure(figsize=(4.5, 3.3), layout='constrained')
    axes = figure.subplots()
    draw(axes, report, theme)
    content = io.BytesIO()
    figure.savefig(
      content, format='svg', transparent=True, metadata={'Date': None}
    )
  return content.getvalue()


def _style(theme: Theme, index: int) -> dict[str, str]:
  return {
    'color': theme.models[index % len(theme.models)],
    # There are 7 markers and 8 colours, so that no two of 56 models look alike.
    'marker': _MARKERS[index % len(_MARKERS)],
  }


def _scores(axes, report, theme):
  """Draws a bar with its interval for each model."""
  results = report.results
  for place, result in enumerate(results):
    score = result.score()
    color = _style(theme, place)['color']
    axes.barh(place, score.em, height=0.62, color=color, alpha=0.85)
    low, high = score.em_interval
    axes.plot([low, high], [place, place], color=theme.text, linewidth=1.4)
    axes.annotate(
      f'{score.em:.1f}',
      (max(high, score.em), place),
      xytext=(6, 0),
      textcoords='offset points',
      va='center',
      color=theme.text,
      fontsize=10,
    )
  _finish(axes, theme, 'EM (%), with its 95 % interval', '')
  axes.set_yticks(range(len(results)), [_label(r.name) for r in results])
  axes.tick_params(axis='y', labelcolor=theme.text, length=0)
  axes.set_ylim(len(results) - 0.4, -0.6)
  top = max(result.score().em_interval[1] for result in results)
  axes.set_xlim(0, max(1.0, 1.18 * top))
  axes.grid(False, axis='y')


def _by_flops(axes, report, theme):
  are_equal = _points(
    axes, report, theme, [r.flops_formula for r in report.results]
  )
  note = '; equal ones side by side' if are_equal else ''
  _finish(axes, theme, f'FLOPs per token, by formula{note}', 'EM (%)')


def _by_size(axes, report, theme):
  are_equal = _points(
    axes, report, theme, [r.total_parameters for r in report.results]
  )
  note = '; equal ones side by side' if are_equal else ''
  _finish(axes, theme, f'parameters{note}', 'EM (%)')


def _points(axes, report, theme, values):
  """Draws a point for each model; returns whether values are nearly equal."""
  scores = [result.score() for result in report.results]
  for index, (result, score, x) in enumerate(
    zip(report.results, scores, values, strict=True)
  ):
    low, high = score.em_interval
    axes.errorbar(
      [x],
      [score.em],
      yerr=[[max(0.0, score.em - low)], [max(0.0, high - score.em)]],
      capsize=4,
      elinewidth=1.4,
      markersize=8,
      linestyle='none',
      label=_label(result.name),
      **_style(theme, index),
    )
  low, high = min(values), max(values)
  are_equal = high < 1.05 * low
  if are_equal:
    # Values that are equal on purpose would hide each other. They are drawn
    # side by side at one tick.
    step = min(0.05, 0.36 / len(values))
    for index, container in enumerate(axes.containers):
      _shift(container, (index - (len(values) - 1) / 2) * step * low)
    axes.set_xlim(0.8 * low, 1.2 * high)
    axes.set_xticks([float(f'{(low + high) / 2:.3g}')])
  else:
    axes.set_xscale('log')
    axes.set_xlim(low / 1.6, high * 1.6)
    subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  top = max(score.em_interval[1] for score in scores)
  axes.set_ylim(0, max(1.0, 1.1 * top))
  return are_equal and len(values) > 1


def _shift(container, shift):
  line, caps, bars = container.lines
  for part in (line, *caps):
    part.set_xdata(np.asarray(part.get_xdata()) + shift)
  for part in bars:
    part.set_segments([s + [[shift, 0]] for s in part.get_segments()])


def _curves(axes, report, theme):
  _lines(axes, theme, [(r.name, r.curve) for r in report.results])


def _held_out_curves(axes, report, theme):
  _lines(axes, theme, [(r.name, r.held_out_curve) for r in report.results])


def _lines(axes, theme, curves):
  for index, (name, curve) in enumerate(curves):
    known = [(step, loss) for step, loss in curve if _is_number(loss)]
    if not known:
      continue
    steps, losses = zip(*known, strict=True)
    style = _style(theme, index)
    axes.plot(
      steps,
      losses,
      linewidth=1.8,
      markersize=5,
      markevery=[len(steps) - 1],
      label=_label(name),
      **style,
    )
  _leave_out_start(axes, [curve for _, curve in curves])
  _finish(axes, theme, 'step', 'loss')
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5))


def _leave_out_start(axes, curves) -> None:
  """Cuts off the steep start of losses, which hides how the models differ."""
  last = max((curve[-1][0] for curve in curves if curve), default=0)
  losses = [
    loss
    for curve in curves
    for step, loss in curve
    if step >= 0.04 * last and _is_number(loss)
  ]
  if losses:
    margin = 0.05 * (max(losses) - min(losses)) or 0.1
    axes.set_ylim(min(losses) - margin, max(losses) + margin)


def _grid(axes, report, theme):
  """Draws a heat map with the number in each cell."""
  grid = answer_comparison.grid(report.results)
  em = np.array(
    [
      [grid.em.get((address, payload), np.nan) for payload in grid.payloads]
      for address in grid.addresses
    ]
  )
  top = max(1.0, float(np.nanmax(em)))
  colors = matplotlib.colormaps['cividis']
  axes.imshow(em, cmap=colors, vmin=0, vmax=top, aspect='auto')
  for (row, column), value in np.ndenumerate(em):
    if np.isnan(value):
      continue
    axes.annotate(
      f'{value:.1f}',
      (column, row),
      ha='center',
      va='center',
      fontsize=10.5,
      color='#ffffff' if value < 0.55 * top else '#000000',
    )
  _finish(axes, theme, 'what a row holds', 'what names a row')
  axes.set_xticks(range(len(grid.payloads)), map(_label, grid.payloads))
  axes.set_yticks(range(len(grid.addresses)), map(_label, grid.addresses))
  axes.tick_params(length=0)
  axes.grid(False)
  axes.spines[:].set_visible(False)


def _by_frequency(axes, report, theme):
  groups = answer_comparison.by_frequency(
    report.questions, report.num_bins
  ).groups
  width = 0.8 / len(report.results)
  for index, result in enumerate(report.results):
    places = np.arange(len(groups)) + (index + 0.5) * width - 0.4
    style = _style(theme, index)
    scores = [group.score(result) for group in groups]
    axes.bar(
      places,
      [score.em for score in scores],
      width=0.9 * width,
      color=style['color'],
      alpha=0.85,
      label=_label(result.name),
    )
    for place, score in zip(places, scores, strict=True):
      axes.plot(
        [place, place], score.em_interval, color=theme.text, linewidth=1.0
      )
  _finish(axes, theme, 'times the pretraining text names the entity', 'EM (%)')
  axes.set_xticks(range(len(groups)), [group.name for group in groups])
  axes.grid(False, axis='x')
  axes.set_ylim(bottom=0)


def _finish(axes: mpl_axes.Axes, theme: Theme, x: str, y: str) -> None:
  axes.set_xlabel(x, color=theme.faint, fontsize=10)
  axes.set_ylabel(y, color=theme.faint, fontsize=10)
  axes.tick_params(colors=theme.grid, labelcolor=theme.faint, labelsize=9.5)
  axes.grid(True, color=theme.grid, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(theme.grid)
  axes.patch.set_alpha(0)


def _is_number(value: float | None) -> bool:
  return value is not None and math.isfinite(value)


def _label(name: str, limit: int = 26) -> str:
  """Makes a name safe for matplotlib, which reads $...$ as mathematics."""
  name = ' '.join(name.split()).replace('$', r'\$')
  # A legend leaves out names that begin with an underscore.
  name = name if not name.startswith('_') else ' ' + name
  return name if len(name) <= limit else name[: limit - 1] + '…'


def colors(theme: Theme, number: int) -> Sequence[str]:
  """Returns the colours of so many models."""
  return [_style(theme, index)['color'] for index in range(number)]
