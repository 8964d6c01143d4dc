"""Texts cut to their first paragraphs, each after its title.

A passage of an article often does not name what the article is about ('He made
his debut ...'), and in a short window the name is missing even where the article
has it. With the title before it, what a model is asked to fill in can be known
from that name, as in the questions that follow. Passages of retrieval models have
their titles before them for the same reason (arXiv 2004.04906, section 4.1).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mowe.data.text import salient_spans


@dataclasses.dataclass(frozen=True)
class Passages:
  """How a text becomes what is read.

  Attributes:
    title_field: holds what is put before the text, and ': '. None: nothing.
    max_paragraphs: lines of the text that are kept; blank ones do not count.
      None: all.

  Raises:
    ValueError: no paragraph is kept.
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
    """The text of a record, and its salient spans.

    Spans are those of the record, or those of the rule in what is left of the
    text. The title is never masked; nor is a span that holds it: it could be
    copied.

    Args:
      record: has `field` and the title.
      field: of the text.

    Raises:
      ValueError: bad spans of the record.
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
    """Characters of the paragraphs that are kept."""
    if self.max_paragraphs is None:
      return len(text)
    position = number = 0
    for line in text.splitlines(keepends=True):
      position += len(line)
      number += bool(line.strip())
      if number == self.max_paragraphs:
        return len(text[:position].rstrip())
    return len(text)
