"""Tests tables that are shown on a terminal."""

from mowe.comparison.report import aligned_table, table_cells


def test_columns_stand_below_each_other():
  rows = [
    ['Model', 'EM (95 %)', 'p', 'Loads'],
    ['T5', '2.8', '', 'n/a'],
    ['東京 | 2', '96.7', '< 0.0001', table_cells.Bars((0.0, 1.0))],
  ]
  assert aligned_table.aligned(rows).split('\n') == [
    'Model     EM (95 %)         p  Loads',
    '────────  ─────────  ────────  ─────',
    'T5              2.8              n/a',
    '東京 | 2       96.7  < 0.0001     ▁█',
  ]


def test_texts_of_others_have_no_codes_and_one_line():
  table = aligned_table.aligned([['name', 'EM'], ['a\x1b[31m\nb', '1']])
  assert table.endswith(r'a\x1b[31m b   1')
