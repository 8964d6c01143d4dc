"""Draws the figures of a report: as SVG for its page, and as one PNG."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib import artist as mpl_artist
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import patches, ticker

from mowe.comparison.report import (
  answer_comparison,
  figure_colors,
  inline_svg,
  report_contents,
  table_cells,
)

# With more models, the bars of a group would be too thin. The table of the same
# numbers has them all.
_MOST_IN_GROUPS = 10
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
_DASHES = ('-', '--', ':', '-.')


@dataclasses.dataclass(frozen=True)
class Figure:
  """One figure of the page.

  Attributes:
    title: what the figure shows.
    svg: an element `svg`, whose parts show their numbers under the pointer.
    data: all numbers of the figure in words, for those who do not see it.
    is_tall: whether it is higher than others.
  """

  title: str
  svg: str
  data: str
  is_tall: bool


class _Drawing:
  """One panel: where it is drawn, what of, and what its parts tell.

  Attributes:
    axes: what it is drawn on.
    report: the report that it is part of.
    colors: the colours of the page.
    texts: the texts of parts, by the ids that they have in the SVG file. Each
      marker of a line has one.
  """

  def __init__(
    self,
    axes: mpl_axes.Axes,
    report: report_contents.Report,
    colors: figure_colors.Theme,
  ):
    self.axes = axes
    self.report = report
    self.colors = colors
    self.texts: dict[str, Sequence[str]] = {}

  def tell(self, artist: mpl_artist.Artist, *texts: str) -> None:
    """Shows texts under the pointer."""
    name = f'part-{len(self.texts)}'
    artist.set_gid(name)
    self.texts[name] = texts


@dataclasses.dataclass(frozen=True)
class _Panel:
  """A kind of figure.

  Attributes:
    title: what it shows.
    draw: draws it.
    height: its height in inches, where all are 4.5 wide.
  """

  title: str
  draw: Callable[[_Drawing], None]
  height: float = 3.3


def page_figures(report: report_contents.Report) -> list[Figure]:
  """Draws each panel as its own figure, so that rows of them fit the page."""
  return [
    _figure(panel, report, f'figure-{number}')
    for number, panel in enumerate(_panels(report))
  ]


def model_mark(index: int) -> str:
  """Returns an element `svg` with the marker and the colour of a model."""
  figure = mpl_figure.Figure(figsize=(0.2, 0.2))
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set_axis_off()
  axes.plot([0], [0], markersize=9, **_style(figure_colors.LIGHT, index))
  return inline_svg.of_figure(figure, f'mark-{index}', {})


def _figure(panel: _Panel, report, name: str) -> Figure:
  figure = mpl_figure.Figure(figsize=(4.5, panel.height), layout='constrained')
  drawing = _Drawing(figure.subplots(), report, figure_colors.LIGHT)
  panel.draw(drawing)
  # Of a line, the last value stands for all.
  told = [texts[-1] for texts in drawing.texts.values() if texts]
  return Figure(
    panel.title,
    inline_svg.of_figure(figure, name, drawing.texts),
    '; '.join(told),
    panel.height > 4,
  )


def write_png(
  report: report_contents.Report, path: str | os.PathLike[str]
) -> None:
  """Writes all panels as one picture.

  pyplot is not used, because it would need a display and keep figures alive.
  """
  colors = figure_colors.LIGHT
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
  for axes, panel in zip(all_axes, panels, strict=False):
    axes.set_visible(True)
    panel.draw(_Drawing(axes, report, colors))
    axes.set_title(
      panel.title, loc='left', color=colors.text, fontsize=12, pad=10
    )
  # The legend is that of the second panel, whose points have markers; the bars
  # of the first have none.
  handles, labels = figure.axes[1].get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc='outside lower center',
    ncols=min(len(labels), 5),
    frameon=False,
    labelcolor=colors.text,
    fontsize=11,
  )
  figure.savefig(path, facecolor=colors.page)


def _panels(report) -> list[_Panel]:
  results = report.results
  bars = max(3.3, 0.7 + 0.24 * len(results))
  panels = [_Panel('Exact match', _scores, bars)]
  # At equal FLOPs the models would stand above each other.
  if not _are_equal([result.flops_formula for result in results]):
    panels.append(_Panel('EM by compute', _by_flops))
  panels.append(_Panel('EM by size', _by_size))
  if all(result.seconds for result in results):
    panels.append(_Panel('EM by time of training', _by_time))
  if any(result.curve for result in results):
    panels.append(_Panel('Training loss', _curves))
  if any(result.held_out_curve for result in results):
    panels.append(_Panel('Loss on held-out text', _held_out_curves))
  if len(answer_comparison.grid(results).em) > 1:
    panels.append(_Panel('EM by address and payload', _grid))
  frequency = answer_comparison.by_frequency(report.questions, report.num_bins)
  if len(frequency.groups) > 1 and len(results) <= _MOST_IN_GROUPS:
    panels.append(_Panel('EM by frequency of the entity', _by_frequency))
  return panels


def _are_equal(values: Sequence[float]) -> bool:
  return max(values) < 1.05 * min(values)


def _style(theme: figure_colors.Theme, index: int) -> dict[str, str]:
  return {
    'color': theme.models[index % len(theme.models)],
    # There are 7 markers and 8 colours, so that no two of 56 models look alike.
    'marker': _MARKERS[index % len(_MARKERS)],
  }


def _scores(drawing: _Drawing) -> None:
  """Draws a bar with its interval for each model."""
  axes, results = drawing.axes, drawing.report.results
  for place, result in enumerate(results):
    score = result.score()
    low, high = score.em_interval
    color = _style(drawing.colors, place)['color']
    (bar,) = axes.barh(place, score.em, height=0.62, color=color)
    drawing.tell(bar, _in_words(result))
    axes.plot(
      [low, high], [place, place], color=drawing.colors.text, linewidth=1.4
    )
    axes.annotate(
      f'{score.em:.1f}',
      (max(high, score.em), place),
      xytext=(6, 0),
      textcoords='offset points',
      va='center',
      color=drawing.colors.text,
      fontsize=10,
    )
  _finish(drawing, 'EM (%), with its 95 % interval', '')
  axes.set_yticks(range(len(results)), [_label(r.name) for r in results])
  axes.tick_params(axis='y', labelcolor=drawing.colors.text, length=0)
  axes.set_ylim(len(results) - 0.4, -0.6)
  top = max(result.score().em_interval[1] for result in results)
  axes.set_xlim(0, max(1.0, 1.18 * top))
  axes.grid(False, axis='y')


def _in_words(result: answer_comparison.ModelResult) -> str:
  score = result.score()
  ends = table_cells.interval(score.em_interval)
  return f'{result.name}: EM {score.em:.1f} ({ends})'


def _by_flops(drawing: _Drawing) -> None:
  _points(
    drawing,
    [result.flops_formula for result in drawing.report.results],
    'FLOPs per token, by formula',
    lambda flops: f'{table_cells.count(flops)} FLOPs per token',
  )


def _by_size(drawing: _Drawing) -> None:
  _points(
    drawing,
    [result.total_parameters for result in drawing.report.results],
    'parameters',
    lambda number: f'{table_cells.count(number)} parameters',
  )


def _by_time(drawing: _Drawing) -> None:
  _points(
    drawing,
    [result.seconds / 60 for result in drawing.report.results],
    'minutes of training, on the machine that ran it',
    lambda minutes: table_cells.duration(60 * minutes),
  )


def _points(
  drawing: _Drawing,
  values: Sequence[float],
  label: str,
  write: Callable[[float], str],
) -> None:
  """Draws a point with its interval for each model."""
  axes, results = drawing.axes, drawing.report.results
  for index, (result, x) in enumerate(zip(results, values, strict=True)):
    score = result.score()
    low, high = score.em_interval
    style = _style(drawing.colors, index)
    axes.plot([x, x], [low, high], color=style['color'], linewidth=1.4)
    (point,) = axes.plot(
      [x],
      [score.em],
      markersize=8,
      linestyle='none',
      label=_label(result.name),
      **style,
    )
    drawing.tell(point, f'{_in_words(result)}, {write(x)}')
  low, high = min(values), max(values)
  axes.set_xscale('log')
  axes.set_xlim(low / 1.6, high * 1.6)
  subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0,)
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  top = max(result.score().em_interval[1] for result in results)
  axes.set_ylim(0, max(1.0, 1.1 * top))
  _finish(drawing, label, 'EM (%)')


def _curves(drawing: _Drawing) -> None:
  results = drawing.report.results
  _lines(drawing, [(result.name, result.curve) for result in results])


def _held_out_curves(drawing: _Drawing) -> None:
  results = drawing.report.results
  _lines(drawing, [(result.name, result.held_out_curve) for result in results])


def _lines(drawing: _Drawing, curves) -> None:
  axes = drawing.axes
  low, high = _range_after_start([curve for _, curve in curves])
  for index, (name, curve) in enumerate(curves):
    known = [(step, loss) for step, loss in curve if _is_number(loss)]
    if not known:
      continue
    shown = [i for i, (_, loss) in enumerate(known) if low <= loss <= high]
    steps, losses = zip(*known, strict=True)
    repeat = index // len(drawing.colors.models) % len(_DASHES)
    (line,) = axes.plot(
      steps,
      losses,
      linewidth=1.6,
      linestyle=_DASHES[repeat],
      markersize=3.5,
      markevery=shown,
      label=_label(name),
      **_style(drawing.colors, index),
    )
    drawing.tell(
      line, *(f'{name}, step {steps[i]:,}: loss {losses[i]:.3f}' for i in shown)
    )
  axes.set_ylim(low, high)
  _finish(drawing, 'step', 'loss')
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5))


def _range_after_start(curves) -> tuple[float, float]:
  """The losses without the steep start, which hides how models differ."""
  last = max((curve[-1][0] for curve in curves if curve), default=0)
  losses = [
    loss
    for curve in curves
    for step, loss in curve
    if step >= 0.04 * last and _is_number(loss)
  ]
  if not losses:
    return 0.0, 1.0
  margin = 0.05 * (max(losses) - min(losses)) or 0.1
  return min(losses) - margin, max(losses) + margin


def _grid(drawing: _Drawing) -> None:
  """Draws a heat map with the number in each cell."""
  axes, grid = drawing.axes, answer_comparison.grid(drawing.report.results)
  top = max(1.0, *grid.em.values())
  colors = matplotlib.colormaps['cividis']
  for (address, payload), em in grid.em.items():
    place = grid.payloads.index(payload), grid.addresses.index(address)
    cell = patches.Rectangle(
      (place[0] - 0.5, place[1] - 0.5), 1, 1, color=colors(em / top)
    )
    axes.add_patch(cell)
    drawing.tell(cell, f'{address}, {payload}: EM {em:.1f}')
    axes.annotate(
      f'{em:.1f}',
      place,
      ha='center',
      va='center',
      fontsize=10.5,
      color='white' if em < 0.55 * top else 'black',
    )
  _finish(drawing, 'what a row holds', 'what names a row')
  axes.set_xlim(-0.5, len(grid.payloads) - 0.5)
  axes.set_ylim(len(grid.addresses) - 0.5, -0.5)
  axes.set_xticks(range(len(grid.payloads)), map(_label, grid.payloads))
  axes.set_yticks(range(len(grid.addresses)), map(_label, grid.addresses))
  axes.tick_params(length=0)
  axes.grid(False)
  axes.spines[:].set_visible(False)


def _by_frequency(drawing: _Drawing) -> None:
  axes, report = drawing.axes, drawing.report
  groups = answer_comparison.by_frequency(
    report.questions, report.num_bins
  ).groups
  width = 0.8 / len(report.results)
  for index, result in enumerate(report.results):
    places = np.arange(len(groups)) + (index + 0.5) * width - 0.4
    color = _style(drawing.colors, index)['color']
    for group, place in zip(groups, places, strict=True):
      score = group.score(result)
      (bar,) = axes.bar(place, score.em, width=0.9 * width, color=color)
      ends = table_cells.interval(score.em_interval)
      drawing.tell(
        bar, f'{result.name}, named {group.name}: EM {score.em:.1f} ({ends})'
      )
      axes.plot(
        [place, place],
        score.em_interval,
        color=drawing.colors.text,
        linewidth=1.0,
      )
  _finish(drawing, 'times the pretraining text names the entity', 'EM (%)')
  axes.set_xticks(range(len(groups)), [group.name for group in groups])
  axes.grid(False, axis='x')
  axes.set_ylim(bottom=0)


def _finish(drawing: _Drawing, x: str, y: str) -> None:
  axes, colors = drawing.axes, drawing.colors
  axes.set_xlabel(x, color=colors.faint, fontsize=10)
  axes.set_ylabel(y, color=colors.faint, fontsize=10)
  axes.tick_params(colors=colors.grid, labelcolor=colors.faint, labelsize=9.5)
  axes.grid(True, color=colors.grid, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(colors.grid)
  axes.patch.set_alpha(0)


def _is_number(value: float | None) -> bool:
  return value is not None and math.isfinite(value)


def _label(name: str, limit: int = 26) -> str:
  """Makes a name safe for matplotlib, which reads $...$ as mathematics."""
  name = ' '.join(name.split()).replace('$', r'\$')
  # A legend leaves out names that begin with an underscore.
  name = name if not name.startswith('_') else ' ' + name
  return name if len(name) <= limit else name[: limit - 1] + '…'
