"""Sizes and parts of a T5, checked when they are put together."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward


class Routing(Protocol):
  """What the model asks of a routing vocabulary; all on jax arrays."""

  num_experts: int

  def encoder_ids(self, tokens, segment_ids=None):
    """Routing ids <int32>[batch, length] of whole words."""

  def decoder_ids(self, tokens, segment_ids=None):
    """Routing ids <int32>[batch, length] of the words so far."""

  def decoder_step(self, tokens, state):
    """Routing ids of one token [batch, 1], and the next state."""

  def initial_state(self, batch):
    """State before the first token, <uint32>[batch, 2]."""


def default_dtype() -> str:
  """'bfloat16' on accelerators, 'float32' on CPU, where it is faster."""
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes and parts of a T5.

  Attributes:
    vocab_size: rows of the embedding; at least the subword vocabulary's size.
    emb_dim: width of the model.
    num_heads: attention heads.
    head_dim: size of one head.
    mlp_dim: hidden units of a dense feed-forward.
    num_encoder_layers: encoder blocks.
    num_decoder_layers: decoder blocks.
    mlp_activations: ('gelu', 'linear') for T5 1.1, ('relu',) for T5 1.0.
    logits_via_embedding: logits from the embedding (1.0), not their own kernel.
    dropout_rate: dropout everywhere.
    dtype: dtype of activations; parameters are float32. Not float16.
    remat: recompute blocks in the backward pass instead of keeping them.
    sparse_feed_forward: makes the layer (or its class) of the blocks below.
    sparse_decoder_feed_forward: the same for the decoder's blocks, where it is
      another: a router that looks ahead fits an encoder only.
    sparse_encoder_layers: encoder blocks, from 0, whose feed-forward is sparse.
    sparse_decoder_layers: decoder blocks, likewise.
    routing: gives routing ids where the batch has none. Without it, layers
      that can be routed by token get the ids of the tokens, -1 for padding.

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
  sparse_feed_forward: Callable[..., nn.Module] | None = None
  sparse_decoder_feed_forward: Callable[..., nn.Module] | None = None
  sparse_encoder_layers: tuple[int, ...] = ()
  sparse_decoder_layers: tuple[int, ...] = ()
  routing: Routing | None = None

  def __post_init__(self):
    object.__setattr__(self, 'dtype', jnp.dtype(self.dtype))
    feed_forward.check_activations(self.mlp_activations)
    if self.dtype == jnp.float16:
      raise ValueError(
        'dtype must be float32 or bfloat16, but is float16: the activations '
        'of T5 exceed its largest number, 65504, and training ends in NaN. '
        "Use 'bfloat16'."
      )
    for stack, layers, depth in (
      ('encoder', self.sparse_encoder_layers, self.num_encoder_layers),
      ('decoder', self.sparse_decoder_layers, self.num_decoder_layers),
    ):
      outside = [i for i in layers if not 0 <= i < depth]
      if outside:
        raise ValueError(
          f'sparse_{stack}_layers must lie in 0..{depth - 1}, as the {stack} '
          f'has {depth} blocks, but holds {outside}. Blocks count from 0: '
          'the fifth is 4.'
        )
    has_layers = bool(self.sparse_encoder_layers or self.sparse_decoder_layers)
    if has_layers != (self.sparse_feed_forward is not None):
      raise ValueError(
        'sparse_feed_forward and the sparse layers must be given together, '
        f'but sparse_feed_forward is {self.sparse_feed_forward} with encoder '
        f'layers {self.sparse_encoder_layers} and decoder layers '
        f'{self.sparse_decoder_layers}. Set both or neither.'
      )
    if self.sparse_feed_forward is not None:
      self._check_layers()

  def _check_layers(self):
    encoder, decoder = self.make_sparse_layers()
    if self.sparse_decoder_layers and getattr(decoder, 'looks_ahead', False):
      raise ValueError(
        'A token of the decoder must not be routed by later tokens, but '
        f'{decoder.routing} does so: it would learn from the future and fail '
        'when it generates. Set sparse_decoder_feed_forward to a layer with '
        'TokensChoose(batch_prioritized=False) or a hash router.'
      )
    if self.routing is None:
      return
    for layer in (encoder, decoder):
      experts = getattr(layer, 'num_experts', self.routing.num_experts)
      has_table = not getattr(layer, 'reads_token_ids', False)
      if has_table and experts != self.routing.num_experts:
        raise ValueError(
          'The layer and the routing vocabulary must have the same number '
          f'of experts, but the layer has {experts} and the vocabulary '
          f'{self.routing.num_experts}. Set num_experts of the layer, or '
          'build the vocabulary with --num_experts.'
        )

  def check_mesh(
    self,
    mesh_shape: Mapping[str, int],
    batch_size: int,
    lengths: Mapping[str, int],
  ) -> None:
    """Raises ValueError if sparse layers cannot be split over a mesh.

    Args:
      mesh_shape: devices along each axis.
      batch_size: rows that go through the model at once.
      lengths: tokens of 'inputs' and 'targets'.
    """
    if self.sparse_feed_forward is None:
      return
    encoder, decoder = self.make_sparse_layers()
    for layer, blocks, length in (
      (encoder, self.sparse_encoder_layers, lengths['inputs']),
      (decoder, self.sparse_decoder_layers, lengths['targets']),
    ):
      if blocks and hasattr(layer, 'check_mesh'):
        layer.check_mesh(mesh_shape, batch_size, length)

  @property
  def routes_tokens(self) -> bool:
    """Whether sparse layers take token ids for routing ids."""
    if self.sparse_feed_forward is None:
      return False
    return any(
      getattr(layer, 'reads_token_ids', False)
      for layer in self.make_sparse_layers()
    )

  def with_layer_changes(self, **changes: Any) -> 'T5Config':
    """This config with other fields in those sparse layers that have them."""

    def changed(factory):
      if factory is None:
        return None

      def make(**given):
        layer = factory(**given)
        fields = {field.name for field in dataclasses.fields(layer)}
        if not fields >= changes.keys():
          return layer
        return layer.clone(parent=None, **changes)

      return make

    return dataclasses.replace(
      self,
      sparse_feed_forward=changed(self.sparse_feed_forward),
      sparse_decoder_feed_forward=changed(self.sparse_decoder_feed_forward),
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
    """A sparse layer of the encoder, and one of the decoder."""
    make = lambda factory: factory(
      dropout_rate=self.dropout_rate, dtype=self.dtype, parent=None
    )
    of_decoder = self.sparse_decoder_feed_forward or self.sparse_feed_forward
    return make(self.sparse_feed_forward), make(of_decoder)

  def make_shared(self) -> dict[str, nn.Module]:
    """Modules shared by all sparse layers, such as a table of experts."""
    if self.sparse_feed_forward is None:
      return {}
    shared: dict[str, nn.Module] = {}
    for layer in self.make_sparse_layers():
      if not shared and hasattr(layer, 'make_shared'):
        shared = layer.make_shared(self.emb_dim)
    return shared

  def make_feed_forward(
    self, is_sparse: bool, is_decoder: bool, shared: dict[str, nn.Module]
  ) -> nn.Module:
    if not is_sparse:
      return self.make_dense_feed_forward()
    layer = self.make_sparse_layers()[is_decoder]
    if shared and hasattr(layer, 'with_shared'):
      return layer.with_shared(shared)
    return layer
