"""Over-Encoding: n-grams are added to the embedding of a token."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import linear, parameter
from mowe.layers.memory.payloads import payload_base


class NGramEmbedding(payload_base.Payload):
  """Adds projections of the rows of a token to its embedding.

    result = embedding + sum over slots of row_s W_s

  It stands at the input of a stack. Each slot has a projection of its own.

  Sources: Over-Encoding, arXiv 2501.16975, takes the sum of the embedding and
  the rows. LongCat, arXiv 2601.21204, takes their mean (`is_mean`), and
  amplifies it.

  Attributes:
    memory_dim: how many numbers the rows of a token have together.
    is_mean: whether the sum of embedding and rows is divided by their number.
    amplification: factory of a module that the result goes through, such as a
      norm or `TimesRoot`; None for none.
    dropout_rate: ignored, as the layer has no dropout.
    dtype: dtype of the computation.
  """

  memory_dim: int
  is_mean: bool = False
  amplification: Callable[..., nn.Module] | None = None
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  # The result takes the place of the embedding.
  adds = False

  @property
  def row_init(self) -> parameter.Initializer:
    """See `Payload`."""
    return parameter.normal(1 / math.sqrt(self.memory_dim))

  def row_dim(self, embed_dim: int, num_slots: int) -> int:
    """See `Payload.row_dim`."""
    del embed_dim
    return payload_base.share_of(self.memory_dim, num_slots, 'memory_dim')

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
    # One product of all rows one after another: its kernel has the projections
    # of the slots one below another.
    added = linear.Dense(
      tokens.shape[-1], ('unmodeled', 'embed'), dtype=self.dtype, name='proj'
    )(payload_base.joined(rows))
    outputs = tokens.astype(self.dtype) + added
    if self.is_mean:
      outputs = outputs / (1 + rows.values.shape[2])
    if self.amplification is None:
      return outputs
    return self.amplification(dtype=self.dtype, name='amplification')(outputs)


class TimesRoot(nn.Module):
  """Multiplies tokens <float>[..., embed] by sqrt(embed)."""

  dtype: Any = jnp.float32

  def __call__(self, tokens: jax.Array) -> jax.Array:
    return (tokens * math.sqrt(tokens.shape[-1])).astype(self.dtype)
