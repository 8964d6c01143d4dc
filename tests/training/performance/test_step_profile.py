"""Tests which steps are traced, and that layers have their names in a trace."""

import gzip

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mowe.training.performance import step_profile


class _Model(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name='a_layer')(x)


def _step(state, batch):
  outputs = jax.jit(_Model().apply)(state, batch)
  return state, {'loss': outputs.sum()}


@pytest.fixture
def state():
  return _Model().init(jax.random.key(0), jnp.ones((2, 5)))


@pytest.mark.parametrize(('num_steps', 'num_done'), [(2, 6), (9, 4)])
def test_some_steps_are_traced(tmp_path, capsys, state, num_steps, num_done):
  traced = step_profile.ProfiledStep(_step, tmp_path / 'profile', num_steps)
  for _ in range(num_done):
    found, metrics = traced(state, jnp.ones((2, 5)))
  assert found is state and metrics['loss'].shape == ()
  traced.close()
  traced.close()
  number = min(num_steps, num_done - 2)
  folder = tmp_path / 'profile'
  assert capsys.readouterr().out == (
    f'Traced steps: {number}. The trace is in {folder}.\n'
  )
  (file,) = folder.rglob('*.trace.json.gz')
  events = gzip.decompress(file.read_bytes()).decode()
  (protocol,) = folder.rglob('*.xplane.pb')
  assert events.count('"name":"train"') == number
  assert b'a_layer' in protocol.read_bytes()


def test_a_run_that_ends_before_has_no_trace(tmp_path, capsys, state):
  traced = step_profile.ProfiledStep(_step, tmp_path / 'profile', 5)
  for _ in range(2):
    traced(state, jnp.ones((2, 5)))
  traced.close()
  assert capsys.readouterr().out == ''
  assert not (tmp_path / 'profile').exists()
