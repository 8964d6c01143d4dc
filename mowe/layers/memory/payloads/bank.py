"""L3: a token attends to a bank of rows of its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import layer_norm, linear, parameter
from mowe.layers.memory.payloads import payload_base


class Bank(payload_base.Payload):
  """Reads a mean of the values of a bank, weighted by a softmax over its keys.

    w = softmax(K x);  result = norm(w V) W_out

  K and V are the rows that the token named: its bank. A row is a key followed
  by a value, or both at once if they are tied. At the start W_out is zero, so
  that the layer adds nothing. A word expert with a softmax in place of its
  activation is such a bank.

  Source: L3, arXiv 2601.21461, in the residual form of an independent port.

  Attributes:
    read_dim: width of a value; None for the width of the model.
    is_tied: whether a row is key and value at once.
    starts_as_identity: whether W_out is zero at the start.
    norm: factory of the norm of what was read.
    dropout_rate: ignored, as the layer has no dropout.
    dtype: dtype of the computation; the softmax is computed in float32.
  """

  read_dim: int | None = None
  is_tied: bool = False
  starts_as_identity: bool = True
  norm: Callable[..., nn.Module] = layer_norm.LayerNorm
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  @property
  def row_init(self) -> parameter.Initializer:
    """See `Payload`; the reference gives no variance."""
    return parameter.normal(0.05)

  def row_dim(self, embed_dim: int, num_slots: int) -> int:
    """See `Payload.row_dim`."""
    del num_slots
    read_dim = self.read_dim or embed_dim
    if not self.is_tied:
      return embed_dim + read_dim
    if read_dim != embed_dim:
      raise ValueError(
        'Rows that are keys and values at once must have the width of the '
        f'model, {embed_dim}, but read_dim is {read_dim}. Leave it out, or set '
        'is_tied = False.'
      )
    return embed_dim

  def row_flops(self, embed_dim: int, num_slots: int) -> int:
    """See `Payload.row_flops`: scores of all keys, and the mean of values."""
    return 2 * num_slots * (embed_dim + (self.read_dim or embed_dim))

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
    del embedded, decode, deterministic
    read, _ = self.read(tokens, rows)
    return self.mixed(read, tokens, rows)

  def read(
    self, tokens: jax.Array, rows: payload_base.MemoryRows
  ) -> tuple[jax.Array, jax.Array]:
    """Reads the banks.

    Returns:
      What each token read, <dtype>[batch, length, read], and the weights
      <float32>[batch, length, slots], which are 0 where there is no row.
    """
    values = rows.values
    if self.is_tied:
      keys = values
    else:
      keys, values = jnp.split(values, [tokens.shape[-1]], axis=-1)
    scores = jnp.einsum(
      'bte,btse->bts', tokens.astype(self.dtype), keys.astype(self.dtype)
    )
    # A token without any row has weights of 0 instead of a softmax over none.
    weights = jax.nn.softmax(
      scores.astype(jnp.float32), axis=-1, where=rows.exist
    )
    weights = jnp.where(rows.exist, weights, 0)
    read = jnp.einsum(
      'bts,btsr->btr', weights.astype(self.dtype), values.astype(self.dtype)
    )
    return read, weights

  def mixed(
    self, read: jax.Array, tokens: jax.Array, rows: payload_base.MemoryRows
  ) -> jax.Array:
    """Returns what is added to the stream, <dtype>[batch, length, embed]."""
    del rows
    normed = self.norm(dtype=self.dtype, name='norm')(read)
    return self._dense(tokens.shape[-1], 'out')(normed)

  def _dense(self, features, name):
    init = linear.dense_init
    if self.starts_as_identity and name in ('out', 'mix'):
      init = nn.initializers.zeros
    return linear.Dense(
      features, ('unmodeled', 'embed'), init, self.dtype, name=name
    )


class MixedBank(Bank):
  """A bank whose reading is mixed with the token before it is added.

    result = [norm((w V) W_up); x] W_mix

  Source: L3, arXiv 2601.21461. Tokens without a bank get zeros.

  Attributes:
    up_dim: width to which the reading is projected; None for that of the model.

  The other attributes are those of Bank, with W_mix in the place of W_out.
  """

  up_dim: int | None = None

  def mixed(
    self, read: jax.Array, tokens: jax.Array, rows: payload_base.MemoryRows
  ) -> jax.Array:
    """See `Bank.mixed`."""
    embed_dim = tokens.shape[-1]
    up = self._dense(self.up_dim or embed_dim, 'up')(read)
    normed = self.norm(dtype=self.dtype, name='norm')(up)
    both = jnp.concatenate([normed, tokens.astype(self.dtype)], axis=-1)
    outputs = self._dense(embed_dim, 'mix')(both)
    return jnp.where(rows.exist.any(axis=-1)[..., None], outputs, 0)
