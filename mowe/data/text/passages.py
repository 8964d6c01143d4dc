"""Cuts texts to their first paragraphs and puts the title before each.

A passage of an article often does not name what the article is about ('He made
his debut ...'), and in a short window the name is missing even if the article
has it. With the title before the passage, what a model is asked to fill in can
be known from that name, as in the questions that follow. Passages of retrieval
models have their titles before them for the same reason (arXiv 2004.04906,
section 4.1).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mowe.data.text import salient_spans


@dataclasses.dataclass(frozen=True)
class Passages:
  """How much of a text is read, and what is put before it.

  Attributes:
    title_field: name of the field of a record that holds the title, which is
      put before the text with ': ' after it; None puts nothing there.
    max_paragraphs: number of lines of the text that are kept, where blank lines
      do not count; None keeps all.

  Raises:
    ValueError: no paragraph would be kept.
  """

  title_field: str | None = None
  max_paragraphs: int | None = None

  def __post_init__(self):
    if self.max_paragraphs is not None and self.max_paragraphs < 1:
      raise ValueError(
        'At least one paragraph must be kept of each text, but max_paragraphs '
        f'is {self.max_paragraphs}. Leave it out to keep all.'
      )

  def read(
    self, record: Mapping[str, Any], field: str = 'text'
  ) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of a record and its salient spans, in characters.

    The spans are those that the record gives, or else those that the rule finds
    in what is kept of the text. Neither the title nor a span that contains it
    is ever masked, because the answer could be copied.

    Args:
      record: the record with the text and the title.
      field: name of the field that holds the text.

    Raises:
      ValueError: the record gives bad spans.
    """
    text = record[field]
    end = self._end(text)
    given = record.get('spans')
    kept = {field: text[:end], 'spans': given}
    if given is not None:
      spans = salient_spans.spans_of_record(record, field)
      kept['spans'] = [span for span in spans if span[1] <= end]
    spans = salient_spans.spans_of_record(kept, field)
    if self.title_field is None:
      return kept[field], spans
    title = record[self.title_field].strip()
    before = f'{title}: '
    return before + kept[field], [
      (start + len(before), stop + len(before))
      for start, stop in spans
      if title.casefold() not in text[start:stop].casefold()
    ]

  def _end(self, text: str) -> int:
    """Returns where the paragraphs that are kept end, in characters."""
    if self.max_paragraphs is None:
      return len(text)
    position = number = 0
    for line in text.splitlines(keepends=True):
      position += len(line)
      number += bool(line.strip())
      if number == self.max_paragraphs:
        return len(text[:position].rstrip())
    return len(text)
