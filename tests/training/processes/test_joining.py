"""Tests how a process looks for the others of its run."""

import jax
import pytest

from mowe.training.processes import joining


@pytest.fixture
def asked(monkeypatch):
  """What JAX is asked for, without connecting to anyone."""
  calls = []

  def initialize(*found, **options):
    calls.append((*found, options['cluster_detection_method']))

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  return calls


@pytest.mark.parametrize('index', [None, 0])
def test_one_process_looks_for_nobody(asked, index):
  assert not joining.join(count=1, index=index)
  assert not asked


def _raises(error):
  def initialize(*unused, **options):
    raise error

  return initialize


@pytest.mark.parametrize(
  'error',
  [
    ValueError('coordinator_address should be defined.'),
    RuntimeError('jax.distributed.initialize() must be called before any'),
  ],
)
def test_a_process_without_a_launcher_is_alone(error, monkeypatch):
  monkeypatch.setattr(jax.distributed, 'initialize', _raises(error))
  assert not joining.join()


def test_a_launcher_that_tells_nonsense_is_not_ignored(monkeypatch):
  error = ValueError("invalid literal for int() with base 10: 'x'")
  monkeypatch.setattr(jax.distributed, 'initialize', _raises(error))
  with pytest.raises(ValueError, match='invalid literal'):
    joining.join()


def test_what_is_given_is_taken_and_the_rest_is_found(asked):
  assert joining.join('host:12', 3, 2)
  # A launcher would give this process one GPU of its host.
  assert joining.join('host:12')
  assert asked == [
    ('host:12', 3, 2, 'deactivate'),
    ('host:12', None, None, None),
  ]


@pytest.mark.parametrize(
  'given, message',
  [
    (('host',), "must be host:port, but is 'host'"),
    (('host:x', 2, 0), "must be host:port, but is 'host:x'"),
    (('host:1', 0, 0), '--process_count must be at least 1, but is 0'),
    (('host:1', 2, 2), 'from 0 to --process_count - 1, but it is 2 of 2'),
    ((None, 2), 'it has only --process_count 2. Give --coordinator_address'),
    (('host:1', 2), 'only --coordinator_address host:1 and --process_count 2'),
  ],
)
def test_arguments_that_do_not_fit_are_refused(given, message, monkeypatch):
  error = ValueError('coordinator_address should be defined.')
  monkeypatch.setattr(jax.distributed, 'initialize', _raises(error))
  with pytest.raises(joining.CannotJoinError, match=message):
    joining.join(*given)


def test_a_coordinator_that_does_not_answer_is_named(monkeypatch):
  error = RuntimeError('DEADLINE_EXCEEDED: Deadline Exceeded')
  monkeypatch.setattr(jax.distributed, 'initialize', _raises(error))
  with pytest.raises(joining.CannotJoinError, match='process 0 at host:12, or'):
    joining.join('host:12', 2, 1)
