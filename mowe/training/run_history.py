"""Keeps when, where and with what settings a run was started."""

import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
from typing import Any

from mowe.words import atomic_files

FILE_NAME = 'history.jsonl'
CONFIG = 'config.gin'
# What every line has.
_FIELDS = {
  'time': str,
  'step': int,
  'version': str,
  'commit': str | None,
  'command': str,
  'host': str,
  'changes': dict,
}

_BINDING = re.compile(r'([A-Za-z_][\w./]*) = ?(.*)')


@functools.cache
def origin() -> dict[str, Any]:
  """Returns what made the files that this process writes.

  It names the version of the package, its git commit where it is a checkout
  (with a + behind if files of it are changed), the command, and the host.
  """
  try:
    version = importlib.metadata.version('mowe')
  except importlib.metadata.PackageNotFoundError:
    version = 'unknown'
  return {
    'version': version,
    'commit': _commit(),
    'command': shlex.join(['mowe', *sys.argv[1:]]),
    'host': socket.gethostname(),
  }


def now() -> str:
  """Returns the time, with its zone, to the second."""
  return datetime.datetime.now().astimezone().isoformat(timespec='seconds')


def begin(
  folder: pathlib.Path, step: int, config_text: str | None
) -> dict[str, list[str | None]]:
  """Notes in a model folder that a run starts or goes on.

  It keeps the settings as `config.gin`, says which of them have changed since
  the last start, and adds a line to the history.

  Args:
    folder: the model folder.
    step: the step from which the run goes on; 0 at first.
    config_text: all settings, as text of a gin file; None if they are not
      known, and none are then kept.

  Returns:
    The settings that have changed: name -> [old value, new value], with None
    for a value that is not there.
  """
  path = folder / CONFIG
  changes = {}
  if path.exists() and config_text is not None:
    changes = changed_settings(
      path.read_text('utf-8', errors='replace'), config_text
    )
  if changes:
    width = max(map(len, changes))
    print('Settings that have changed since the last start:')
    for name, (old, new) in changes.items():
      print(f'  {name:{width}}  {old} -> {new}')
  line = {'time': now(), 'step': step, **origin(), 'changes': changes}
  # A start that was killed may have left half a line.
  lines = [json.dumps(one, ensure_ascii=False) for one in [*read(folder), line]]
  content = '\n'.join(lines) + '\n'
  atomic_files.write_atomically(folder / FILE_NAME, content.encode())
  if config_text is not None:
    atomic_files.write_atomically(path, config_text.encode())
  return changes


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of the history; a half-written last one is left out.

  Raises:
    ValueError: another line is not one that `begin` writes.
  """
  path = folder / FILE_NAME
  if not path.exists():
    return []
  *lines, _ = path.read_text('utf-8', errors='replace').split('\n')
  found = []
  for number, line in enumerate(lines, start=1):
    try:
      found.append(json.loads(line))
      is_line = all(
        isinstance(found[-1][name], kind) for name, kind in _FIELDS.items()
      )
    except (ValueError, TypeError, KeyError, RecursionError):
      is_line = False
    if not is_line:
      raise ValueError(
        f'Every line of {path} must say when a run started, but line {number} '
        f'is {line[:60]!r}. Move the file away: a run does without it.'
      )
  return found


def changed_settings(old: str, new: str) -> dict[str, list[str | None]]:
  """Returns the bindings of two gin texts that differ, with both values."""
  before, after = _bindings(old), _bindings(new)
  return {
    name: [before.get(name), after.get(name)]
    for name in sorted(before.keys() | after.keys())
    if before.get(name) != after.get(name)
  }


def _bindings(text: str) -> dict[str, str]:
  """Name -> value of all bindings; values may go on in further lines."""
  found: dict[str, str] = {}
  name = None
  for line in text.splitlines():
    binding = _BINDING.fullmatch(line)
    if binding:
      name = binding[1]
      found[name] = binding[2].removesuffix('\\').strip()
    elif name and line[:1].isspace():
      joined = f'{found[name]} {line.strip()}'
      found[name] = joined.removesuffix('\\').strip()
    else:
      name = None
  return found


def _commit() -> str | None:
  """The commit of the checkout that this file is in, or None."""
  root = pathlib.Path(__file__).resolve().parents[2]
  if not (root / '.git').exists():
    return None

  def git(*arguments):
    return subprocess.run(
      ['git', '-C', os.fspath(root), *arguments],
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    ).stdout.strip()

  try:
    is_changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + '+' * bool(is_changed)
  except (OSError, subprocess.SubprocessError):
    return None
