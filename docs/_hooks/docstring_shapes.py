"""Griffe extension: shapes in docstrings, `<int32>[batch, length]`, are code.

Docstrings write the dtype and shape of an array as the T5X family does. As
Markdown, `<int32>` would be an HTML tag, which browsers do not show.
"""

import re

import griffe

# Code spans, which stay as they are; or a word with <...> in it, such as
# checkpoint_<step>, and the shape that may follow.
_CODE_OR_SHAPE = re.compile(
  r'(?P<code>`[^`]*`)|[\w./]*<[\w.]+(?: or [\w.]+)*>(?:[\w/-]|\.(?=\w))*(?:\[[^\]]*\])?'
)


class DocstringShapes(griffe.Extension):
  """Puts backticks around dtypes and shapes in all docstrings."""

  def on_object(self, *, obj, **kwargs):
    """Changes the docstring of one object, before it is parsed."""
    del kwargs
    if obj.docstring is not None:
      text = _CODE_OR_SHAPE.sub(_as_code, obj.docstring.value)
      # Our section of what a layer maps to what; to the parser of docstrings
      # it would be a box whose title is the first line.
      obj.docstring.value = re.sub(r'^Call: ', '**Call:** ', text, flags=re.M)


def _as_code(match):
  # A shape may go on in the next line, where its entry might not.
  return match['code'] or f'`{" ".join(match[0].split())}`'
