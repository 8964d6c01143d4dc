"""Sizes and parts of a T5, checked when they are put together."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward
from mowe.layers.attention import multi_head
from mowe.models import model_config, token_memories
from mowe.words.addresses import expert_address

Routing = model_config.Routing


def default_dtype() -> str:
  """Returns what `model_config.default_dtype` does.

  It is a function of its own, so that gin writes its name in one way, whatever
  other gin files were read before.
  """
  return model_config.default_dtype()


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes and parts of a T5.

  Attributes:
    vocab_size: number of rows of the embedding; at least the subword
      vocabulary's size.
    emb_dim: width of the model, the size of one token's activation.
    num_heads: number of attention heads in each block.
    head_dim: size of the queries, keys and values of one head.
    mlp_dim: number of hidden units of a dense feed-forward.
    num_encoder_layers: number of encoder blocks.
    num_decoder_layers: number of decoder blocks.
    mlp_activations: ('gelu', 'linear') for T5 1.1, ('relu',) for T5 1.0.
    logits_via_embedding: whether the logits are products with the embedding, as
      in T5 1.0; otherwise they have a kernel of their own.
    dropout_rate: dropout probability in all layers.
    dtype: dtype of activations, float32 or bfloat16; parameters are float32.
    remat: whether the backward pass recomputes the activations of each block
      instead of keeping them in memory.
    attention: factory of the attention layers: MultiHeadAttention, or
      `mixture_of_heads.MixtureOfAttentionHeads`.
    encoder_attention: factory of the encoder's self-attention; None if
      `attention` makes it.
    decoder_attention: factory of the decoder's self-attention; None if
      `attention` makes it.
    sparse_feed_forward: factory of the sparse feed-forwards; None if all
      feed-forwards are dense.
    sparse_decoder_feed_forward: factory of the decoder's sparse feed-forwards,
      for example because the encoder's router looks ahead; None if
      `sparse_feed_forward` makes them too.
    sparse_encoder_layers: numbers, from 0, of the encoder blocks whose
      feed-forward is sparse.
    sparse_decoder_layers: numbers, from 0, of the decoder blocks whose
      feed-forward is sparse.
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
  num_encoder_layers: int
  num_decoder_layers: int
  mlp_activations: tuple[str, ...] = ('gelu', 'linear')
  logits_via_embedding: bool = False
  dropout_rate: float = 0.1
  dtype: Any = jnp.float32
  remat: bool = False
  attention: model_config.Factory = multi_head.MultiHeadAttention
  encoder_attention: model_config.Factory | None = None
  decoder_attention: model_config.Factory | None = None
  sparse_feed_forward: Callable[..., nn.Module] | None = None
  sparse_decoder_feed_forward: Callable[..., nn.Module] | None = None
  sparse_encoder_layers: tuple[int, ...] = ()
  sparse_decoder_layers: tuple[int, ...] = ()
  routing: Routing | None = None
  expert_names: expert_address.ExpertAddress | None = None
  block_layers: tuple[tuple[str, model_config.Factory], ...] = ()
  memories: tuple[token_memories.Memory, ...] = ()

  def __post_init__(self):
    dtype = model_config.activation_dtype(self.dtype)
    object.__setattr__(self, 'dtype', dtype)
    feed_forward.check_activations(self.mlp_activations)
    for stream, blocks in self.sparse_blocks().items():
      model_config.check_blocks(stream, blocks, self.depths()[stream])
    model_config.check_block_layers(self)
    has_layers = bool(self.sparse_encoder_layers or self.sparse_decoder_layers)
    if has_layers != (self.sparse_feed_forward is not None):
      raise ValueError(
        'sparse_feed_forward and the sparse layers must be given together, '
        f'but sparse_feed_forward is {self.sparse_feed_forward}, '
        f'sparse_encoder_layers is {self.sparse_encoder_layers} and '
        f'sparse_decoder_layers is {self.sparse_decoder_layers}. Set both or '
        'neither.'
      )
    model_config.check_layers(self)
    model_config.check_attentions(self)
    token_memories.check_memories(self)

  # The inputs go through the encoder, the targets through the decoder.
  streams = ('encoder', 'decoder')
  # No batch attends to an earlier one.
  memory_length = 0
  layer_fields = types.MappingProxyType(
    {
      ('encoder', 'mlp'): 'sparse_feed_forward',
      ('decoder', 'mlp'): 'sparse_decoder_feed_forward',
      ('encoder', 'attention'): 'encoder_attention',
      ('decoder', 'self_attention'): 'decoder_attention',
      ('decoder', 'encoder_decoder_attention'): 'attention',
    }
  )
  # If the first field is None, the factory of the second makes its layers.
  shared_fields = types.MappingProxyType(
    {
      'sparse_decoder_feed_forward': 'sparse_feed_forward',
      'encoder_attention': 'attention',
      'decoder_attention': 'attention',
    }
  )

  def of_block(self, stream: str, number: int) -> 'T5Config':
    """Returns the config of one block, with its own `block_layers` applied.

    Args:
      stream: 'encoder' or 'decoder'.
      number: number of the block, counted from 0.
    """
    return model_config.of_block(self, stream, number)

  def depths(self) -> dict[str, int]:
    """See `model_config.ModelConfig`."""
    return {
      'encoder': self.num_encoder_layers,
      'decoder': self.num_decoder_layers,
    }

  def sparse_blocks(self) -> dict[str, tuple[int, ...]]:
    """See `model_config.ModelConfig`."""
    return {
      'encoder': self.sparse_encoder_layers,
      'decoder': self.sparse_decoder_layers,
    }

  def sparse_layers(self) -> dict[str, nn.Module]:
    """Returns a sparse layer by stack; {} if all feed-forwards are dense."""
    if self.sparse_feed_forward is None:
      return {}
    return dict(zip(self.streams, self.make_sparse_layers(), strict=True))

  def check_mesh(
    self,
    mesh_shape: Mapping[str, int],
    batch_size: int,
    lengths: Mapping[str, int],
  ) -> None:
    """Raises ValueError if sparse layers cannot be split over a mesh.

    Args:
      mesh_shape: number of devices along each axis of the mesh, by its name.
      batch_size: number of rows that go through the model at once.
      lengths: number of tokens of a row, for 'inputs' and 'targets'.
    """
    of_streams = {'encoder': lengths['inputs'], 'decoder': lengths['targets']}
    model_config.check_mesh(self, mesh_shape, batch_size, of_streams)

  def parts(self) -> dict[str, nn.Module]:
    """See `model_config.ModelConfig`; fields that are None are left out."""
    layers = dict(
      zip(
        ('sparse_feed_forward', 'sparse_decoder_feed_forward'),
        self.sparse_layers().values(),
        strict=False,
      )
    ) | {
      'attention': self._make(self.attention),
      'encoder_attention': self.make_attention(model_config.ENCODER_ATTENTION),
      'decoder_attention': self.make_attention('self_attention'),
    }
    return {
      field: layer
      for field, layer in layers.items()
      if getattr(self, field) is not None
    }

  def attentions(self) -> dict[str, nn.Module]:
    """Returns an attention of each kind, by its name in a block."""
    names = (
      model_config.ENCODER_ATTENTION,
      'self_attention',
      model_config.CROSS_ATTENTION,
    )
    return {name: self.make_attention(name) for name in names}

  def make_attention(self, name: str) -> nn.Module:
    """Returns a new attention layer.

    Args:
      name: name of the layer in a block: 'attention' in the encoder, and
        'self_attention' or 'encoder_decoder_attention' in the decoder.
    """
    others = {
      model_config.ENCODER_ATTENTION: self.encoder_attention,
      'self_attention': self.decoder_attention,
    }
    return self._make(others.get(name) or self.attention)

  def _make(self, factory):
    return factory(
      num_heads=self.num_heads,
      head_dim=self.head_dim,
      dropout_rate=self.dropout_rate,
      dtype=self.dtype,
      parent=None,
    )

  def with_layer_changes(self, **changes: Any) -> 'T5Config':
    """Returns a config whose sparse layers have other values of some fields.

    Args:
      **changes: new values by field. Layers that lack a field stay as they are.
    """
    changed = lambda factory: model_config.changed_factory(factory, changes)
    return dataclasses.replace(
      self,
      sparse_feed_forward=changed(self.sparse_feed_forward),
      sparse_decoder_feed_forward=changed(self.sparse_decoder_feed_forward),
      block_layers=model_config.changed_block_layers(self, changes),
      memories=token_memories.with_changes(self.memories, changes),
    )

  def make_dense_feed_forward(self) -> nn.Module:
    return feed_forward.DenseFeedForward(
      self.mlp_dim,
      self.mlp_activations,
      self.dropout_rate,
      self.dtype,
      parent=None,
    )

  def make_sparse_layers(self) -> tuple[nn.Module, nn.Module]:
    """Returns a sparse layer of the encoder, and one of the decoder."""
    make = lambda factory: factory(
      dropout_rate=self.dropout_rate, dtype=self.dtype, parent=None
    )
    of_decoder = self.sparse_decoder_feed_forward or self.sparse_feed_forward
    return make(self.sparse_feed_forward), make(of_decoder)

  def make_shared(self) -> dict[str, nn.Module]:
    """Returns the modules, by name, that all sparse layers share.

    An example is a table of word experts.
    """
    return model_config.shared_modules(
      self.sparse_layers().values(), self.emb_dim
    )

  def make_feed_forward(
    self, stream: str, number: int, shared: dict[str, nn.Module]
  ) -> nn.Module:
    """Returns a new feed-forward layer of a block.

    Args:
      stream: 'encoder' or 'decoder'.
      number: number of the block, counted from 0.
      shared: what `make_shared` returned, for sparse layers that use it.
    """
    if number not in self.sparse_blocks()[stream]:
      return self.make_dense_feed_forward()
    layer = self.make_sparse_layers()[self.streams.index(stream)]
    return model_config.with_shared(layer, shared)
