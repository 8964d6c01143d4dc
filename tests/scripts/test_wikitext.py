"""Tests text in the form of WikiText, by hand."""

import pytest
import wikitext


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('A 1,500-ton ship.', 'A 1 @,@ 500 @-@ ton ship .'),
    ('3.5 m (wide); 1914–1918', '3 @.@ 5 m ( wide ) ; 1914 – 1918'),
    ("It wasn't J. Smith's.", "It wasn 't J. Smith 's ."),
    ('"No. 5", he said...', '" No. 5 " , he said ...'),
    ("the dogs' U.S. house", "the dogs ' U.S. house"),
    ('It is in the U.S.', 'It is in the U.S .'),
    ('a@b -- <unk>', 'a @ b -- <unk>'),
    ('', ''),
  ],
)
def test_tokens(text, expected):
  assert ' '.join(wikitext.tokens(text)) == expected


def test_an_article_and_its_rare_words():
  lines = list(wikitext.article('The cat', 'A cat sat.\n\nThe cat slept.'))
  assert lines == [
    [],
    ['=', 'The', 'cat', '='],
    [],
    ['A', 'cat', 'sat', '.'],
    ['The', 'cat', 'slept', '.'],
  ]
  # cat occurs 3 times, and `.`, = and The twice. Of the words that occur once,
  # A is first in the alphabet.
  known = wikitext.frequent_words(lines, 5)
  assert known == {'cat', '.', '=', 'The', 'A'}
  assert wikitext.masked(lines[3], known) == ' A cat <unk> . '
  assert wikitext.masked([], known) == ' '
