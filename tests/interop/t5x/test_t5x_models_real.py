"""Tests that the real t5x restores what we write, if it can be imported."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from mowe.interop.t5x import t5x_checkpoint, t5x_legacy, t5x_orbax

_LAYOUTS = {'legacy': t5x_legacy, 'orbax': t5x_orbax}


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('t5x') is None,
  reason='needs t5x: its clone, and those it imports, on PYTHONPATH',
)
@pytest.mark.parametrize('name', _LAYOUTS)
def test_t5x_restores_what_we_write(name, t5x_golden, tmp_path):
  given = t5x_checkpoint.load(t5x_golden('legacy'))
  written = t5x_checkpoint.save(tmp_path / 'run', given, _LAYOUTS[name])
  script = t5x_golden.folder / 'run_t5x.py'
  # This process has one device, as t5x would split the model over eight.
  subprocess.run(
    [sys.executable, script, 'restore', written, tmp_path / 'out.npz'],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    check=True,
  )
  expected = {
    '/'.join(path): array[...]
    for path, array in t5x_checkpoint.read(t5x_golden('legacy')).items()
  }
  with np.load(t5x_golden.folder / 'io.npz') as io:
    expected['logits'] = io['logits']
  with np.load(tmp_path / 'out.npz') as found:
    assert set(found) == set(expected)
    for path, array in expected.items():
      np.testing.assert_array_equal(found[path], array, path)
