"""Figures in a page must keep their ids to themselves, and tell their texts."""

from matplotlib import figure

from mowe.comparison.report import figure_colors, inline_svg


def test_a_figure_becomes_a_part_of_a_page():
  drawn = figure.Figure(figsize=(2, 1))
  axes = drawn.subplots()
  color = figure_colors.LIGHT.models[1]
  (line,) = axes.plot([0, 1, 2], [3, 5, 4], marker='o', color=color, gid='a')
  (bar,) = axes.barh(1, 2, color='#123456')
  bar.set_gid('b')
  texts = {'a': ('first', 'second', 'th<i>rd'), 'b': ('the bar',)}
  svg = inline_svg.of_figure(drawn, 'page-1', texts)
  assert svg.startswith('<svg ') and 'xmlns' not in svg and '<style' not in svg
  assert color not in svg and 'var(--model-1)' in svg and '#123456' in svg
  for text in ('first', 'second', 'th&lt;i&gt;rd', 'the bar'):
    assert svg.count(f'<title>{text}</title>') == 1
  assert ' id="page-1-' in svg and svg.count(' id="') == svg.count(
    ' id="page-1-'
  )
  assert line.get_gid() not in ('', None)
  assert svg == inline_svg.of_figure(drawn, 'page-1', texts)
