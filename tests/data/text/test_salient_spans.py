"""Tests the rules of salient spans on a sentence for each case."""

import hypothesis
import pytest
from hypothesis import strategies

from mowe.data.text import salient_spans


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    # A whole date is one span, and its month and year are no spans besides.
    ('She died on 5 March 1981.', ['5 March 1981']),
    ('It was March 5, 1981 then.', ['March 5, 1981']),
    ('It began in May 2001 or in 1981.', ['May 2001', '1981']),
    ('at war 1914–1918, again 2019-20', ['1914–1918', '2019-20']),
    ('popular in the 1990s', ['1990s']),
    # Numbers are spans with their signs and units.
    ('he paid $1,200.50 for 3.5% of 18th', ['$1,200.50', '3.5%', '18th']),
    # Names may have small words inside, initials, apostrophes and hyphens.
    ('the University of Oxford won', ['University of Oxford']),
    ('with Ludwig van Beethoven', ['Ludwig van Beethoven']),
    ('by J. R. R. Tolkien there', ['J. R. R. Tolkien']),
    ("the O'Brien house of Smith's", ["O'Brien", 'Smith']),
    ('the Kristin Scott-Thomas film', ['Kristin Scott-Thomas']),
    ('Émile Zola wrote', ['Émile Zola']),
    # A small word at the end is not part of a name.
    ('went to Paris of all places', ['Paris']),
    # A common word at the start of a sentence is no name, nor part of one.
    ('The cat sat. It slept.', []),
    ('However, Paris fell. In Rome they sang.', ['Paris', 'Rome']),
    ('Everything changed.', []),
    # A single first word is a name if it is one elsewhere, or is no plain word.
    ('Paris fell. Then came Paris.', ['Paris', 'Paris']),
    ('McDonald left.', ['McDonald']),
    ('he moved to The Hague', ['The Hague']),
    ('', []),
  ],
)
def test_rule(text, expected):
  spans = salient_spans.find_salient_spans(text)
  assert [text[start:end] for start, end in spans] == expected


@hypothesis.given(
  strategies.lists(
    strategies.sampled_from(
      ['The', 'of', 'Paris', '5', 'March', '1981', '.', ',', '\n', '–', 'a b']
    ),
    max_size=20,
  )
)
def test_spans_are_sorted_inside_and_apart(words):
  text = ' '.join(words)
  end = 0
  for span in salient_spans.find_salient_spans(text):
    assert end <= span[0] < span[1] <= len(text)
    assert text[span[0] : span[1]].strip() == text[span[0] : span[1]]
    end = span[1]


def test_spans_of_the_record_replace_the_rule():
  record = {'text': 'Paris fell in 1981', 'spans': [[6, 10], [0, 5]]}
  assert salient_spans.spans_of_record(record) == [(0, 5), (6, 10)]
  assert salient_spans.spans_of_record({**record, 'spans': []}) == []
  by_rule = salient_spans.spans_of_record({**record, 'spans': None})
  assert by_rule == [(14, 18)]


@pytest.mark.parametrize(
  'span', [[3, 3], [0, 99], [-1, 2], [1], 'ab', [0, 1.5]]
)
def test_bad_spans_are_refused(span):
  with pytest.raises(ValueError, match='Count characters, not bytes'):
    salient_spans.spans_of_record({'text': 'Paris', 'spans': [span]})


def test_overlapping_spans_are_refused():
  with pytest.raises(ValueError, match='must not overlap'):
    salient_spans.spans_of_record({'text': 'Paris', 'spans': [[0, 3], [2, 5]]})
