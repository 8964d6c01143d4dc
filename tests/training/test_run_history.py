"""Tests the history of a run: its starts, and the settings that changed."""

import json

from mowe.training import run_history

_OLD = """import mowe.x
# Parameters for x:
# ==============================================================================
RATE = 0.01
x.Layer.sizes = \\
    (1, 2,
     3)
x.Layer.name = 'a = b'
GONE = 3
"""
_NEW = """RATE = 0.001
x.Layer.sizes = (1, 2, 4)
x.Layer.name = 'a = b'
NEW = None
"""


def test_settings_that_differ_are_named_with_both_values():
  assert run_history.changed_settings(_OLD, _NEW) == {
    'GONE': ['3', None],
    'NEW': [None, 'None'],
    'RATE': ['0.01', '0.001'],
    'x.Layer.sizes': ['(1, 2, 3)', '(1, 2, 4)'],
  }
  assert run_history.changed_settings(_OLD, _OLD) == {}


def test_each_start_has_a_line(tmp_path, capsys):
  assert run_history.read(tmp_path) == []
  assert run_history.begin(tmp_path, 0, 'RATE = 1\n') == {}
  assert 'changed' not in capsys.readouterr().out
  run_history.begin(tmp_path, 30, 'RATE = 2\n')
  assert 'RATE  1 -> 2' in capsys.readouterr().out
  assert (tmp_path / 'config.gin').read_text() == 'RATE = 2\n'
  with (tmp_path / run_history.FILE_NAME).open('a') as file:
    file.write('{"half')
  first, second = run_history.read(tmp_path)
  assert (first['step'], first['changes']) == (0, {})
  assert (second['step'], second['changes']) == (30, {'RATE': ['1', '2']})
  assert second['host'] and second['command'].startswith('mowe')
  json.dumps(run_history.origin())
  run_history.begin(tmp_path, 40, None)
  assert [one['step'] for one in run_history.read(tmp_path)] == [0, 30, 40]
