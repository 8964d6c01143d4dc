"""A report must say what made its numbers, also where runs differ in it."""

from mowe.comparison import provenance


def test_a_process_says_when_and_where_it_runs():
  made = provenance.of_this_process()
  assert set(made) == {'time', 'code', 'software', 'hardware'}
  assert made['code'].startswith('mowe ') and 'jax' in made['software']
  assert ' cores, ' in made['hardware'] and ' GiB' in made['hardware']


def test_runs_of_several_places_are_told_apart():
  here = {'time': '2026-05-02', 'code': 'a', 'software': 's', 'hardware': 'x'}
  there = {'time': '2026-05-01', 'code': 'a', 'software': 's', 'hardware': 'y'}
  runs = [{provenance.KEY: here}, {provenance.KEY: there}, {}]
  lines = dict(provenance.lines(runs, 'three tries'))
  assert lines['Runs measured'] == '2026-05-01 to 2026-05-02'
  assert lines['Code'] == 'a' and lines['Hardware'] == 'x; y'
  assert lines['Not recorded'].startswith('1 of 3 runs')
  assert lines['Learning rates'] == 'three tries'
  assert 'Not recorded' not in dict(provenance.lines(runs[:1], ''))
