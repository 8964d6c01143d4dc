"""The figure of a report: loss curves, and EM against compute and size."""

import math
import os
import typing
from collections.abc import Sequence

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker

if typing.TYPE_CHECKING:
  from mowe.evaluation import report

# Okabe and Ito's colours: told apart by colour-blind readers too. Without
# their yellow, which is hard to see on white.
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00')
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
_TEXT = '#1b1f24'
_FAINT = '#59636e'


def draw(
  results: 'Sequence[report.ModelResult]', path: str | os.PathLike[str]
) -> None:
  """Writes the figure as PNG; a model has one colour in all panels.

  No pyplot: it would take a display and keep figures alive.
  """
  figure = mpl_figure.Figure(figsize=(13, 4.9), dpi=150, layout='constrained')
  figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1, wspace=0.03)
  loss, flops, parameters = figure.subplots(1, 3)
  handles = []
  for index, result in enumerate(results):
    style = {
      'color': _COLORS[index % len(_COLORS)],
      # Another number of markers than of colours: 42 models before a repeat.
      'marker': _MARKERS[index % len(_MARKERS)],
    }
    handles.append(_curve(loss, result, style))
    _point(flops, result, result.flops_per_token, style)
    _point(parameters, result, result.total_parameters, style)
  _finish(loss, 'Training loss', 'step', 'loss')
  _finish(flops, 'Exact match by compute', 'FLOPs per token', 'EM (%)')
  _finish(parameters, 'Exact match by size', 'parameters', 'EM (%)')
  loss.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  loss.xaxis.set_major_locator(ticker.MaxNLocator(5))
  _leave_out_start(loss, results)
  for panel, values in (
    (flops, [result.flops_per_token for result in results]),
    (parameters, [result.total_parameters for result in results]),
  ):
    _log_axis(panel, values)
    top = max(result.em_interval[1] for result in results)
    panel.set_ylim(0, max(1.0, 1.1 * top))
  figure.legend(
    handles=handles,
    loc='outside lower center',
    ncols=min(len(results), 4),
    frameon=False,
    labelcolor=_TEXT,
    fontsize=11,
  )
  figure.savefig(path)


def _curve(panel: mpl_axes.Axes, result, style):
  """Draws a learning curve and returns the handle for the legend."""
  steps = [step for step, _ in result.learning_curve]
  losses = [loss for _, loss in result.learning_curve]
  panel.plot(steps, losses, color=style['color'], linewidth=1.8)
  # One marker at the end ties the curve to the points of the other panels.
  panel.plot(steps[-1:], losses[-1:], markersize=7, **style)
  (handle,) = panel.plot(
    [], [], label=_label(result.name), linewidth=1.8, markersize=7, **style
  )
  return handle


def _leave_out_start(panel: mpl_axes.Axes, results) -> None:
  """Cuts the steep start off, which hides how the models differ."""
  last = max(
    (r.learning_curve[-1][0] for r in results if r.learning_curve), default=0
  )
  losses = [
    loss
    for result in results
    for step, loss in result.learning_curve
    if step >= 0.04 * last and math.isfinite(loss)
  ]
  if losses:
    margin = 0.05 * (max(losses) - min(losses)) or 0.1
    panel.set_ylim(min(losses) - margin, max(losses) + margin)


def _point(panel: mpl_axes.Axes, result, x: float, style) -> None:
  low, high = result.em_interval
  panel.errorbar(
    [x],
    [result.em],
    yerr=[[max(0.0, result.em - low)], [max(0.0, high - result.em)]],
    capsize=4,
    elinewidth=1.4,
    markersize=9,
    markeredgecolor='white',
    **style,
  )


def _log_axis(panel: mpl_axes.Axes, values: Sequence[float]) -> None:
  """A log axis with few readable ticks, also within one power of ten."""
  low = max(min(values), 1e-9)
  high = max(*values, low)
  panel.set_xscale('log')
  panel.set_xlim(low / 1.6, high * 1.6)
  subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0,)
  panel.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
  panel.xaxis.set_minor_locator(ticker.NullLocator())
  panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))


def _finish(panel: mpl_axes.Axes, title: str, x: str, y: str) -> None:
  panel.set_title(title, loc='left', color=_TEXT, fontsize=13, pad=10)
  panel.set_xlabel(x, color=_FAINT, fontsize=11)
  panel.set_ylabel(y, color=_FAINT, fontsize=11)
  panel.tick_params(colors=_FAINT, labelsize=10)
  panel.grid(True, color='#e6e9ec', linewidth=0.8)
  panel.set_axisbelow(True)
  panel.spines[['top', 'right']].set_visible(False)
  panel.spines[['left', 'bottom']].set_color('#d1d9e0')


def _label(name: str, limit: int = 40) -> str:
  """Makes a name safe for matplotlib, which reads $...$ as mathematics."""
  name = ' '.join(name.split()).replace('$', r'\$')
  # A leading underscore would hide it from the legend.
  name = name if not name.startswith('_') else ' ' + name
  return name if len(name) <= limit else name[: limit - 1] + '…'
