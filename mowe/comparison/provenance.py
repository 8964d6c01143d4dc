"""Says what made the measurements of a run: when, with which code, and where."""

import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mowe.training import run_history

# The key of the record in the results of a run.
KEY = 'made'


def of_this_process() -> dict[str, str]:
  """Returns when, with which code, and on what hardware this process runs."""
  return {
    'time': run_history.now(),
    'code': _code(),
    'software': f'Python {platform.python_version()}, jax {jax.__version__}',
    'hardware': _hardware(),
  }


def lines(
  of_runs: Sequence[Mapping[str, Any]], tuned: str
) -> list[tuple[str, str]]:
  """Returns what a report says of its making, as names and values.

  Args:
    of_runs: the results of all runs in the report.
    tuned: what was tried for each model.
  """
  made = [one[KEY] for one in of_runs if KEY in one]
  found = [('Report', f'{run_history.now()}, {_code()}')]
  if made:
    times = sorted(one['time'] for one in made)
    found.append(
      ('Runs measured', ' to '.join(dict.fromkeys((times[0], times[-1]))))
    )
    for name in ('code', 'software', 'hardware'):
      distinct = dict.fromkeys(one[name] for one in made)
      found.append((name.capitalize(), '; '.join(distinct)))
  unknown = len(of_runs) - len(made)
  if unknown:
    found.append(
      (
        'Not recorded',
        f'{unknown} of {len(of_runs)} runs are older than the record of what '
        'made them.',
      )
    )
  return [
    *found,
    ('Command', run_history.origin()['command']),
    ('Learning rates', tuned),
  ]


def _code() -> str:
  """The version, and of a checkout the commit, with a + if it is changed."""
  origin = run_history.origin()
  version, commit = f'mowe {origin["version"]}', origin['commit']
  if commit is None:
    return version
  return f'{version}, commit {commit[:12]}{"+" * commit.endswith("+")}'


def _hardware() -> str:
  """The processor, its cores, the memory, and the accelerators."""
  parts = [f'{_processor()}, {os.cpu_count()} cores']
  memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  parts.append(f'{memory / 2**30:.0f} GiB')
  devices = [one for one in jax.local_devices() if one.platform != 'cpu']
  if devices:
    parts.append(f'{len(devices)} x {devices[0].device_kind}')
  return ', '.join(parts)


def _processor() -> str:
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text('utf-8', errors='replace')
  except OSError:
    text = ''
  for line in text.splitlines():
    name, _, value = line.partition(':')
    if name.strip() == 'model name':
      return value.strip()
  return platform.processor() or platform.machine()
