"""Reports: every number is there, and no text gets out of its place."""

import dataclasses
import html.parser
import json

import pytest

from mowe.evaluation import report

_HOSTILE = '<script>alert("x")</script> | $\\frac$ &amp;'


def _results():
  samples = (
    report.SampleQuestion('Who wrote it?', ('Ada', 'A. King'), 'Ada'),
    report.SampleQuestion('Where?', ('<b>Paris</b>',), 'Lyon'),
  )
  dense = report.ModelResult(
    name='dense',
    total_parameters=77_000_000,
    active_parameters=76_500_000,
    frozen_parameters=1_230_000,
    flops_per_token=154e6,
    em=12.34,
    f1=23.45,
    num_questions=1024,
    seconds=3601.0,
    learning_curve=[(0, 9.5), (100, 4.25), (200, float('nan'))],
    em_by_relation={'capital of': 40.5},
    seeds=(7, 8),
    samples=samples,
  )
  hostile = dataclasses.replace(
    dense,
    name=_HOSTILE,
    total_parameters=512_000_000,
    em=0.0,
    learning_curve=[],
    em_by_relation={'born in': 5.25},
    samples=(dataclasses.replace(samples[0], prediction='<i>Bob</i>'),),
  )
  return [dense, hostile]


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
  assert report.write_report(_results(), path, '<h1>') == path / 'index.html'
  return path


def test_the_page_escapes_every_text(folder):
  page = _Tags((folder / 'index.html').read_text(encoding='utf-8'))
  assert not {'script', 'b', 'i', 'link'} & set(page.tags)
  for text in ('<h1>', _HOSTILE, '<b>Paris</b>', '<i>Bob</i>'):
    assert text in page.text


def test_the_page_needs_nothing_else(folder):
  text = (folder / 'index.html').read_text(encoding='utf-8')
  (source,) = _Tags(text).sources
  assert source.startswith('data:image/png;base64,')
  assert 'prefers-color-scheme: dark' in text and 'width=device-width' in text
  assert 'http' not in text.replace(source, '')


def test_all_numbers_are_in_page_and_table(folder):
  page = ' '.join(_Tags((folder / 'index.html').read_text('utf-8')).text)
  table = (folder / 'table.md').read_text('utf-8')
  numbers = '77M 76.5M 1.23M 154M 12.34 23.45 1,024 3,601 40.50 5.25 512M'
  for number in numbers.split() + ['7, 8', 'nan', '10.5 – 14.5']:
    assert number in page, number
    assert number in table, number


def test_the_table_keeps_its_columns(folder):
  lines = (folder / 'table.md').read_text('utf-8').splitlines()
  for line in lines[:4]:
    cells = line.replace('\\\\', '').replace('\\|', '').count('|') - 1
    assert cells == len(report.COLUMNS), line
  assert '<script>' not in '\n'.join(lines)


def test_results_json_holds_everything(folder):
  text = (folder / 'results.json').read_text(encoding='utf-8')
  assert 'NaN' not in text
  dense, hostile = json.loads(text)
  fields = {field.name for field in dataclasses.fields(report.ModelResult)}
  assert set(dense) == fields | {'em_interval'}
  assert dense['learning_curve'] == [[0, 9.5], [100, 4.25], [200, None]]
  assert dense['samples'][1]['answers'] == ['<b>Paris</b>']
  assert hostile['name'] == _HOSTILE


def test_the_figure_is_a_png(folder):
  data = (folder / 'comparison.png').read_bytes()
  assert data.startswith(b'\x89PNG') and len(data) > 10_000


def test_interval_of_a_percentage():
  # Wilson by hand for 5 of 10: middle 0.5, half width 0.2634.
  low, high = report.wilson_interval(50.0, 10)
  assert (low, high) == pytest.approx((23.66, 76.34), abs=0.01)
  low, high = report.wilson_interval(0.0, 100)
  assert low == 0 and 3 < high < 4


def test_errors_say_what_to_do(tmp_path):
  dense = _results()[0]
  with pytest.raises(ValueError, match='name each once'):
    report.write_report([dense, dense], tmp_path)
  with pytest.raises(ValueError, match='at least one model'):
    report.write_report([], tmp_path)
  with pytest.raises(ValueError, match='em of .dense. is 101.*percentages'):
    dataclasses.replace(dense, em=101)
  with pytest.raises(ValueError, match='Leave out models'):
    dataclasses.replace(dense, num_questions=0)
