"""Cross entropy with label smoothing and z-loss, as sums over tokens."""

import jax
import jax.numpy as jnp
import numpy as np


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy of each token, and its z-loss.

  Source: T5X's loss. Smoothed targets give `label_smoothing` to the wrong
  tokens together; the entropy of the smoothed target is subtracted, so that a
  perfect prediction costs nothing. z-loss: `z_loss` * log(Z)^2, Mesh
  TensorFlow.

  Args:
    logits: <float32>[batch, length, vocab].
    targets: <int32>[batch, length].
    label_smoothing: probability mass of all wrong tokens.
    z_loss: coefficient.

  Returns:
    <float32>[batch, length] cross entropy and z-loss, not yet weighted.
  """
  vocab = logits.shape[-1]
  log_z = jax.scipy.special.logsumexp(logits, axis=-1)
  # A comparison instead of a gather: its transpose is no scatter.
  is_target = jnp.arange(vocab)[None, None] == targets[..., None]
  right = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  if not label_smoothing:
    return log_z - right, z_loss * jnp.square(log_z)
  confidence = 1.0 - label_smoothing
  low = label_smoothing / (vocab - 1)
  entropy = -(
      confidence * np.log(confidence)
      + (vocab - 1) * low * np.log(low + 1e-20)
  )
  # The smoothed target sums to one, so log_z appears once.
  mixed = low * jnp.sum(logits, axis=-1) + (confidence - low) * right
  return log_z - mixed - entropy, z_loss * jnp.square(log_z)
