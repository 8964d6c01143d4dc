"""Token embedding, read by id and, for tied logits, attended to."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import parameter


class Embedding(nn.Module):
  """Table of token vectors.

  Rows are gathered: T5X multiplies with one-hot vectors instead, which costs
  as much as the logits do.

  Call: ids <int32>[batch, length] to <dtype>[batch, length, embed].
  """

  vocab_size: int
  embed_dim: int
  dtype: Any = jnp.float32
  stddev: float = 1.0

  def setup(self):
    self.embedding = parameter.declare(
      self,
      'embedding',
      parameter.normal(stddev=self.stddev),
      (self.vocab_size, self.embed_dim),
      axes=('vocab', 'embed'),
    )

  def __call__(self, ids: jax.Array) -> jax.Array:
    return jnp.take(self.embedding, ids, axis=0, mode='clip').astype(self.dtype)

  def both(
    self, ids: jax.Array, others: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Vectors of two arrays of ids: one gradient of the table, not two."""
    vectors = self(jnp.concatenate([ids.reshape(-1), others.reshape(-1)]))
    return (
      vectors[: ids.size].reshape(*ids.shape, -1),
      vectors[ids.size :].reshape(*others.shape, -1),
    )

  def attend(self, tokens: jax.Array) -> jax.Array:
    """Logits <float32>[batch, length, vocab] of tied embeddings (T5 1.0)."""
    # Rescaled because the rows have unit variance: Mesh TensorFlow's T5.
    tokens = tokens.astype(jnp.float32) * self.embed_dim**-0.5
    return jnp.einsum('blm,vm->blv', tokens, self.embedding)
