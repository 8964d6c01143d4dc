"""Experts that see nothing but a token's own row (MoLE), and their table."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward, layer_norm, linear, parameter
from mowe.layers.memory.payloads import payload_base


class LookupMixture(payload_base.Payload):
  """Mixes the vectors of a token's row by a softmax over what the token says.

    result = sum over k of softmax(x W_router)_k row_k

  It is the form of MoLE for inference, where a row holds the outputs of all
  experts for its token, and stands beside a feed-forward. `baked_experts` makes
  it of a model with `LookupExperts`.

  Source: MoLE, arXiv 2503.15798.

  Attributes:
    num_experts: number of vectors of a row.
    dropout_rate: ignored, as the layer has no dropout.
    dtype: dtype of the computation; the softmax is computed in float32.
  """

  num_experts: int
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  @property
  def row_init(self) -> parameter.Initializer:
    """See `Payload`; the reference draws no table."""
    return parameter.normal(0.05)

  def row_dim(self, embed_dim: int, num_slots: int) -> int:
    """See `Payload.row_dim`."""
    payload_base.one_slot(num_slots, type(self).__name__)
    return self.num_experts * embed_dim

  def row_flops(self, embed_dim: int, num_slots: int) -> int:
    """See `Payload.row_flops`: the weighted sum."""
    return 2 * self.num_experts * embed_dim

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
    scores = linear.Dense(
      self.num_experts, ('embed', 'unmodeled'), dtype=self.dtype, name='router'
    )(tokens)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    outputs = self.outputs_of_experts(rows.values[..., 0, :])
    mixed = jnp.einsum('btk,btke->bte', weights.astype(self.dtype), outputs)
    return jnp.where(rows.exist, mixed, 0)

  def outputs_of_experts(self, rows: jax.Array) -> jax.Array:
    """Returns what all experts give for rows.

    Args:
      rows: <float>[..., row].

    Returns:
      <dtype>[..., experts, embed].
    """
    vectors = rows.reshape(*rows.shape[:-1], self.num_experts, -1)
    return vectors.astype(self.dtype)


class LookupExperts(LookupMixture):
  """The form of MoLE for training: each vector is the output of an expert.

    row_k = act(norm(row) W_up,k) W_down,k

  A row is as wide as the model, and is all that experts see of a token. So
  their outputs can be computed once for every row, which gives the table of a
  `LookupMixture`. Until then a token pays for all experts.

  In MoLE a row is the token's input embedding; here it is trained by itself.

  Attributes:
    expert_dim: number of hidden units of an expert.
    activation: name of the activation.
    norm_epsilon: added to mean squares.

  The other attributes are those of LookupMixture.
  """

  expert_dim: int = 0
  activation: str = 'gelu_exact'
  norm_epsilon: float = 1e-6

  @property
  def row_init(self) -> parameter.Initializer:
    """See `Payload`; rows are normed before they are read."""
    return parameter.normal(1.0)

  def row_dim(self, embed_dim: int, num_slots: int) -> int:
    """See `Payload.row_dim`."""
    payload_base.one_slot(num_slots, type(self).__name__)
    if self.expert_dim < 1:
      raise ValueError(
        'expert_dim must be at least 1, but is '
        f'{self.expert_dim}. Set the hidden units of an expert.'
      )
    return embed_dim

  def row_flops(self, embed_dim: int, num_slots: int) -> int:
    """See `Payload.row_flops`: two products of each expert, and their sum."""
    products = 2 * self.num_experts * 2 * embed_dim * self.expert_dim
    return products + super().row_flops(embed_dim, num_slots)

  @nn.compact
  def outputs_of_experts(self, rows: jax.Array) -> jax.Array:
    """See `LookupMixture.outputs_of_experts`."""
    embed = rows.shape[-1]
    normed = layer_norm.LayerNorm(
      self.norm_epsilon, dtype=self.dtype, name='expert_norm'
    )(rows)

    def kernel(name, inputs, outputs, axes):
      return parameter.declare(
        self,
        name,
        parameter.normal(1 / math.sqrt(inputs)),
        (self.num_experts, inputs, outputs),
        axes=('unmodeled', *axes),
      ).astype(self.dtype)

    up = kernel('up', embed, self.expert_dim, ('embed', 'mlp'))
    down = kernel('down', self.expert_dim, embed, ('mlp', 'embed'))
    hidden = jnp.einsum('...e,kem->...km', normed, up)
    hidden = feed_forward.activate([hidden], (self.activation,))
    return jnp.einsum('...km,kme->...ke', hidden, down)
