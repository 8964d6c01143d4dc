"""Sizes and parts of a decoder-only model, checked when put together."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward, layer_norm
from mowe.layers.attention import self_attention
from mowe.models import model_config, token_memories
from mowe.words.addresses import expert_address


@dataclasses.dataclass(frozen=True)
class DecoderOnlyConfig:
  """Sizes and parts of a language model with one stack.

  Attributes:
    vocab_size: number of rows of the embedding; at least the subword
      vocabulary's size.
    emb_dim: width of the model, the size of one token's activation.
    num_heads: number of attention heads in each block.
    head_dim: size of the queries, keys and values of one head.
    mlp_dim: number of hidden units of a dense feed-forward.
    num_layers: number of blocks.
    mlp_activations: names of the activations of a dense feed-forward:
      ('gelu', 'linear') if it is gated, ('relu',) if it is not.
    logits_via_embedding: whether the logits are products with the embedding;
      otherwise they have a kernel of their own.
    logits_bias: whether that kernel of the logits has a bias.
    dropout_rate: dropout probability in all layers.
    dtype: dtype of activations, float32 or bfloat16; parameters are float32.
    remat: whether the backward pass recomputes the activations of each block
      instead of keeping them in memory.
    attention: factory of the self-attention of a block: one of
      `self_attention`, or `relative_attention.RelativeAttention`, or
      `mixture_of_heads.MixtureOfSelfAttentionHeads`.
    norm: factory of the layer norms.
    prefix_lm: whether the inputs of an example attend to each other in both
      directions; its targets attend to earlier tokens only in any case.
    memory_length: number of earlier tokens of the same row, from the batches
      before, that a batch attends to as in Transformer-XL. Training and
      evaluation carry them from batch to batch; 0 is no memory.
    embedding_stddev: standard deviation of a freshly drawn embedding.
    sparse_feed_forward: factory of the sparse feed-forwards; None if all
      feed-forwards are dense.
    sparse_decoder_layers: numbers, from 0, of the blocks whose feed-forward is
      sparse.
    routing: makes routing ids where the batch has none. If it is None, layers
      that can be routed by token get the token ids, -1 for padding.
    expert_names: makes routing ids in its place, by an address; None for the
      experts of words.
    block_layers: pairs of a place and a factory, for layers of single blocks
      that differ from the others; see `model_config.ModelConfig`.
    memories: memories that are addressed by the tokens.

  Raises:
    ValueError: sizes or parts that cannot work together.
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  num_layers: int
  mlp_activations: tuple[str, ...] = ('gelu', 'linear')
  logits_via_embedding: bool = False
  logits_bias: bool = False
  dropout_rate: float = 0.1
  dtype: Any = jnp.float32
  remat: bool = False
  attention: model_config.Factory = self_attention.T5Attention
  norm: model_config.Factory = layer_norm.LayerNorm
  prefix_lm: bool = False
  memory_length: int = 0
  embedding_stddev: float = 1.0
  sparse_feed_forward: model_config.Factory | None = None
  sparse_decoder_layers: tuple[int, ...] = ()
  routing: model_config.Routing | None = None
  expert_names: expert_address.ExpertAddress | None = None
  block_layers: tuple[tuple[str, model_config.Factory], ...] = ()
  memories: tuple[token_memories.Memory, ...] = ()

  # Inputs and targets go through the same stack.
  streams = ('decoder',)
  layer_fields = types.MappingProxyType(
    {
      ('decoder', 'self_attention'): 'attention',
      ('decoder', 'mlp'): 'sparse_feed_forward',
    }
  )

  shared_fields = types.MappingProxyType({})

  def __post_init__(self):
    dtype = model_config.activation_dtype(self.dtype)
    object.__setattr__(self, 'dtype', dtype)
    feed_forward.check_activations(self.mlp_activations)
    model_config.check_blocks(
      'decoder', self.sparse_decoder_layers, self.num_layers
    )
    model_config.check_block_layers(self)
    if bool(self.sparse_decoder_layers) != (
      self.sparse_feed_forward is not None
    ):
      raise ValueError(
        'sparse_feed_forward and sparse_decoder_layers must be given together, '
        f'but are {self.sparse_feed_forward} and {self.sparse_decoder_layers}. '
        'Set both or neither.'
      )
    if self.logits_bias and self.logits_via_embedding:
      raise ValueError(
        'logits_bias needs logits with a kernel of their own, but '
        'logits_via_embedding is True. Leave one of the two out.'
      )
    model_config.check_layers(self)
    model_config.check_attentions(self)
    self._check_memory()
    token_memories.check_memories(self)

  def _check_memory(self):
    if self.memory_length < 0:
      raise ValueError(
        f'memory_length must not be negative, but is {self.memory_length}. '
        'Set it to a number of tokens; 0 is no memory.'
      )
    one_way = self.make_attention().looks_back_only
    if self.prefix_lm and (one_way or self.memory_length):
      raise ValueError(
        'With prefix_lm the inputs of an example see later inputs too, so the '
        'attention must not look back only and memory_length must be 0, but '
        f'one of the two is not so (memory_length is {self.memory_length}). '
        'Use T5Attention or RotaryAttention and memory_length 0, or leave '
        'prefix_lm out.'
      )

  def of_block(self, stream: str, number: int) -> 'DecoderOnlyConfig':
    """Returns the config of one block, with its own `block_layers` applied.

    Args:
      stream: the only stream, 'decoder'.
      number: number of the block, counted from 0.
    """
    return model_config.of_block(self, stream, number)

  def depths(self) -> dict[str, int]:
    """See `model_config.ModelConfig`."""
    return {'decoder': self.num_layers}

  def sparse_blocks(self) -> dict[str, tuple[int, ...]]:
    """The blocks whose feed-forward is sparse."""
    return {'decoder': self.sparse_decoder_layers}

  def sparse_layers(self) -> dict[str, nn.Module]:
    """A sparse layer; {} if there is none."""
    if self.sparse_feed_forward is None:
      return {}
    layer = self.sparse_feed_forward(
      dropout_rate=self.dropout_rate, dtype=self.dtype, parent=None
    )
    return {'decoder': layer}

  def attentions(self) -> dict[str, nn.Module]:
    """The attention of every block, by its name there."""
    return {'self_attention': self.make_attention()}

  def parts(self) -> dict[str, nn.Module]:
    """See `model_config.ModelConfig`."""
    parts = {'attention': self.make_attention(), 'norm': self.make_norm()}
    if self.sparse_feed_forward is not None:
      parts['sparse_feed_forward'] = self.sparse_layers()['decoder']
    return parts

  def with_layer_changes(self, **changes: Any) -> 'DecoderOnlyConfig':
    """Returns a config whose sparse layers have other values of some fields.

    Args:
      **changes: new values by field. Layers that lack a field stay as they are.
    """
    return dataclasses.replace(
      self,
      sparse_feed_forward=model_config.changed_factory(
        self.sparse_feed_forward, changes
      ),
      block_layers=model_config.changed_block_layers(self, changes),
      memories=token_memories.with_changes(self.memories, changes),
    )

  def check_mesh(
    self,
    mesh_shape: Mapping[str, int],
    batch_size: int,
    lengths: Mapping[str, int],
  ) -> None:
    """See `model_config.check_mesh`; inputs and targets are in one row."""
    model_config.check_mesh(
      self,
      mesh_shape,
      batch_size,
      {'decoder': lengths.get('inputs', 0) + lengths['targets']},
    )

  def initial_memory(self, batch_size: int) -> dict[str, Any]:
    """The collection MEMORY before the first batch: no token in it is real."""
    shape = (batch_size, self.memory_length, self.emb_dim)
    blocks = {
      f'layers_{i}': {'tokens': jnp.zeros(shape, self.dtype)}
      for i in range(self.num_layers)
    }
    return {'decoder': {'real': jnp.zeros(shape[:2], bool), **blocks}}

  def make_attention(self) -> nn.Module:
    """The self-attention of a block."""
    return self.attention(
      num_heads=self.num_heads,
      head_dim=self.head_dim,
      dropout_rate=self.dropout_rate,
      dtype=self.dtype,
      parent=None,
    )

  def make_norm(self) -> nn.Module:
    """A layer norm."""
    return self.norm(dtype=self.dtype, parent=None)

  def make_feed_forward(
    self, number: int, shared: dict[str, nn.Module]
  ) -> nn.Module:
    """The feed-forward of a block, with shared modules that it uses."""
    if number not in self.sparse_decoder_layers:
      return feed_forward.DenseFeedForward(
        self.mlp_dim,
        self.mlp_activations,
        self.dropout_rate,
        self.dtype,
        parent=None,
      )
    return model_config.with_shared(self.sparse_layers()['decoder'], shared)

  def make_shared(self) -> dict[str, nn.Module]:
    """Modules shared by all sparse layers, such as a table of experts."""
    return model_config.shared_modules(
      self.sparse_layers().values(), self.emb_dim
    )
