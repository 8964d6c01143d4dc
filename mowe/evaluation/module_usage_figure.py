"""Draws how often each module of each layer is used."""

import os

import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import colors as mpl_colors
from matplotlib import figure as mpl_figure
from matplotlib import ticker

from mowe.evaluation import module_usage

_TEXT = '#1b1f24'
_FAINT = '#59636e'
_BAR = '#0072B2'
_COLORS = mpl_colors.LinearSegmentedColormap.from_list(
  'usage', ['#ffffff', '#cfe6f5', '#56b4e9', '#0072b2', '#023858']
)
# With at most this many modules in a layer, each cell shows its number.
_MOST_WRITTEN = 16
# With at most this many layers, the rows of cells are high.
_MOST_WIDE = 12
# Color of the cells of a layer that has fewer modules than others.
_ABSENT = '#eef1f4'


def draw(usage: module_usage.Usage, path: str | os.PathLike[str]) -> None:
  """Writes the figure to `path`, with a row of panels for each kind of layer.

  The left panel shows the share of tokens that chose each module, the right one
  the effective number of modules of each layer.
  """
  groups: dict[str, list[str]] = {}
  for place in usage.layers:
    stream, _, name = place.split('/')
    groups.setdefault(f'{stream}, {name.replace("_", " ")}', []).append(place)
  heights = [
    (0.42 if len(places) <= _MOST_WIDE else 0.28) * len(places) + 1.3
    for places in groups.values()
  ]
  figure = mpl_figure.Figure(
    figsize=(11, sum(heights) + 0.6), dpi=150, layout='constrained'
  )
  figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
  figure.suptitle(
    f'Modules that tokens choose: {_plain(usage.task)}',
    x=0.015, ha='left', color=_TEXT, fontsize=14,
  )  # fmt: skip
  panels = figure.subplots(
    len(groups), 2, squeeze=False, height_ratios=heights, width_ratios=[3, 1]
  )
  for (title, places), (shares, effective) in zip(
    groups.items(), panels, strict=True
  ):
    layers = [usage.layers[place] for place in places]
    labels = [place.split('/')[1].removeprefix('layers_') for place in places]
    _heat(figure, shares, layers, labels)
    _bars(effective, layers, labels)
    shares.set_title(title, loc='left', color=_TEXT, fontsize=12, pad=8)
    effective.set_title(
      'modules in use (effective)',
      loc='left', color=_TEXT, fontsize=11, pad=8,
    )  # fmt: skip
  figure.savefig(path)


def _heat(figure, panel: mpl_axes.Axes, layers, labels) -> None:
  """Draws a cell for each module; layers may differ in their numbers."""
  most = max(len(layer.counts) for layer in layers)
  cells = np.full((len(layers), most), np.nan)
  for row, layer in enumerate(layers):
    cells[row, : len(layer.counts)] = np.asarray(layer.shares) * 100
  top = max(float(np.nanmax(cells)), 1e-9)
  panel.set_facecolor(_ABSENT)
  image = panel.pcolormesh(
    np.ma.masked_invalid(cells),
    cmap=_COLORS, vmin=0, vmax=top, edgecolors='#e6e9ec', linewidth=0.6,
  )  # fmt: skip
  if most <= _MOST_WRITTEN:
    for (row, module), share in np.ndenumerate(cells):
      if np.isfinite(share):
        panel.text(
          module + 0.5, row + 0.5, f'{share:.2g}' if share < 10 else f'{share:.0f}',
          ha='center', va='center', fontsize=8,
          color='white' if share > 0.55 * top else _TEXT,
        )  # fmt: skip
  _rows(panel, labels)
  step = max(1, -(-most // 32))
  panel.set_xticks(np.arange(0, most, step) + 0.5, range(0, most, step))
  panel.set_xlabel('module', color=_FAINT, fontsize=10)
  panel.spines[:].set_visible(False)
  bar = figure.colorbar(image, ax=panel, pad=0.01, fraction=0.03)
  bar.outline.set_visible(False)
  bar.ax.tick_params(colors=_FAINT, labelsize=9, length=0)
  bar.ax.yaxis.set_major_locator(ticker.MaxNLocator(4))
  bar.ax.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g %%'))
  bar.set_label('of the tokens', color=_FAINT, fontsize=9)


def _bars(panel: mpl_axes.Axes, layers, labels) -> None:
  """Draws how many modules each layer uses, out of those that it has."""
  places = np.arange(len(layers)) + 0.5
  numbers = [len(layer.counts) for layer in layers]
  used = [layer.num_effective for layer in layers]
  panel.barh(places, numbers, height=0.62, color=_ABSENT)
  panel.barh(places, used, height=0.62, color=_BAR)
  for place, value, number in zip(places, used, numbers, strict=True):
    panel.text(
      max(numbers) * 1.04, place, f'{value:.1f} of {number}',
      va='center', fontsize=9, color=_TEXT,
    )  # fmt: skip
  panel.set_xlim(0, max(numbers) * 1.5)
  _rows(panel, labels)
  panel.set_xticks([])
  panel.spines[:].set_visible(False)


def _rows(panel: mpl_axes.Axes, labels) -> None:
  """Labels the rows, one for each layer, from the top down."""
  panel.set_ylim(len(labels), 0)
  panel.set_yticks(np.arange(len(labels)) + 0.5, labels)
  panel.set_ylabel('block', color=_FAINT, fontsize=10)
  panel.tick_params(colors=_FAINT, labelsize=9, length=0)


def _plain(name: str, limit: int = 60) -> str:
  """Shortens a name, and escapes `$`, which would begin a formula."""
  name = ' '.join(name.split()).replace('$', r'\$')
  return name if len(name) <= limit else name[: limit - 1] + '…'
