"""Tests that freed memory stays with the process, unless something speaks against it.

Each case is a process of its own, because the setting cannot be taken back.
"""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(sys.platform != 'linux', reason='glibc has the setting'),
]

# Allocates and frees 64 MiB twice, and prints how many pages were touched for
# the first time by the second use.
_PROGRAM = """
import json, resource, sys
import numpy as np
from mowe.training.performance import kept_memory

kept = sys.argv[1] == 'keep' and kept_memory.keep_on_cpu()
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  array = np.ones(64 << 20, np.uint8)
  del array
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([kept, pages]))
"""
# Large pages would make few faults in any case.
_ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'NUMPY_MADVISE_HUGEPAGE': '0'}


def _run(how, **environment):
  """Whether memory was kept, and the number of pages."""
  own = {k: v for k, v in os.environ.items() if 'MALLOC' not in k.upper()}
  done = subprocess.run(
    [sys.executable, '-c', _PROGRAM, how],
    capture_output=True,
    text=True,
    env=own | _ENVIRONMENT | environment,
    check=True,
  )
  return json.loads(done.stdout)


def test_memory_that_was_freed_is_used_again():
  _, given_back = _run('as it is')
  kept, pages = _run('keep')
  if not kept:
    pytest.skip('this C library has no mallopt')
  assert given_back > 1000
  assert pages < given_back / 50


@pytest.mark.parametrize(
  'environment',
  [
    {'MALLOC_ARENA_MAX': '2'},
    {'GLIBC_TUNABLES': 'glibc.malloc.trim_threshold=128'},
  ],
)
def test_settings_of_the_user_are_left_alone(environment):
  assert _run('keep', **environment)[0] is False


def test_a_machine_with_a_plugin_for_accelerators_keeps_nothing(tmp_path):
  folder = tmp_path / 'libtpu'
  folder.mkdir()
  (folder / '__init__.py').touch()
  path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
  assert _run('keep', JAX_PLATFORMS='', PYTHONPATH=path)[0] is False
