"""Token embedding: reads vectors by id, and computes tied logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import parameter


class Embedding(nn.Module):
  """Table of token vectors.

  Rows are gathered. T5X multiplies one-hot vectors with the table instead,
  which costs as much as computing the logits.

  Attributes:
    vocab_size: number of rows of the table.
    embed_dim: width of the model.
    dtype: dtype of the vectors that are read; the table itself is float32.
    stddev: standard deviation of the numbers in a fresh table.

  Call: ids <int32>[batch, length] to <dtype>[batch, length, embed]. An id out
    of range reads the nearest row.
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
    """Returns the vectors of two arrays of ids.

    The table is read once for both, so that its gradient is one array of its
    size instead of two.

    The rows of a batch lie on different devices, so both are joined along their
    length: along the batch, ids would have to travel.

    Args:
      ids: <int32>[batch, length], token ids.
      others: <int32>[batch, other length], token ids.

    Returns:
      <dtype>[batch, length, embed] for `ids`, and the same for `others`.
    """
    vectors = self(jnp.concatenate([ids, others], axis=1))
    return vectors[:, : ids.shape[1]], vectors[:, ids.shape[1] :]

  def attend(self, tokens: jax.Array) -> jax.Array:
    """Returns the logits of tied embeddings, as in T5 1.0.

    Args:
      tokens: <float>[batch, length, embed], outputs of the decoder.

    Returns:
      <float32>[batch, length, vocab].
    """
    # The rows have unit variance, so logits would grow with the root of the
    # width. The T5 of Mesh TensorFlow divides them by that root as well.
    tokens = tokens.astype(jnp.float32) * self.embed_dim**-0.5
    return jnp.einsum('blm,vm->blv', tokens, self.embedding)
