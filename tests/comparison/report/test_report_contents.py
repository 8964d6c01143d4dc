"""Reports must show every number, and no text may break out of its place.

Also tests `headline`, `report_figure`, `report_files`, `report_markdown`,
`report_page`, `report_tables`, and `table_cells`.
"""

import base64
import dataclasses
import html.parser
import json
import re

import made_up_answers
import pytest

from mowe.comparison.report import (
  answer_comparison,
  headline,
  report_files,
  report_markdown,
  report_tables,
  table_cells,
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


def test_the_page_needs_nothing_else(page, folder):
  tags = _Tags(page)
  # Markers of figures refer to shapes in the page, and contents to sections.
  (file,) = [one for one in tags.sources if not one.startswith('#')]
  start = 'data:application/json;base64,'
  assert file.startswith(start)
  numbers = json.loads(base64.b64decode(file.removeprefix(start)))
  assert numbers == json.loads((folder / 'results.json').read_text('utf-8'))
  page = page.replace(file, '')
  assert 'prefers-color-scheme: dark' in page and 'width=device-width' in page
  assert 'http' not in page and '@import' not in page
  assert 'url(' not in page.replace('url(#', '')
  assert not {'script', 'link', 'img'} & set(tags.tags)


def test_ids_are_unique_and_there(page):
  ids = re.findall(r' id="([^"]*)"', page)
  assert len(set(ids)) == len(ids)
  used = re.findall(r'(?:href="#|url\(#|labelledby=")([^")]*)', page)
  assert used and set(used) <= set(ids)


def test_figures_tell_their_numbers(page):
  figures = page[
    page.index('<div class="figures">') : page.index('id="table-0"')
  ]
  assert figures.count('role="img"') == 6
  # Equal FLOPs have no panel.
  assert 'EM by compute' not in figures and 'EM by size' in figures
  assert 'aria-label="Exact match. dense: EM 16.7 (6.2 – 29.2); ' in figures
  for text in (
    'dense: EM 16.7 (6.2 – 29.2), 77M parameters',
    'dense: EM 16.7 (6.2 – 29.2), 1h 00m',
    'dense, step 100: loss 4.250',
    'dense, named 0 to 2: EM 60.0',
  ):
    assert f'<title>{text}' in figures, text


def test_models_with_other_compute_have_a_panel_of_it(tmp_path):
  dense, sparse = made_up_answers.results()
  other = dataclasses.replace(sparse, flops_formula=3e9)
  made = made_up_answers.whole_report(results=[dense, other])
  text = report_files.write_report(made, tmp_path).read_text('utf-8')
  assert 'EM by compute' in text


def test_all_numbers_are_in_page_and_markdown(page, markdown):
  page = ' '.join(_Tags(page).text)
  numbers = '77M 76.5M 430M 154M 161M 12.3K 171M 2.125 1.875'
  for number in numbers.split() + [
    'EM, seed 8', '20.8', '1.50 GiB', '1h 00m', '42 s', '(of 40)', '12.5 %',
    'EXPERT\\_DIM = 96 for the FLOPs',
  ]:  # fmt: skip
    assert number in markdown, number
    assert number.replace('\\', '') in page, number
  assert '≥ 171M' in page and '≥ 161M' not in page


def test_what_is_not_known_is_said_to_be_so_or_left_out(markdown):
  (line,) = [
    row for row in markdown.splitlines() if row.startswith('| dense | 16.7')
  ]
  assert line.endswith('| n/a | n/a | n/a |')
  # One question has no known entity.
  assert 'Of 1 questions it is not known' in markdown
  questions = [
    dataclasses.replace(question, entity_count=None, relation=None)
    for question in made_up_answers.questions()
  ]
  made = made_up_answers.whole_report(
    questions=questions, results=made_up_answers.results()[:1]
  )
  tables = {table.title: table for table in report_tables.tables(made)}
  assert list(tables) == [
    'Answers', 'Costs', 'EM by whether finetuning has the answer, too',
  ]  # fmt: skip
  assert 'Text loss' not in tables['Answers'].rows[0]
  assert 'Peak memory' not in tables['Costs'].rows[0]


def test_the_best_is_marked(markdown):
  best = table_cells.Best('96.7')
  heading, cells = table_cells.values(
    'EM', [2.8, None, 96.70001, 96.7], table_cells.decimals(1), max
  )
  assert cells == ['2.8', 'n/a', best, best]
  least = table_cells.values('Loss', [float('nan'), 2.0], '{:g}'.format, min)
  assert least[1] == ['nan', table_cells.Best('2')]
  alike = table_cells.values('EM', [1.0, 1.0], '{:g}'.format, max)
  assert alike[1] == ['1', '1']
  assert '| **66.7** | 45.8 – 83.3 | **75.0** |' in markdown


def test_the_first_lines_say_the_result(page, markdown):
  said = (
    'answers 66.7 % of 24 questions (95 % interval 45.8 to 83.3), 50.0 points '
    'more than dense (27.1 to 70.8, p = 0.0023). One of the two has one seed '
    'alone, and other seeds may differ.'
  )
  assert said in page and said in markdown
  dense, sparse = made_up_answers.results()
  text = headline.headline([sparse, dense])
  assert '50.0 points more than dense' in text
  near = dataclasses.replace(dense, name='near')
  text = headline.headline([dense, near])
  assert '0.0 points more than near' in text and 'which may be chance' in text
  assert text.endswith('These are means over 2 seeds.')
  assert headline.headline([dense]).endswith('6.2 to 29.2).')


def test_models_are_compared_on_the_same_questions(markdown):
  table = markdown[markdown.index('## Against dense') :]
  row = table.splitlines()[4]
  # One model has 16 right and the other 4, of 24: it is better on questions 4
  # to 18, and worse on 1 and 2.
  assert '| +50.0 |' in row.replace('*', '') and row.endswith(
    '| 15 | 2 | 0.0023 |'
  ), row


def test_each_model_is_compared_with_each():
  dense, sparse = made_up_answers.results()
  third = dataclasses.replace(dense, name='third')
  made = made_up_answers.whole_report(results=[dense, sparse, third])
  differences, p_values = [
    table
    for table in report_tables.tables(made)
    if 'each against each' in table.title.lower()
  ]
  assert differences.rows[0][1] == 'less dense'
  assert [row[1:] for row in differences.rows[1:]] == [
    ['', '-50.0', '+0.0'],
    ['+50.0', '', '+50.0'],
    ['+0.0', '-50.0', ''],
  ]
  assert p_values.rows[2] == [sparse.name, '0.0023', '', '0.0023']
  assert p_values.rows[3] == ['third', '1', '0.0023', '']


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
    ['word', table_cells.Best('66.7'), 'n/a'],
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
    word_experts={6: {'MoWE': [('who', None), ('zorblat', 417)]}}
  )
  examples = report_tables.examples(made)
  (shown,) = [one for one in examples if one.words]
  assert shown.question == 'Question 6 of Zorblat?'
  assert [right for *_, right in shown.predictions] == [False, True]
  text = report_markdown.render(made, 'So.', [], examples, 'x.png')
  assert '- experts of MoWE: who none, zorblat 417' in text
  assert '- dense: wrong &lt;u&gt;6&lt;/u&gt; ✗' in text


def test_one_model_alone_has_a_report(tmp_path):
  made = made_up_answers.whole_report(results=made_up_answers.results()[:1])
  text = report_files.write_report(made, tmp_path).read_text('utf-8')
  assert 'Against' not in text and 'Load of the experts' not in text


def test_reports_of_nothing_are_refused():
  with pytest.raises(ValueError, match='at least one model'):
    made_up_answers.whole_report(results=[])
