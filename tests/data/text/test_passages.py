"""Tests the first paragraphs of texts after their titles, and their spans."""

import json

import pytest

from mowe.commands import cache_task
from mowe.data.text import passages
from mowe.words import subword_vocabularies

RECORD = {
  'title': 'Ada Vernik',
  'text': 'Ada Vernik (born 4 May 1901) was a sculptor.\n\nAda Vernik'
  ' lived in Gdynia. In 1930 she left.\nShe died in Lviv.',
}


def masked(cut, record=RECORD):
  text, spans = cut.read(record)
  return text, [text[start:end] for start, end in spans]


def test_a_text_stays_as_it_is_by_default():
  text, spans = masked(passages.Passages())
  assert text == RECORD['text']
  assert spans == [
    'Ada Vernik', '4 May 1901', 'Ada Vernik', 'Gdynia', '1930', 'Lviv'
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('number', 'end', 'spans'),
  [
    (1, 'a sculptor.', ['4 May 1901']),
    (2, 'she left.', ['4 May 1901', 'Gdynia', '1930']),
    (3, 'in Lviv.', ['4 May 1901', 'Gdynia', '1930', 'Lviv']),
    (9, 'in Lviv.', ['4 May 1901', 'Gdynia', '1930', 'Lviv']),
  ],
)
def test_paragraphs_follow_the_title_which_is_not_masked(number, end, spans):
  text, found = masked(passages.Passages('title', number))
  assert text.startswith('Ada Vernik: Ada Vernik (born') and text.endswith(end)
  assert found == spans


def test_spans_of_a_record_are_kept_where_the_text_is():
  spans = [
    [33, 43],
    [0, 10],
    [len(RECORD['text']) - 5, len(RECORD['text']) - 1],
  ]
  record = {**RECORD, 'spans': spans}
  text, found = masked(passages.Passages(max_paragraphs=1), record)
  assert found == ['Ada Vernik', 'a sculptor'] and text.endswith('sculptor.')
  assert masked(passages.Passages('title'), record)[1] == ['a sculptor', 'Lviv']


def test_a_cache_holds_passages(tmp_path):
  file = tmp_path / 'texts.jsonl'
  file.write_text(json.dumps(RECORD) + '\n')
  vocabulary = subword_vocabularies.load_subwords('bytes')
  cut = passages.Passages('title', 1)
  source = cache_task.TextFiles([str(file)], cut=cut)
  cache = cache_task.cache_task(tmp_path / 'cache', 'bytes', source)
  text = vocabulary.decode(cache.tokens('targets', 0))
  assert text == cut.read(RECORD)[0]
  ((start, end),) = cache.spans(0)
  assert (
    vocabulary.decode(cache.tokens('targets', 0)[start:end]) == '4 May 1901'
  )
  with pytest.raises(ValueError, match='made from other things|other'):
    source = cache_task.TextFiles([str(file)])
    cache_task.cache_task(tmp_path / 'cache', 'bytes', source)


def test_bad_input(tmp_path):
  with pytest.raises(ValueError, match='At least one paragraph must be kept'):
    passages.Passages(max_paragraphs=0)
  file = tmp_path / 'texts.jsonl'
  file.write_text(json.dumps({'text': 'Ada lived in Gdynia.'}) + '\n')
  source = cache_task.TextFiles([str(file)], cut=passages.Passages('title'))
  with pytest.raises(ValueError, match="'title'"):
    cache_task.cache_task(tmp_path / 'a', 'bytes', source)
