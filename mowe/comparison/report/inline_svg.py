"""Makes figures of matplotlib a part of a page.

Colours become variables of the page's style sheet, so that one picture serves
light and dark pages. Parts of a figure get texts that show under the pointer.
"""

import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import matplotlib
from matplotlib import figure as mpl_figure

from mowe.comparison.report import figure_colors

_REFERENCE = re.compile(r'url\(#([^)]+)\)')
_VARIABLES = {
  color: f'var(--{name})'
  for name, color in figure_colors.LIGHT.variables().items()
}
_COLOR = re.compile('|'.join(map(re.escape, _VARIABLES)))


def of_figure(
  figure: mpl_figure.Figure, name: str, texts: Mapping[str, Sequence[str]]
) -> str:
  """Returns a figure as an element `svg`, for a page in HTML.

  Args:
    figure: the figure, drawn in the colours of the light theme.
    name: begins all ids of the element, so that they are unique in the page.
    texts: the texts of the parts of the figure, by their ids (gid). A part with
      several texts is a line with as many markers.
  """
  root = ElementTree.fromstring(_svg(figure))
  for element in root.iter():
    _remove_namespaces(element)
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag in ('metadata', 'style'):
        parent.remove(child)
  for element in list(root.iter()):
    _add_texts(element, texts.get(element.get('id', ''), ()))
  _rename(root, name)
  # The page says how large a figure is, from its width.
  for size in ('width', 'height', 'version'):
    root.attrib.pop(size, None)
  text = ElementTree.tostring(root, 'unicode', short_empty_elements=False)
  return _COLOR.sub(lambda match: _VARIABLES[match[0]], text)


def _svg(figure: mpl_figure.Figure) -> bytes:
  # Letters stay letters, in the font of the page. With a fixed salt, the same
  # report gives the same file.
  with matplotlib.rc_context({'svg.hashsalt': 'mowe', 'svg.fonttype': 'none'}):
    content = io.BytesIO()
    figure.savefig(
      content, format='svg', transparent=True, metadata={'Date': None}
    )
  return content.getvalue()


def _remove_namespaces(element: ElementTree.Element) -> None:
  """Elements and attributes of HTML have none."""
  element.tag = element.tag.rpartition('}')[2]
  for key in list(element.attrib):
    if '}' in key:
      element.attrib[key.rpartition('}')[2]] = element.attrib.pop(key)


def _add_texts(element: ElementTree.Element, texts: Sequence[str]) -> None:
  if not texts:
    return
  markers = list(element.iter('use'))
  if len(texts) == 1:
    markers = [element]
  for part, text in zip(markers, texts, strict=True):
    title = ElementTree.Element('title')
    title.text = text
    part.insert(0, title)


def _rename(root: ElementTree.Element, name: str) -> None:
  """Makes the ids that are referred to unique, and removes all others."""
  used = set()
  for element in root.iter():
    for key, value in element.attrib.items():
      used.update(_REFERENCE.findall(value))
      if key == 'href':
        used.add(value.removeprefix('#'))
  for element in root.iter():
    for key, value in list(element.attrib.items()):
      if key == 'id' and value not in used:
        del element.attrib[key]
      elif key == 'id':
        element.attrib[key] = f'{name}-{value}'
      elif key == 'href':
        element.attrib[key] = f'#{name}-{value.removeprefix("#")}'
      else:
        element.attrib[key] = _REFERENCE.sub(
          lambda match: f'url(#{name}-{match[1]})', value
        )
