"""Every verb that reads records, on every kind of damaged record.

Also tests `bad_records` and `terminations`. Each case ends with one sentence that has the file and
the line, or, where such records are left out, with the right number of others.
"""

import dataclasses
import gzip
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mowe.cli import main
from mowe.commands import cache_task
from mowe.data.caches import token_cache
from mowe.data.text import bad_records, text_files

_WORDS = 'The river Zorb flows past the town of Quimby, where Anna lives'


@dataclasses.dataclass(frozen=True)
class _Verb:
  """A verb that reads records.

  Attributes:
    arguments: the verb and its options; {out} and {file} are replaced.
    record: makes a record that it can read, from a number.
    field: the field of a record that is damaged.
  """

  arguments: tuple[str, ...]
  record: Callable[[int], dict]
  field: str


def _text(number):
  return {'text': f'{_WORDS} since {number}.'}


def _cache(kind, record, field):
  arguments = ('cache-task', '{out}', '{file}', '--vocabulary', 'bytes')
  return _Verb((*arguments, '--kind', kind), record, field)


_VERBS = {
  'text': _cache('text', _text, 'text'),
  'questions': _cache(
    'questions',
    lambda n: {'question': f'Who is {n}?', 'answers': [f'Anna {n}']},
    'answers',
  ),
  'claims': _cache(
    'claims', lambda n: {'claim': f'Anna is {n}', 'label': 'REFUTES'}, 'label'
  ),
  'language_model': _cache('language_model', _text, 'text'),
  'pieces': _Verb(
    ('train-vocabulary', '{out}', '{file}', '--size', '40'), _text, 'text'
  ),
  'words': _Verb(
    ('train-vocabulary', '{out}', '{file}', '--words'), _text, 'text'
  ),
  'routing': _Verb(
    ('build-routing-vocabulary', '{out}.npz', '{file}', '--vocabulary', 'bytes')
    + ('--num_experts', '4'),
    _text,
    'text',
  ),
}

# Damages of one line. Each makes a line from a good record and its field.
_LINES = {
  'no JSON': lambda record, field: b'{"text": ',
  'no object': lambda record, field: b'["text"]',
  'no field': lambda record, field: b'{"other": "one"}',
  'null': lambda record, field: json.dumps(record | {field: None}).encode(),
  'object': lambda record, field: json.dumps(record | {field: {}}).encode(),
  'true': lambda record, field: json.dumps(record | {field: True}).encode(),
  'deep': lambda record, field: b'[' * 100_000,
  'long number': lambda record, field: f'{{"{field}": {"7" * 9000}}}'.encode(),
  'no UTF-8': lambda record, field: json.dumps(record).encode() + b'\xff\xfe',
  'NUL': lambda record, field: b'\0' * 50,
}
_NUMBER, _DAMAGED_LINE = 30, 17


def _write(path, verb, damage=None):
  lines = [json.dumps(verb.record(n)).encode() for n in range(_NUMBER)]
  if damage:
    lines[_DAMAGED_LINE - 1] = damage(verb.record(7), verb.field)
  path.write_bytes(b'\n'.join(lines) + b'\n')
  return path


def _run(verb, tmp_path, file, *more):
  places = {'out': tmp_path / 'out', 'file': file}
  return main.main([one.format(**places) for one in verb.arguments] + [*more])


@pytest.mark.parametrize('damage', _LINES)
@pytest.mark.parametrize('name', _VERBS)
def test_a_damaged_line_is_named_or_left_out(name, damage, tmp_path, capfd):
  verb = _VERBS[name]
  file = _write(tmp_path / 'records.jsonl', verb, _LINES[damage])
  assert _run(verb, tmp_path, file) == 1
  shown = capfd.readouterr().err
  assert f'{file}, line {_DAMAGED_LINE}' in shown
  assert 'Traceback' not in shown and len(shown.splitlines()) == 1
  # Nothing is left of the attempt, so that the next one begins anew.
  assert [path.name for path in tmp_path.iterdir()] == [file.name]
  assert _run(verb, tmp_path, file, '--on_bad_record', 'skip') == 0
  out = capfd.readouterr().out
  assert '1 record was left out. The first of them:\n' in out
  assert f'{file}, line {_DAMAGED_LINE}' in out
  if verb.arguments[0] == 'cache-task':
    cache = token_cache.TokenCache.open(tmp_path / 'out')
    assert cache.num_examples == _NUMBER - 1


# Damages of a whole file, which no record can be left out for.
_FILES = {
  'empty': (b'', 'is empty or blank'),
  'cut gz': (None, 'breaks off after line'),
  'all lines bad': (b'1\n2\n', 'line 1|that cannot be read'),
}


@pytest.mark.parametrize('more', [(), ('--on_bad_record', 'skip')])
@pytest.mark.parametrize('damage', _FILES)
@pytest.mark.parametrize('name', _VERBS)
def test_a_damaged_file_is_named(name, damage, more, tmp_path, capfd):
  verb = _VERBS[name]
  content, message = _FILES[damage]
  if content is None:
    packed = gzip.compress(_write(tmp_path / 'a', verb).read_bytes() * 20)
    content = packed[: len(packed) * 2 // 3]
    (tmp_path / 'a').unlink()
  file = tmp_path / 'records.jsonl.gz'
  file.write_bytes(content if damage == 'cut gz' else gzip.compress(content))
  assert _run(verb, tmp_path, file, *more) == 1
  shown = capfd.readouterr().err
  assert str(file) in shown and re.search(message, shown)
  assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_half_characters_and_huge_lines_are_read(tmp_path):
  verb = _VERBS['text']
  line = json.dumps({'text': 'a \ud83d b ' + 'long ' * 200_000})
  (tmp_path / 'records.jsonl').write_text(line + '\n')
  assert _run(verb, tmp_path, tmp_path / 'records.jsonl') == 0
  cache = token_cache.TokenCache.open(tmp_path / 'out')
  assert cache.lengths('targets')[0] == 6 + 5 * 200_000 + 1


@pytest.mark.parametrize(
  'spans', [7, [3], [[2, 1]], [[0, 9999]], [[0, 3], [2, 5]], [['a', 'b']]]
)
def test_spans_that_cannot_be_are_damages_of_a_line(spans, tmp_path, capsys):
  verb = _VERBS['text']
  damage = lambda record, field: json.dumps(record | {'spans': spans}).encode()
  file = _write(tmp_path / 'records.jsonl', verb, damage)
  assert _run(verb, tmp_path, file) == 1
  assert f'{file}, line {_DAMAGED_LINE}: ' in capsys.readouterr().err
  assert _run(verb, tmp_path, file, '--on_bad_record', 'skip') == 0


def test_many_bad_records_are_counted_and_three_are_named(tmp_path, capsys):
  bad = bad_records.BadRecords(skip=True)
  file = tmp_path / 'a.jsonl'
  file.write_text('{"text": "one"}\n' + '{}\n' * 1234)
  assert len(list(text_files.read_records(str(file), bad=bad))) == 1
  bad.say()
  first, *named = capsys.readouterr().out.splitlines()
  assert first == '1,234 records were left out. The first of them:'
  assert [re.search(r'line (\d)', line)[1] for line in named] == ['2', '3', '4']


def test_a_cache_with_records_left_out_is_another_one(tmp_path, capsys):
  verb = _VERBS['text']
  file = _write(tmp_path / 'records.jsonl', verb)
  assert _run(verb, tmp_path, file) == 0
  assert _run(verb, tmp_path, file, '--on_bad_record', 'skip') == 1
  assert 'bad_records' in capsys.readouterr().err


@pytest.mark.parametrize(
  'source', [cache_task.TextFiles, cache_task.RunningTextFiles]
)
@pytest.mark.parametrize('ending', ['.jsonl', '.txt', '.jsonl.gz'])
def test_a_text_that_changes_meanwhile_is_refused(source, ending, tmp_path):
  file = tmp_path / f'records{ending}'
  rng = random.Random(0)
  rest = [rng.randbytes(200).hex() for _ in range(2000)]
  if ending != '.txt':
    rest = [json.dumps({'text': text}) for text in rest]
  content = '\n'.join(rest).encode()
  file.write_bytes(gzip.compress(content) if ending[-2:] == 'gz' else content)

  def change_the_end(done):
    with file.open('r+b') as opened:
      # The length stays.
      opened.seek(-5, 2)
      opened.write(b'xy')

  with pytest.raises(ValueError, match=r'was changed\. Run|breaks off'):
    cache_task.cache_task(
      tmp_path / 'out', 'bytes', source([str(file)]), progress=change_the_end
    )
  assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_files_that_come_or_go_meanwhile_are_refused(tmp_path):
  (tmp_path / 'a.txt').write_text('one')
  pattern = str(tmp_path / '*.txt')
  sources = text_files.describe_sources(pattern)
  (tmp_path / 'b.txt').write_text('two')
  with pytest.raises(ValueError, match='there are now 2 and were 1'):
    text_files.read_records(pattern, sources=sources)


def test_sigterm_leaves_nothing_half_built(tmp_path):
  file = tmp_path / 'records.jsonl'
  _write(file, _VERBS['text'])
  file.write_bytes(file.read_bytes() * 20_000)
  process = subprocess.Popen(
    [
      sys.executable,
      '-m',
      'mowe.cli.main',
      'cache-task',
      tmp_path / 'out',
      file,
    ]
    + ['--vocabulary', 'bytes', '--num_workers', '1'],
    stderr=subprocess.PIPE,
    text=True,
  )
  start = time.monotonic()
  while not list(tmp_path.glob('.out.building-*/*.bin')):
    assert process.poll() is None and time.monotonic() - start < 120
    time.sleep(0.01)
  process.terminate()
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 143, errors
  assert errors.endswith('mowe: stopped by SIGTERM.\n')
  assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_file_of_bad_lines_alone_is_told_by_its_own_lines(tmp_path, capsys):
  (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n{}\n')
  (tmp_path / 'b.jsonl').write_text('1\n{}\n')
  verb = _VERBS['words']
  files = tmp_path / '*.jsonl'
  assert _run(verb, tmp_path, files, '--on_bad_record', 'skip') == 1
  shown = capsys.readouterr().err
  assert 'b.jsonl has 2 that cannot be read, the last one: ' in shown
  assert 'b.jsonl, line 2' in shown and '..' not in shown


def test_a_cache_that_was_being_replaced_comes_back(tmp_path, capsys):
  verb = _VERBS['text']
  file = _write(tmp_path / 'records.jsonl', verb)
  assert _run(verb, tmp_path, file) == 0
  # Killed between the two renames of a replacement.
  (tmp_path / 'out').rename(tmp_path / '.out.building-abc.old')
  (tmp_path / '.out.building-abc').mkdir()
  file.write_text(file.read_text() + json.dumps(_text(99)) + '\n')
  assert _run(verb, tmp_path, file) == 1
  assert 'the old one is back' in capsys.readouterr().err
  old = token_cache.TokenCache.open(tmp_path / 'out')
  assert old.num_examples == _NUMBER
  assert _run(verb, tmp_path, file, '--overwrite') == 0
  assert sorted(one.name for one in tmp_path.iterdir()) == [
    'out',
    'records.jsonl',
  ]
