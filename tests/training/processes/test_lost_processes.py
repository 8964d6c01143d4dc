"""Tests which errors are those of a lost process, without other processes."""

import jax
import orbax.checkpoint as ocp
import pytest

from mowe.training.processes import lost_processes

_ERROR = 'UNKNOWN: Gloo AllGather failed\nmore'
# What JAX 0.10 says of a barrier at which two processes are missed.
_MISSED = """DEADLINE_EXCEEDED: Barrier timed out. Id: x::0.
# of tasks that reached the barrier: 1/3.
The first task at the barrier: 0. Some timed out task names:
2
1

RPC: /xla.coordination.CoordinationService/Barrier"""


def _raised(monkeypatch, error, missed):
  """The error that `named` makes of one, if a barrier fails with `missed`."""

  def barrier(*, key, timeout_ms):
    if missed is not None:
      raise jax.errors.JaxRuntimeError(missed)

  monkeypatch.setattr(ocp.multihost, 'get_barrier_sync_fn', lambda: barrier)
  with pytest.raises(type(error)) as caught, lost_processes.named():
    raise error
  return caught.value


@pytest.mark.parametrize(
  'missed, names',
  [
    (_MISSED, 'processes 1, 2'),
    ('INTERNAL: UNAVAILABLE: Task 2 heartbeat timeout.', 'process 2'),
    ('INTERNAL: another text', 'another process'),
  ],
)
def test_processes_that_do_not_answer_are_named(monkeypatch, missed, names):
  with pytest.raises(
    lost_processes.ProcessLostError,
    match=rf'but {names} of 1 did not .* error here \(UNKNOWN: Gloo .* failed\)',
  ):
    _raised(monkeypatch, jax.errors.JaxRuntimeError(_ERROR), missed)


@pytest.mark.parametrize(
  'error, missed',
  [
    (jax.errors.JaxRuntimeError(_ERROR), None),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'), _MISSED),
    (ValueError('no step'), _MISSED),
  ],
)
def test_other_errors_stay_what_they_are(monkeypatch, error, missed):
  assert _raised(monkeypatch, error, missed) is error
