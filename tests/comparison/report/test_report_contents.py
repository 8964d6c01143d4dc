"""Reports must show every number, and no text may break out of its place.

Also tests `report_figure`, `report_files`, `report_page`, and `report_tables`.
"""

import dataclasses
import html.parser
import json

import made_up_answers
import pytest

from mowe.comparison.report import (
  answer_comparison,
  report_files,
  report_tables,
)


class _Tags(html.parser.HTMLParser):
  """Collects the tags, attributes and text of a page."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.text, self.sources = [], [], []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.sources += [v for name, v in attrs if name in ('src', 'href')]

  def handle_data(self, data):
    self.text.append(data)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('report')
  made = report_files.write_report(made_up_answers.whole_report(), path)
  assert made == path / 'index.html'
  return path


@pytest.fixture(scope='module')
def page(folder):
  return (folder / 'index.html').read_text('utf-8')


@pytest.fixture(scope='module')
def markdown(folder):
  return (folder / 'report.md').read_text('utf-8')


@pytest.mark.slow
def test_the_page_escapes_every_text(page):
  tags = _Tags(page)
  assert not {'script', 'b', 'i', 'u', 'link', 'more'} & set(tags.tags)
  text = ' '.join(tags.text)
  for part in (
    '<h1> of models', made_up_answers.HOSTILE, 'Who <b>wrote</b> it?',
    '<i>4</i>', 'wrong <u>4</u>', '24 questions & <more>.',
  ):  # fmt: skip
    assert part in text, part


def test_the_page_needs_nothing_else(page):
  sources = _Tags(page).sources
  # Each figure is there once for the light and once for the dark theme.
  assert len(sources) == 2 * 6
  for source in sources:
    assert source.startswith('data:image/svg+xml;base64,')
    page = page.replace(source, '')
  assert 'prefers-color-scheme: dark' in page and 'width=device-width' in page
  assert 'http' not in page and '@import' not in page


def test_all_numbers_are_in_page_and_markdown(page, markdown):
  page = ' '.join(_Tags(page).text)
  numbers = '77M 76.5M 430M 154M 161M 12.3K 171M 2.125 1.875'
  for number in numbers.split() + [
    '7: 12.5, 8: 20.8', '1.50 GiB', '1h 00m', '42 s', '75.0 (40)', '12.5 %',
    'EXPERT\\_DIM = 96 for the FLOPs',
  ]:  # fmt: skip
    assert number in markdown, number
    assert number.replace('\\', '') in page, number
  assert '≥ 171M' in page and '≥ 161M' not in page


def test_what_is_not_known_is_said_to_be_so(page, markdown):
  (line,) = [
    row for row in markdown.splitlines() if row.startswith('| dense | 16.7')
  ]
  assert line.endswith('| n/a | n/a | n/a |')
  questions = [
    dataclasses.replace(question, entity_count=None, relation=None)
    for question in made_up_answers.questions()
  ]
  made = made_up_answers.whole_report(questions=questions)
  text = report_tables.markdown(made, report_tables.tables(made), [], 'x.png')
  assert "n/a: questions have no field 'entity', or the text is not" in text
  assert "n/a: questions have no field 'relation'." in text
  # One question has no known entity.
  assert 'Of 1 questions it is not known' in markdown


def test_models_are_compared_on_the_same_questions(markdown):
  table = markdown[markdown.index('## Against dense') :]
  row = table.splitlines()[4]
  # One model has 16 right and the other 4, of 24: it is better on questions 4
  # to 18, and worse on 1 and 2.
  assert '| +50.0 |' in row and row.endswith('| 15 | 2 | 0.0023 |'), row


def test_each_model_is_compared_with_each():
  dense, sparse = made_up_answers.results()
  third = dataclasses.replace(dense, name='third')
  made = made_up_answers.whole_report(results=[dense, sparse, third])
  (table,) = [
    table
    for table in report_tables.tables(made)
    if table.title.startswith('Each against each')
  ]
  assert table.rows[0][1] == 'less dense' and table.rows[3][0] == 'third'
  assert table.rows[1][2] == '-50.0 (p 0.0023)'
  assert table.rows[2][1] == '+50.0 (p 0.0023)'
  assert table.rows[3][1:] == ['+0.0 (p 1)', '-50.0 (p 0.0023)', '']


def test_memories_stand_in_a_grid(markdown):
  memories = markdown[markdown.index('## Memories') :].splitlines()
  row = '66.7 | 3.2 | 75.0 | 12.5 | 1.875 | 4.125 | 1.75 | 21.5K | 640 |'
  assert memories[4].endswith(row), memories[4]
  dense, sparse = made_up_answers.results()
  other = dataclasses.replace(dense, name='other', cell=('piece', 'diagonal'))
  made = made_up_answers.whole_report(results=[dense, sparse, other])
  (table,) = [
    table
    for table in report_tables.tables(made)
    if table.title == 'EM by address and payload'
  ]
  assert table.rows == [
    ['Address', 'expert', 'diagonal'],
    ['word', '66.7', 'n/a'],
    ['piece', 'n/a', '16.7'],
  ]


def test_tables_keep_their_columns(markdown):
  widths = None
  for line in markdown.splitlines():
    if not line.startswith('|'):
      widths = None
      continue
    cells = line.replace('\\\\', '').replace('\\|', '').count('|')
    assert widths in (None, cells), line
    widths = cells
  assert '<script>' not in markdown and '<u>' not in markdown


def test_results_json_holds_everything(folder):
  text = (folder / 'results.json').read_text('utf-8')
  assert 'NaN' not in text
  dense, sparse = json.loads(text)
  fields = {
    field.name for field in dataclasses.fields(answer_comparison.ModelResult)
  }
  assert set(dense) >= fields - {'answers'}
  assert dense['curve'] == [[0, 9.5], [100, 4.25], [200, None]]
  assert dense['seeds'] == [7, 8]
  assert sparse['recall'] == {'all spans': [30, 40]}
  assert sparse['name'] == made_up_answers.HOSTILE
  relations = sparse['breakdowns']['relation']
  assert relations['birth_date']['num_questions'] == 12
  assert relations['birth_date']['em'] == pytest.approx(100 * 8 / 12)


def test_the_figure_is_a_png(folder):
  data = (folder / 'comparison.png').read_bytes()
  assert data.startswith(b'\x89PNG') and len(data) > 30_000


def test_examples_show_answers_and_experts(page, markdown):
  # Question 3 is no example, because both models know the answer.
  assert '>zorblat <small>417</small>' not in page
  made = made_up_answers.whole_report(
    word_experts={5: {'MoWE': [('who', None), ('zorblat', 417)]}}
  )
  examples = report_tables.examples(made)
  (shown,) = [one for one in examples if one.words]
  assert shown.question == 'Question 5 of Zorblat?'
  assert [right for *_, right in shown.predictions] == [False, True]
  text = report_tables.markdown(made, [], examples, 'x.png')
  assert '- experts of MoWE: who none, zorblat 417' in text
  assert '- dense: wrong &lt;u&gt;5&lt;/u&gt; ✗' in text


def test_one_model_alone_has_a_report(tmp_path):
  made = made_up_answers.whole_report(results=made_up_answers.results()[:1])
  text = report_files.write_report(made, tmp_path).read_text('utf-8')
  assert 'Against' not in text and 'Load of the experts' not in text


def test_reports_of_nothing_are_refused():
  with pytest.raises(ValueError, match='at least one model'):
    made_up_answers.whole_report(results=[])
