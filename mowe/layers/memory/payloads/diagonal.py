"""STEM: a row of the memory takes the place of an up-projection."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward, linear, parameter
from mowe.layers.memory.payloads import payload_base


class Diagonal(payload_base.Payload):
  """A gated feed-forward whose second projection is read from the memory.

    result = (act(x wi_0) * row) wo

  So a row is a diagonal matrix between two projections that all tokens share. A
  token without a row gets zeros. Where an address has several slots, each
  holds a share of the hidden units. It stands instead of a feed-forward, and
  needs 4 embed mlp_dim FLOPs a token, where a gated feed-forward needs 6.

  Source: STEM, arXiv 2601.10639.

  Attributes:
    mlp_dim: number of hidden units.
    activation: name of the activation.
    dropout_rate: dropout rate of the hidden units, one mask for all tokens of a
      row.
    dtype: dtype of the computation.
  """

  mlp_dim: int
  activation: str = 'gelu'
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  @property
  def row_init(self) -> parameter.Initializer:
    """See `Payload`.

    The projection that a row replaces has unit variance at the start, as its
    inputs have, and its kernel has variance 1 / embed.
    """
    return parameter.normal(1.0)

  def row_dim(self, embed_dim: int, num_slots: int) -> int:
    """See `Payload.row_dim`."""
    del embed_dim
    return payload_base.share_of(self.mlp_dim, num_slots, 'mlp_dim')

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    rows: payload_base.MemoryRows,
    *,
    embedded: jax.Array | None = None,
    decode: bool = False,
    deterministic: bool = True,
  ) -> jax.Array:
    del embedded, decode
    gate = linear.Dense(
      self.mlp_dim, ('embed', 'mlp'), dtype=self.dtype, name='wi_0'
    )(tokens)
    row = payload_base.joined(rows).astype(self.dtype)
    hidden = feed_forward.activate([gate, row], (self.activation, 'linear'))
    hidden = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
      hidden, deterministic=deterministic
    )
    return linear.Dense(
      tokens.shape[-1], ('mlp', 'embed'), dtype=self.dtype, name='wo'
    )(hidden)
