"""Engram: a vector from the memory, as far as a gate lets it in."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import linear, parameter
from mowe.layers.memory.payloads import causal_convolution, payload_base

# Added to the mean squares of the convolution's inputs, as in Engram's demo.
_CONVOLUTION_EPSILON = 1e-5

# Sizes from here on are refused, as a config may come from a stranger.
_LARGEST = 2**20
_LONGEST = 64


class GatedVector(payload_base.Payload):
  """Adds what a token remembers, weighted by how well it fits the token.

  With e, all rows of a token one after another, and h, the token:

    key = e W_k;  value = e W_v
    s = <norm(h), norm(key)> / sqrt(embed)
    u = sigmoid(sign(s) sqrt(|s|)) value
    result = u, or u + silu(convolution(norm(u)))

  At the start W_v is zero, so that the layer adds nothing.

  Source: Engram, arXiv 2601.07372, and its demo. The paper's formula has no
  root, the demo has, and so has what went into production, which has no
  convolution.

  Attributes:
    memory_dim: how many numbers the rows of a token have together.
    signed_root: whether the gate takes the signed root of the score.
    convolution_size: how many tokens the convolution sums; 0 for none.
    convolution_dilation: distance between two of them, in tokens.
    num_branches: how many streams of tokens read the same rows, each with a
      key and a gate of its own. With more than one, tokens are <float>[batch,
      length, branches, embed].
    use_bias: whether keys and values have biases.
    starts_as_identity: whether W_v is zero at the start.
    norm_epsilon: added to the mean squares of tokens and keys.
    dropout_rate: ignored, as the layer has no dropout.
    dtype: dtype of the computation; the gate is computed in float32.
  """

  memory_dim: int
  signed_root: bool = True
  convolution_size: int = 0
  convolution_dilation: int = 3
  num_branches: int = 1
  use_bias: bool = False
  starts_as_identity: bool = True
  norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  def __post_init__(self):
    sizes = self.memory_dim, self.num_branches, self.convolution_dilation
    if not (
      all(1 <= size < _LARGEST for size in sizes)
      and 0 <= self.convolution_size <= _LONGEST
    ):
      raise ValueError(
        'memory_dim, num_branches and convolution_dilation must be from 1 to '
        f'{_LARGEST - 1} and convolution_size from 0 to {_LONGEST}, but they '
        f'are {sizes} and {self.convolution_size}. Engram has 1280, 1, 3 and 4.'
      )
    super().__post_init__()

  @property
  def looks_back(self) -> bool:
    """See `Payload`."""
    return self.convolution_size > 1

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
    del embedded, deterministic
    embed_dim = tokens.shape[-1]
    if tokens.ndim == 3 and self.num_branches > 1:
      raise ValueError(
        'Tokens must be [batch, length, branches, embed] for num_branches = '
        f'{self.num_branches}, but have the shape {tokens.shape}. The models of '
        'this package have one stream: leave num_branches at 1.'
      )
    streams = tokens.reshape(*tokens.shape[:2], self.num_branches, embed_dim)
    remembered = payload_base.joined(rows).astype(self.dtype)
    gate = self._gate(streams, remembered)
    value = self._dense(embed_dim, 'value', self.starts_as_identity)
    outputs = gate[..., None] * value(remembered)[:, :, None, :]
    # Padding has no row, and must not reach the convolution of later tokens.
    exist = rows.exist.any(axis=-1)[:, :, None, None]
    outputs = jnp.where(exist, outputs, 0)
    if self.convolution_size:
      normed = self._normed(outputs, 'convolution_norm', _CONVOLUTION_EPSILON)
      outputs += nn.silu(
        causal_convolution.CausalConvolution(
          self.convolution_size,
          self.convolution_dilation,
          self.dtype,
          name='convolution',
        )(normed.astype(self.dtype), rows.segment_ids, decode=decode)
      )
    return outputs.reshape(tokens.shape)

  def _gate(self, streams, remembered):
    """How much of the value each stream takes, [batch, length, branches]."""
    embed_dim = streams.shape[-1]
    key = self._dense(self.num_branches * embed_dim, 'key')(remembered)
    key = self._normed(key.reshape(streams.shape), 'key_norm')
    query = self._normed(streams, 'query_norm')
    score = jnp.sum(query * key, axis=-1) / math.sqrt(embed_dim)
    if self.signed_root:
      # The floor keeps the gradient of the root finite. A score of 0 stays 0.
      size = jnp.maximum(jnp.abs(score), 1e-6)
      score = jnp.sign(score) * jnp.sqrt(size)
    return nn.sigmoid(score).astype(self.dtype)

  def _normed(self, streams, name, epsilon=None):
    """Divides by the root mean square, in float32, and scales."""
    scale = parameter.declare(
      self,
      name,
      nn.initializers.ones,
      streams.shape[-2:],
      axes=('unmodeled', 'embed'),
    )
    streams = streams.astype(jnp.float32)
    mean = jnp.mean(jnp.square(streams), axis=-1, keepdims=True)
    epsilon = self.norm_epsilon if epsilon is None else epsilon
    return streams * jax.lax.rsqrt(mean + epsilon) * scale[None, None]

  def _dense(self, features, name, is_zero=False):
    init = nn.initializers.zeros if is_zero else linear.dense_init
    return linear.Dense(
      features,
      ('unmodeled', 'embed'),
      init,
      self.dtype,
      self.use_bias,
      name=name,
    )
