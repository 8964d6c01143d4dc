"""Tests that processes with other settings, code or data are named."""

import numpy as np
import pytest
from jax.experimental import multihost_utils

from mowe.training.processes import agreement


class _GatheredError(Exception):
  """Ends a call where a process would wait for the others."""


def _check(monkeypatch, of_processes):
  """Checks as the first process does, with the texts of all processes."""
  digests = []

  def keep(own):
    digests.append(own)
    raise _GatheredError

  monkeypatch.setattr(agreement.jax, 'process_count', lambda: len(of_processes))
  monkeypatch.setattr(multihost_utils, 'process_allgather', keep)
  for parts in of_processes:
    with pytest.raises(_GatheredError):
      agreement.check_same(parts)
  monkeypatch.setattr(
    multihost_utils, 'process_allgather', lambda own: np.stack(digests)
  )
  agreement.check_same(of_processes[0])


def test_one_process_has_nobody_to_ask(monkeypatch):
  monkeypatch.setattr(multihost_utils, 'process_allgather', None)
  agreement.check_same({'settings': 'a'})


def test_equal_processes_agree(monkeypatch):
  _check(monkeypatch, [{'settings': 'a', 'data': 'b'}] * 3)


@pytest.mark.parametrize(
  ('of_processes', 'message'),
  [
    (['a', 'b'], 'the settings of process 1 differ'),
    (['b', 'a', 'a'], 'the settings of process 0 differ'),
    (['a', 'c', 'a', 'b'], 'the settings of processes 1, 3 differ'),
  ],
)
def test_the_odd_one_is_named(monkeypatch, of_processes, message):
  parts = [{'settings': one, 'data': 'x'} for one in of_processes]
  with pytest.raises(agreement.ProcessesDifferError, match=message):
    _check(monkeypatch, parts)
  parts = [{'settings': 'x', 'data': one} for one in of_processes]
  with pytest.raises(agreement.ProcessesDifferError, match='the data of'):
    _check(monkeypatch, parts)
