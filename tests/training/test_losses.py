"""Tests cross entropy against float64 numpy: smoothing, z-loss, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.training import losses

_BATCH, _LENGTH, _VOCAB = 2, 3, 7
_SETTINGS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-2)]


def _inputs(seed=0):
  rng = np.random.default_rng(seed)
  logits = 3 * rng.normal(size=(_BATCH, _LENGTH, _VOCAB))
  targets = rng.integers(0, _VOCAB, (_BATCH, _LENGTH))
  return logits, targets


def _soft_targets(targets, smoothing):
  """T5X's targets: `1 - smoothing` for the right token, the rest is shared."""
  soft = np.full((*targets.shape, _VOCAB), smoothing / (_VOCAB - 1))
  np.put_along_axis(soft, targets[..., None], 1.0 - smoothing, axis=-1)
  return soft


def _expected(logits, targets, smoothing, z_loss):
  """T5X's definition: -sum p log q, minus the entropy of p."""
  log_z = np.log(np.exp(logits).sum(-1))
  soft = _soft_targets(targets, smoothing)
  entropy = -(soft * np.log(soft, where=soft > 0, out=np.zeros_like(soft)))
  cross = -(soft * (logits - log_z[..., None])).sum(-1)
  return cross - entropy.sum(-1), z_loss * log_z**2


def _expected_gradient(logits, targets, smoothing, z_loss):
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
  soft = _soft_targets(targets, smoothing)
  return probs - soft + 2 * z_loss * log_z * probs


@pytest.mark.slow
@pytest.mark.parametrize(('smoothing', 'z_loss'), _SETTINGS)
def test_values_and_gradients_are_those_of_the_definition(smoothing, z_loss):
  logits, targets = _inputs()
  settings = {'label_smoothing': smoothing, 'z_loss': z_loss}
  low = jnp.asarray(logits, jnp.float32)
  entropy, z = losses.cross_entropy(low, jnp.asarray(targets), **settings)
  expected = _expected(logits, targets, smoothing, z_loss)
  np.testing.assert_allclose(entropy, expected[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(z, expected[1], rtol=1e-5)
  gradient = jax.grad(
    lambda x: sum(
      jnp.sum(part)
      for part in losses.cross_entropy(x, jnp.asarray(targets), **settings)
    )
  )(low)
  np.testing.assert_allclose(
    gradient,
    _expected_gradient(logits, targets, smoothing, z_loss),
    rtol=1e-5,
    atol=1e-6,
  )


def test_uniform_logits_by_hand():
  # The four logits are all 2, so q is 1/4 and log Z is 2 + log 4.
  logits = jnp.full((1, 1, 4), 2.0)
  entropy, z = losses.cross_entropy(
    logits, jnp.array([[3]]), z_loss=0.5, label_smoothing=0.0
  )
  np.testing.assert_allclose(entropy, [[np.log(4)]], rtol=1e-6)
  np.testing.assert_allclose(z, [[0.5 * (2 + np.log(4)) ** 2]], rtol=1e-6)


def test_predicting_the_smoothed_target_costs_nothing():
  _, targets = _inputs()
  logits = np.log(_soft_targets(targets, 0.2))
  entropy, _ = losses.cross_entropy(
    jnp.asarray(logits, jnp.float32),
    jnp.asarray(targets),
    label_smoothing=0.2,
  )
  np.testing.assert_allclose(entropy, 0.0, atol=1e-6)


def test_large_logits_stay_finite():
  logits = jnp.array([[[1e4, -1e4, 0.0]]])
  entropy, z = losses.cross_entropy(
    logits, jnp.array([[1]]), label_smoothing=0.1, z_loss=1e-4
  )
  # Here log Z is 1e4. The smoothed target has 0.9 at the logit -1e4, and 0.05
  # each at 1e4 and at 0.
  constant = -(0.9 * np.log(0.9) + 2 * 0.05 * np.log(0.05))
  np.testing.assert_allclose(
    entropy, [[1e4 + 0.9e4 - 0.05e4 - constant]], rtol=1e-6
  )
  np.testing.assert_allclose(z, [[1e-4 * 1e8]], rtol=1e-6)
