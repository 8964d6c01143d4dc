"""Per-layer embeddings, as in Gemma 3n and Gemma 4."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward, layer_norm, linear, parameter
from mowe.layers.memory.payloads import payload_base


class PerLayerEmbedding(payload_base.Payload):
  """Each block mixes an embedding of its own into the stream, through a gate.

  With x, the tokens before the first block, and h, the tokens of this block:

    c = (sqrt(row) e + norm((x W) / sqrt(embed))) / sqrt(2)
    result = norm((act(h W_gate) * c) W_up)

  It stands after the feed-forward. At the start the scale of the last norm is
  zero, so that the layer adds nothing. (With a W_up of zero the norm would make
  its first gradients a thousand times larger.)

  Source: the Gemma3nTextModel and Gemma4TextModel of Hugging Face's
  transformers. Gemma's blocks share the scale of the norm of x W; here each
  block has its own.

  Attributes:
    memory_dim: how many numbers the rows of a token have together.
    activation: name of the activation of the gate.
    starts_as_identity: whether the scale of the last norm is zero at the start.
    norm_epsilon: added to mean squares.
    dropout_rate: ignored, as the layer has no dropout.
    dtype: dtype of the computation.
  """

  memory_dim: int
  activation: str = 'gelu'
  starts_as_identity: bool = True
  norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  @property
  def row_init(self) -> parameter.Initializer:
    """See `Payload`; sqrt(row) times a row has unit variance."""
    return parameter.normal(1 / math.sqrt(self.memory_dim))

  def row_dim(self, embed_dim: int, num_slots: int) -> int:
    """See `Payload.row_dim`."""
    del embed_dim
    return payload_base.share_of(self.memory_dim, num_slots, 'memory_dim')

  def __call__(
    self,
    tokens: jax.Array,
    rows: payload_base.MemoryRows,
    *,
    embedded: jax.Array,
    decode: bool = False,
    deterministic: bool = True,
  ) -> jax.Array:
    del decode, deterministic
    return self.gated(tokens, self.mixed(rows, embedded))

  @nn.compact
  def mixed(
    self, rows: payload_base.MemoryRows, embedded: jax.Array
  ) -> jax.Array:
    """Returns the rows with what the tokens say themselves.

    Args:
      rows: the rows that the tokens named.
      embedded: <float>[batch, length, embed], the tokens before the first
        block.

    Returns:
      <dtype>[batch, length, memory_dim].
    """
    row = math.sqrt(self.memory_dim) * payload_base.joined(rows)
    own = self._dense(self.memory_dim, ('embed', 'mlp'), 'own')(embedded)
    own = layer_norm.LayerNorm(
      self.norm_epsilon, dtype=self.dtype, name='own_norm'
    )(own / math.sqrt(embedded.shape[-1]))
    return (row.astype(self.dtype) + own) / math.sqrt(2)

  @nn.compact
  def gated(self, tokens: jax.Array, mixed: jax.Array) -> jax.Array:
    """Returns what is added to the stream, <dtype>[batch, length, embed].

    Args:
      tokens: <float>[batch, length, embed].
      mixed: <float>[batch, length, memory_dim], as from `mixed`.
    """
    gate = self._dense(self.memory_dim, ('embed', 'mlp'), 'gate')(tokens)
    hidden = feed_forward.activate([gate, mixed], (self.activation, 'linear'))
    up = self._dense(tokens.shape[-1], ('mlp', 'embed'), 'up')(hidden)
    return layer_norm.LayerNorm(
      self.norm_epsilon, self.starts_as_identity, self.dtype, name='norm'
    )(up)

  def _dense(self, features, axes, name):
    return linear.Dense(features, axes, dtype=self.dtype, name=name)
