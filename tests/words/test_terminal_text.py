"""Tests that texts of others cannot steer the terminal, whatever prints them."""

import io
import json
import shutil
import sys

import pytest

from mowe.cli import main
from mowe.comparison.report import report_markdown
from mowe.words import terminal_text

# Colours, a new title of the window, a line that is overwritten, a bell, and a
# change of the direction of writing.
_HOSTILE = 'a\x1b[31mb\x1b]0;title\x07c\rd\x9be\u202ef'
_SHOWN = r'a\x1b[31mb\x1b]0;title\x07c\rd\x9be\u202ef'


def test_codes_are_written_out_and_texts_stay():
  assert terminal_text.escaped(_HOSTILE) == _SHOWN
  text = 'Émile\tZola — 東京\nعربي \U0001f600'
  assert terminal_text.escaped(text) == text
  assert terminal_text.escaped('\ud83d') == r'\ud83d'


def test_a_stream_without_unicode_shows_what_it_can():
  raw = io.BytesIO()
  stream = terminal_text.Harmless(io.TextIOWrapper(raw, 'ascii'))
  print('Zürich \x1b', file=stream, flush=True)
  assert raw.getvalue() == b'Z\\xfcrich \\x1b\n'


def test_streams_are_put_back():
  before = sys.stdout, sys.stderr
  with terminal_text.harmless_output():
    assert isinstance(sys.stdout, terminal_text.Harmless)
    assert terminal_text.steerable(sys.stdout) is before[0]
  assert (sys.stdout, sys.stderr) == before
  assert terminal_text.steerable(before[0]) is before[0]


def test_a_report_has_no_codes():
  table = report_markdown.of_rows([['name', 'EM'], [_HOSTILE, '1']])
  assert '\x1b' not in table and r'\\x1b' in table


def _run(capsys, *arguments):
  status = main.main([str(one) for one in arguments])
  captured = capsys.readouterr()
  shown = captured.out + captured.err
  assert '\x1b' not in shown and '\r' not in shown and '\u202e' not in shown
  return status, shown


def test_verbs_show_hostile_texts_harmlessly(world, tmp_path, capsys):
  name = _HOSTILE.replace(']0;', ']0')
  folder = tmp_path / name
  folder.mkdir()
  text = folder / 'text.jsonl'
  shutil.copy(world.folder / 'text.jsonl', text)
  vocabulary = ['--vocabulary', world.vocabulary_path]
  shown = terminal_text.escaped(name)
  for verb in (
    ['cache-task', folder / 'cache', text, *vocabulary],
    ['train-vocabulary', folder / 'words.txt', text, '--words'],
    ['build-routing-vocabulary', folder / 'w.npz', text, '--num_experts', 4]
    + vocabulary,
    ['explain', world.routing_path, f'Anna {_HOSTILE}', *vocabulary],
  ):
    status, out = _run(capsys, *verb)
    assert status == 0, out
    assert shown in out or verb[0] == 'explain'
  text.write_text(json.dumps({_HOSTILE: 1}) + '\n')
  for verb in (
    ['cache-task', folder / 'other', text, *vocabulary],
    ['ask', folder / 'absent', 'Who?'],
    ['inspect', folder / 'absent'],
    ['config', 'check', folder / 'absent.gin'],
    ['convert', folder / 'absent', folder / 'to', '--to', 'mowe'],
  ):
    status, out = _run(capsys, *verb)
    assert status == 1 and shown in out, (verb, out)


@pytest.mark.parametrize('gin', [True, False])
def test_gin_texts_are_shown_harmlessly(gin, tmp_path, capsys):
  file = tmp_path / 'a.gin'
  file.write_text(f'NAME = "{_HOSTILE}"\n' if gin else _HOSTILE)
  _run(capsys, 'config', 'check', file)
