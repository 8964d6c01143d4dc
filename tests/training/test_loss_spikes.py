"""Tests what counts as a spike of the loss, and what is done about it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.training import loss_spikes
from mowe.training.train_metrics import Mean

_LAG, _WINDOW = loss_spikes.LAG, 40


def _losses(number):
  rng = np.random.default_rng(3)
  return [float(x) for x in 4 + 0.3 * rng.standard_normal(number)]


def _watch(on_spike='continue', number=0):
  config = loss_spikes.SpikeConfig(on_spike, window=_WINDOW, deviations=5)
  watch = loss_spikes.SpikeWatch(config)
  for step, loss in enumerate(_losses(number), start=1):
    _see(watch, step, loss)
  return watch


def _see(watch, step, loss, **metrics):
  # Two target tokens have this loss together.
  watch.see(
    step, {'loss': Mean(jnp.float32(2 * loss), jnp.float32(2)), **metrics}
  )


def test_the_limit_is_that_of_the_formula():
  watch, losses = _watch(number=70), np.array(_losses(70))
  for step in (71, 72, 73):
    before = losses[step - _LAG - _WINDOW : step - _LAG]
    assert len(before) == _WINDOW
    np.testing.assert_allclose(
      watch.limit(step), before.mean() + 5 * before.std(), rtol=1e-6
    )


@pytest.mark.parametrize('number, is_known', [(31, False), (32, True)])
def test_a_few_losses_say_nothing(number, is_known):
  watch = _watch(number=number)
  assert math.isfinite(watch.limit(number + _LAG)) == is_known


def test_losses_that_hardly_vary_have_room():
  watch = loss_spikes.SpikeWatch(loss_spikes.SpikeConfig())
  for step in range(1, 60):
    _see(watch, step, 0.25)
  assert watch.limit(60) == pytest.approx(0.25 + 6 * 0.1)


def test_a_spike_is_told_with_its_batch(capsys):
  watch = _watch(number=50)
  _see(watch, 51, 4.1)
  assert capsys.readouterr().out == ''
  _see(watch, 52, 30.0)
  out = capsys.readouterr().out
  assert out.startswith('Spike: the loss of batch 52 is 30, which is ')
  assert out.endswith('; the run goes on.\n')


def test_the_device_says_what_was_skipped(capsys):
  # Its comparison may round otherwise than that of the host.
  watch = _watch('skip', number=50)
  _see(watch, 51, 4.0, **{loss_spikes.SKIPPED: Mean(1.0, 1.0)})
  assert 'batch 51 is 4,' in (out := capsys.readouterr().out)
  assert out.endswith('; its update was left out.\n')


def test_stopping_says_how_to_go_on():
  watch = _watch('stop', number=50)
  with pytest.raises(
    loss_spikes.LossSpikeError,
    match='must not rise suddenly, but the loss of batch 51 is 30, .* '
    '--on_spike skip',
  ):
    _see(watch, 51, 30.0)


def test_a_new_level_is_the_usual_one_after_a_few_steps(capsys):
  watch = _watch(number=50)
  for step in range(51, 80):
    _see(watch, step, 9.0)
  assert 1 <= capsys.readouterr().out.count('Spike') <= _LAG + 4


def test_a_loss_that_is_not_finite_is_left_to_the_check_of_divergence(capsys):
  watch = _watch('stop', number=50)
  _see(watch, 51, math.nan)
  assert capsys.readouterr().out == ''
  assert math.isfinite(watch.limit(54))


def test_a_restored_watch_has_the_same_limits():
  watch = _watch(number=70)
  restored = loss_spikes.SpikeWatch(watch.config, watch.recent())
  for step in (71, 72, 73):
    assert restored.limit(step) == watch.limit(step)


@pytest.mark.parametrize(
  'change, match',
  [
    ({'on_spike': 'ignore'}, "must be one of .* but is 'ignore'"),
    ({'window': 31}, 'a window of at least 32 losses .* window is 31'),
    ({'deviations': 0.0}, 'deviations is 0.0'),
    ({'deviations': math.nan}, 'deviations is nan'),
  ],
)
def test_configs_that_cannot_work_are_refused(change, match):
  with pytest.raises(ValueError, match=match):
    loss_spikes.SpikeConfig(**change)


def test_metrics_may_be_on_the_device():
  watch = loss_spikes.SpikeWatch(loss_spikes.SpikeConfig())
  mean = jax.jit(lambda: Mean(jnp.float32(6), jnp.float32(4)))()
  watch.see(1, {'loss': mean})
  assert watch.recent() == [[1, 1.5]]
