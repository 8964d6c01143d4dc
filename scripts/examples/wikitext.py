"""Writes text in the form of WikiText: spaced tokens, rare words masked.

A model trained on natural text meets `@-@`, ` , ` and `<unk>` only when it is
tested on WikiText-2 or -103, and most of its loss is then the form. So text of
the same kind is brought into that form before training.

Source: Merity et al. 2016 (arXiv 1609.07843), section 4.3, and the look of the
published files; their own tokenizer (Moses) is followed in its main rules only.
"""

import collections
import re
from collections.abc import Iterable, Iterator

UNKNOWN = '<unk>'

# Marks within a word or number; @ says that there was no space.
_JOINTS = re.compile(r'(?<=\w)-(?=\w)|(?<=\d)[,.](?=\d)')
# Two @ with a mark between them are such a joint.
_MARKS = re.compile(r"(@.@|\.\.\.|-+|[^\w\s.'<>-])")
_CLITIC = re.compile(r"(?<=\w)('(?:s|t|re|ve|d|ll|m)\b|'(?!\w))|(?<!\w)(')")
# A full stop ends a sentence unless one of these comes before it.
_ABBREVIATION = re.compile(
  r'(?:[A-Za-z]|No|Nos|St|Mr|Mrs|Ms|Dr|Col|Gen|Lt|Sgt|Capt|Jr|Sr|vs|etc|Prof)'
  r'|.*\..*'
)


def tokens(text: str) -> list[str]:
  """Returns the words and marks of one line of text.

  >>> tokens("Its 1,500-ton hull, 3.5 m wide, wasn't J. Smith's.")
  ['Its', '1', '@,@', '500', '@-@', 'ton', 'hull', ',', '3', '@.@', '5', 'm',
   'wide', ',', 'wasn', "'t", 'J.', 'Smith', "'s", '.']
  """
  text = _JOINTS.sub(lambda found: f' @{found.group()}@ ', text)
  text = _MARKS.sub(r' \1 ', text)
  text = _CLITIC.sub(lambda found: f' {found.group().strip()} ', text)
  result = []
  for word in text.split():
    stem = word[:-1]
    if word.endswith('.') and stem.strip('.'):
      if not _ABBREVIATION.fullmatch(stem):
        result += [stem, '.']
        continue
    result.append(word)
  # At the end of a line, a stop after an abbreviation ends a sentence as well.
  if result and len(result[-1]) > 1 and result[-1].endswith('.'):
    if result[-1].strip('.'):
      result[-1:] = [result[-1][:-1], '.']
  return result


def article(title: str, text: str) -> Iterator[list[str]]:
  """Yields the lines of an article: its title between marks, its paragraphs."""
  yield []
  yield ['=', *tokens(title), '=']
  yield []
  for paragraph in text.splitlines():
    if paragraph.strip():
      yield tokens(paragraph)


def frequent_words(lines: Iterable[list[str]], size: int) -> frozenset[str]:
  """Returns the `size` most frequent words; ties in alphabetical order."""
  counts = collections.Counter(word for line in lines for word in line)
  ranked = sorted(counts, key=lambda word: (-counts[word], word))
  return frozenset(ranked[:size])


def masked(line: list[str], known: frozenset[str]) -> str:
  """Returns a line as text, spaced at both ends, `<unk>` for other words."""
  words = (word if word in known else UNKNOWN for word in line)
  return ' ' + ''.join(f'{word} ' for word in words)
