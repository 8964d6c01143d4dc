"""Finds salient spans (names, numbers and dates) by a rule.

Salient span masking (Guu et al. 2020, REALM) uses a trained tagger. A rule
needs no model to be downloaded and has the same result everywhere. A record
with better spans of its own carries them in its field 'spans'.
"""

import re
from collections.abc import Sequence
from typing import Any

_MONTH = (
  r'(?:January|February|March|April|May|June|July|August|September|October'
  r'|November|December|Jan\.|Feb\.|Mar\.|Apr\.|Aug\.|Sept?\.|Oct\.|Nov\.'
  r'|Dec\.)'
)
_DAY = r'(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?'
_YEAR = r'[12]\d{3}'
_DASH = r'\s?[-–—]\s?'
# The longest forms come first, because the alternatives are tried in this order
# at each place.
_DATES = (
  rf'{_DAY}(?:{_DASH}{_DAY})? (?:of )?{_MONTH}(?:,? {_YEAR})?',
  rf'{_MONTH} {_DAY}(?:{_DASH}{_DAY})?(?:,? {_YEAR})?(?![\d,]*\d)',
  rf'{_MONTH},? {_YEAR}',
  rf'{_YEAR}{_DASH}(?:{_YEAR}|\d\d)(?!\d)',
  rf'{_YEAR}-\d\d-\d\d',
  rf'{_YEAR}s',
)
_NUMBER = r'[$£€]?\d+(?:[.,]\d+)*(?:st|nd|rd|th|%)?'
# An apostrophe joins parts of a word (O'Brien), but a possessive 's ends it.
_CAPITALISED = r"(?:[A-Z]\.)+|[^\W\d_a-z](?:[\w]|[-'’](?!s\b)\w)*"
_JOINING = r'(?:of|the|de|da|di|du|del|la|le|van|von|der|den|and the|of the)'

_DATE_PATTERN = re.compile(rf'(?<!\w)(?:{"|".join(_DATES)})(?!\w)')
_NUMBER_PATTERN = re.compile(rf'(?<![\w.,]){_NUMBER}(?!\w)')
_NAME_PATTERN = re.compile(
  rf'(?<!\w)(?:{_CAPITALISED})'
  rf'(?:(?: | {_JOINING} )(?:{_CAPITALISED}|\d+(?!\w)))*'
)
_SENTENCE_START = re.compile(r'(?:^|[.!?:;]["”’)\]]*\s+|\n\s*|["“(]\s*)$')

# Words that are capitalised because they begin a sentence or head a phrase.
_COMMON = frozenset(
  """a about after all also although among an and another any as at because
    before being between both but by despite during each either even every few
    first following for former from further he her here his how however i if in
    including instead into it its later like many more most much my near nearly
    no not now of on once one only or other our out over per second she since so
    some soon such that the their them then there these they this those three
    through thus to today together two under unlike until up upon we were what
    when where whether which while who whom whose why with within without yet
    you your was is are has have had does did do can could will would may might
    should born""".split()
)


def find_salient_spans(text: str) -> list[tuple[int, int]]:
  """Finds names, numbers and dates, as spans [start, end) of characters.

  Names are runs of capitalised words, which may have 'of', 'the', 'de' and the
  like inside. Common words at the start of a run ('The', 'In', 'However') are
  cut off. A run of one word that begins a sentence counts only if the word is
  capitalised elsewhere in the text as well, or has a capital or a digit inside.
  A date, or a range of years, is one span.

  Returns:
    Sorted spans that do not overlap.
  """
  spans = [match.span() for match in _DATE_PATTERN.finditer(text)]
  spans = _add_free(spans, _find_names(text, taken=spans))
  numbers = [match.span() for match in _NUMBER_PATTERN.finditer(text)]
  return sorted(_add_free(spans, numbers))


def spans_of_record(
  record: dict[str, Any], field: str = 'text'
) -> list[tuple[int, int]]:
  """Returns the record's own 'spans' if it has them, else those of the rule.

  Raises:
    ValueError: a given span is not [start, end] inside the text, or overlaps
      another one.
  """
  text = record[field]
  if record.get('spans') is None:
    return find_salient_spans(text)
  if not isinstance(record['spans'], list | tuple):
    raise ValueError(
      'The spans of a record must be a list of [start, end], but are '
      f'{record["spans"]!r} in {text[:60]!r}. Leave them out, and they are found '
      'by a rule.'
    )
  spans = [_check_span(span, text) for span in record['spans']]
  spans.sort()
  for before, after in zip(spans, spans[1:], strict=False):
    if after[0] < before[1]:
      raise ValueError(
        f'Spans of one record must not overlap, but {before} and {after} do '
        f'in {text[:60]!r}. Keep one of them.'
      )
  return spans


def _check_span(span: Sequence[int], text: str) -> tuple[int, int]:
  ok = (
    isinstance(span, list | tuple)
    and len(span) == 2
    and all(isinstance(bound, int) for bound in span)
    and 0 <= span[0] < span[1] <= len(text)
  )
  if not ok:
    raise ValueError(
      'A span must be [start, end] with 0 <= start < end <= the number of '
      f'characters ({len(text)}), but is {span!r} in {text[:60]!r}. Count '
      'characters, not bytes, and leave the end out.'
    )
  return tuple(span)


def _add_free(
  spans: list[tuple[int, int]], more: list[tuple[int, int]]
) -> list[tuple[int, int]]:
  """Returns `spans`, and those of `more` that overlap none of them."""
  taken = sorted(spans)
  result, position = list(taken), 0
  for start, end in sorted(more):
    while position < len(taken) and taken[position][1] <= start:
      position += 1
    if position == len(taken) or taken[position][0] >= end:
      result.append((start, end))
  return result


def _find_names(
  text: str, taken: list[tuple[int, int]]
) -> list[tuple[int, int]]:
  # Dates are blanked out, so that 'In March 1981' leaves no 'March' behind, and
  # a name before a date ends where the date begins.
  masked = text
  for start, end in taken:
    masked = masked[:start] + '\0' * (end - start) + masked[end:]
  runs = []
  for match in _NAME_PATTERN.finditer(masked):
    span = _cut_common_words(masked, *match.span())
    if span is not None:
      runs.append((*span, span[0] == match.start()))
  inside = {
    word
    for start, end, uncut in runs
    if not (uncut and _begins_sentence(masked, start))
    for word in masked[start:end].split()
  }
  names = []
  for start, end, uncut in runs:
    name = masked[start:end]
    lone = ' ' not in name and uncut and _begins_sentence(masked, start)
    if not lone or name in inside or _is_no_plain_word(name):
      names.append((start, end))
  return names


def _cut_common_words(
  text: str, start: int, end: int
) -> tuple[int, int] | None:
  """Cuts common words off the start of a run; None if nothing is left."""
  joining = frozenset(_JOINING.strip('(?:)').split('|'))
  while start < end:
    word = text[start:end].split(' ', 1)[0]
    # Within a sentence 'The' is part of a name: 'The Hague' keeps its article.
    within = word == 'The' and not _begins_sentence(text, start)
    lower = word.lower()
    if within or (lower not in _COMMON and word not in joining):
      break
    start += len(word) + 1
  return (start, end) if start < end and text[start:end] != 'The' else None


def _begins_sentence(text: str, start: int) -> bool:
  return _SENTENCE_START.search(text[max(0, start - 8) : start]) is not None


def _is_no_plain_word(name: str) -> bool:
  return any(c.isupper() or c.isdigit() for c in name[1:])
