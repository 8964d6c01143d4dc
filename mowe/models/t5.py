"""T5 encoder-decoder, 1.0 and 1.1, with any feed-forward in any block.

Parameter names, shapes and logical axes of the dense parts are those of
T5X's minimal network, so its checkpoints fit without renaming.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import (
  attention,
  embedding,
  feed_forward,
  layer_norm,
  linear,
  relative_position,
)


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
    sparse_encoder_layers: encoder blocks, from 0, whose feed-forward is sparse.
    sparse_decoder_layers: decoder blocks, likewise.
    routing: gives routing ids where the batch has none.

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
    if self.routing is not None and self.sparse_feed_forward is not None:
      layer = self.make_sparse_feed_forward()
      experts = getattr(layer, 'num_experts', self.routing.num_experts)
      if experts != self.routing.num_experts:
        raise ValueError(
          'The layer and the routing vocabulary must have the same number '
          f'of experts, but the layer has {experts} and the vocabulary '
          f'{self.routing.num_experts}. Set num_experts of the layer, or '
          'build the vocabulary with --num_experts.'
        )

  def make_dense_feed_forward(self) -> nn.Module:
    return feed_forward.DenseFeedForward(
      self.mlp_dim,
      self.mlp_activations,
      self.dropout_rate,
      self.dtype,
      parent=None,
    )

  def make_sparse_feed_forward(self) -> nn.Module:
    return self.sparse_feed_forward(
      dropout_rate=self.dropout_rate, dtype=self.dtype, parent=None
    )

  def make_shared(self) -> dict[str, nn.Module]:
    """Modules shared by all sparse layers, such as a table of experts."""
    if self.sparse_feed_forward is None:
      return {}
    layer = self.make_sparse_feed_forward()
    if not hasattr(layer, 'make_shared'):
      return {}
    return layer.make_shared(self.emb_dim)

  def make_feed_forward(
    self, is_sparse: bool, shared: dict[str, nn.Module]
  ) -> nn.Module:
    if not is_sparse:
      return self.make_dense_feed_forward()
    layer = self.make_sparse_feed_forward()
    return layer.with_shared(shared) if shared else layer


class _Block(nn.Module):
  """What encoder and decoder blocks share: norms, residuals, dropout."""

  config: T5Config
  is_sparse: bool
  shared: dict[str, nn.Module]

  def _norm(self):
    return layer_norm.LayerNorm(dtype=self.config.dtype)

  def _attention(self):
    config = self.config
    return attention.MultiHeadAttention(
      config.num_heads, config.head_dim, config.dropout_rate, config.dtype
    )

  def _setup_feed_forward(self):
    self.pre_mlp_layer_norm = self._norm()
    self.mlp = self.config.make_feed_forward(self.is_sparse, self.shared)
    self.dropout = nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))

  def _feed_forward(self, tokens, routing_ids, deterministic):
    outputs = self.mlp(
      self.pre_mlp_layer_norm(tokens),
      routing_ids,
      deterministic=deterministic,
    )
    return tokens + self.dropout(outputs, deterministic=deterministic)


class EncoderBlock(_Block):
  """Self-attention and feed-forward, each with a residual around it."""

  def setup(self):
    self.pre_attention_layer_norm = self._norm()
    self.attention = self._attention()
    self._setup_feed_forward()

  def __call__(self, tokens, bias, mask, routing_ids, deterministic):
    normed = self.pre_attention_layer_norm(tokens)
    attended = self.attention(
      normed, normed, bias=bias, mask=mask, deterministic=deterministic
    )
    tokens = tokens + self.dropout(attended, deterministic=deterministic)
    return self._feed_forward(tokens, routing_ids, deterministic)


class DecoderBlock(_Block):
  """Causal self-attention, attention to the encoder, and feed-forward."""

  def setup(self):
    self.pre_self_attention_layer_norm = self._norm()
    self.self_attention = self._attention()
    self.pre_cross_attention_layer_norm = self._norm()
    self.encoder_decoder_attention = self._attention()
    self._setup_feed_forward()

  def __call__(
    self,
    tokens,
    encoded,
    bias,
    mask,
    cross_mask,
    routing_ids,
    decode,
    deterministic,
  ):
    normed = self.pre_self_attention_layer_norm(tokens)
    attended = self.self_attention(
      normed,
      normed,
      bias=bias,
      mask=mask,
      decode=decode,
      deterministic=deterministic,
    )
    tokens = tokens + self.dropout(attended, deterministic=deterministic)
    normed = self.pre_cross_attention_layer_norm(tokens)
    if self.has_variable('encoder_memory', 'key'):
      keys = self.get_variable('encoder_memory', 'key')
      values = self.get_variable('encoder_memory', 'value')
    else:
      keys, values = self.encoder_decoder_attention.project_memory(encoded)
    attended = self.encoder_decoder_attention.attend(
      normed, keys, values, mask=cross_mask, deterministic=deterministic
    )
    tokens = tokens + self.dropout(attended, deterministic=deterministic)
    return self._feed_forward(tokens, routing_ids, deterministic)

  def remember(self, encoded):
    """Keeps keys and values of the encoder in `encoder_memory`."""
    keys, values = self.encoder_decoder_attention.project_memory(encoded)
    self.put_variable('encoder_memory', 'key', keys)
    self.put_variable('encoder_memory', 'value', values)


class Encoder(nn.Module):
  """All encoder blocks, from embedded tokens to normed outputs."""

  config: T5Config
  shared: dict[str, nn.Module]

  def setup(self):
    config = self.config
    block = (
      nn.remat(EncoderBlock, static_argnums=(5,))
      if config.remat
      else (EncoderBlock)
    )
    self.relpos_bias = relative_position.RelativePositionBias(
      config.num_heads, bidirectional=True, dtype=config.dtype
    )
    self.layers = [
      block(config, i in config.sparse_encoder_layers, self.shared)
      for i in range(config.num_encoder_layers)
    ]
    self.encoder_norm = layer_norm.LayerNorm(dtype=config.dtype)
    self.input_dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
    self.output_dropout = nn.Dropout(config.dropout_rate)

  def __call__(self, tokens, mask, routing_ids, deterministic):
    tokens = self.input_dropout(tokens, deterministic=deterministic)
    positions = jnp.arange(tokens.shape[1])
    bias = self.relpos_bias(positions, positions)
    for layer in self.layers:
      tokens = layer(tokens, bias, mask, routing_ids, deterministic)
    tokens = self.encoder_norm(tokens)
    return self.output_dropout(tokens, deterministic=deterministic)


class Decoder(nn.Module):
  """All decoder blocks, from embedded tokens to normed outputs."""

  config: T5Config
  shared: dict[str, nn.Module]

  def setup(self):
    config = self.config
    block = (
      nn.remat(DecoderBlock, static_argnums=(7, 8))
      if config.remat
      else DecoderBlock
    )
    self.relpos_bias = relative_position.RelativePositionBias(
      config.num_heads, bidirectional=False, dtype=config.dtype
    )
    self.layers = [
      block(config, i in config.sparse_decoder_layers, self.shared)
      for i in range(config.num_decoder_layers)
    ]
    self.decoder_norm = layer_norm.LayerNorm(dtype=config.dtype)
    self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
    if not config.logits_via_embedding:
      # float32: a loss from bfloat16 logits is noisy.
      self.logits_dense = linear.Dense(
        config.vocab_size, ('embed', 'vocab'), dtype=jnp.float32
      )

  def __call__(
    self,
    tokens,
    encoded,
    mask,
    cross_mask,
    routing_ids,
    *,
    decode,
    max_decode_length,
    deterministic,
  ):
    tokens = self.dropout(tokens, deterministic=deterministic)
    bias = self._bias(tokens.shape[1], decode, max_decode_length)
    for layer in self.layers:
      tokens = layer(
        tokens,
        encoded,
        bias,
        mask,
        cross_mask,
        routing_ids,
        decode,
        deterministic,
      )
    tokens = self.decoder_norm(tokens)
    return self.dropout(tokens, deterministic=deterministic)

  def _bias(self, length, decode, max_decode_length):
    """Bias of all positions, or of the one that is decoded now."""
    if not decode:
      positions = jnp.arange(length)
      return self.relpos_bias(positions, positions)
    if not self.has_variable('cache', 'cache_index'):
      self.put_variable('cache', 'cache_index', jnp.zeros((), jnp.int32))
      positions = jnp.arange(length)
      return self.relpos_bias(positions, positions)
    # The name tells T5X's beam search that this leaf has no rows.
    position = self.get_variable('cache', 'cache_index')
    self.put_variable('cache', 'cache_index', position + 1)
    return self.relpos_bias(position[None], jnp.arange(max_decode_length))

  def logits(self, tokens):
    return self.logits_dense(tokens)

  def remember(self, encoded):
    for layer in self.layers:
      layer.remember(encoded)


class T5(nn.Module):
  """T5 encoder-decoder.

  Source: arXiv 1910.10683 (1.0), arXiv 2002.05202 and T5's release notes (1.1).
  The calls are those of T5X's minimal network. Token ids may arrive as floats
  (t5x does so at initialisation) and are cast first.

  Call: see `__call__`, `encode`, `decode`.
  """

  config: T5Config

  def setup(self):
    config = self.config
    self.token_embedder = embedding.Embedding(
      config.vocab_size, config.emb_dim, config.dtype
    )
    shared = {}
    for name, module in config.make_shared().items():
      # Assigning gives the module its place in the tree: `experts/...`.
      setattr(self, name, module)
      shared[name] = getattr(self, name)
    self.encoder = Encoder(config, shared)
    self.decoder = Decoder(config, shared)

  def __call__(
    self,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    encoder_positions: jax.Array | None = None,
    decoder_positions: jax.Array | None = None,
    *,
    encoder_routing_ids: Any = None,
    decoder_routing_ids: Any = None,
    enable_dropout: bool = True,
    decode: bool = False,
  ) -> jax.Array:
    """Logits <float32>[batch, targets, vocab] with teacher forcing.

    Args:
      encoder_input_tokens: <int32>[batch, inputs], 0 is padding.
      decoder_input_tokens: <int32>[batch, targets], shifted targets.
      decoder_target_tokens: <int32>[batch, targets].
      encoder_segment_ids: <int32>[batch, inputs] of packed examples, or None.
      decoder_segment_ids: <int32>[batch, targets] of packed examples, or None.
      encoder_positions: taken for T5X's sake; relative positions need none.
      decoder_positions: likewise.
      encoder_routing_ids: <int32>[batch, inputs], or a StreamPlan; by default
        made from the tokens by the config's routing.
      decoder_routing_ids: likewise for the decoder's input tokens.
      enable_dropout: draws from the `dropout` stream.
      decode: prepares the cache for step-by-step decoding.
    """
    del encoder_positions, decoder_positions
    embedded, decoder_embedded = self.token_embedder.both(
      encoder_input_tokens.astype(jnp.int32),
      decoder_input_tokens.astype(jnp.int32),
    )
    encoded = self._encode(
      embedded,
      encoder_input_tokens,
      encoder_segment_ids,
      encoder_routing_ids=encoder_routing_ids,
      enable_dropout=enable_dropout,
    )
    return self._decode(
      decoder_embedded,
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      decoder_routing_ids=decoder_routing_ids,
      enable_dropout=enable_dropout,
      decode=decode,
      max_decode_length=None,
    )

  def encode(
    self,
    encoder_input_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    *,
    encoder_routing_ids: Any = None,
    enable_dropout: bool = True,
  ) -> jax.Array:
    """Encoder outputs <dtype>[batch, inputs, embed]."""
    return self._encode(
      self.token_embedder(encoder_input_tokens.astype(jnp.int32)),
      encoder_input_tokens,
      encoder_segment_ids,
      encoder_routing_ids=encoder_routing_ids,
      enable_dropout=enable_dropout,
    )

  def _encode(
    self,
    embedded,
    encoder_input_tokens,
    encoder_segment_ids,
    *,
    encoder_routing_ids,
    enable_dropout,
  ):
    ids = encoder_input_tokens.astype(jnp.int32)
    real = ids > 0
    mask = real[:, None, :, None] & real[:, None, None, :]
    mask = _same_segment(mask, encoder_segment_ids, encoder_segment_ids)
    if encoder_routing_ids is None and self.config.sparse_encoder_layers:
      encoder_routing_ids = self._routing_ids(
        'encoder_ids', ids, encoder_segment_ids
      )
    return self.encoder(
      embedded,
      mask,
      encoder_routing_ids,
      not enable_dropout,
    )

  def decode(
    self,
    encoded: jax.Array,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    decoder_positions: jax.Array | None = None,
    *,
    decoder_routing_ids: Any = None,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> jax.Array:
    """Logits <float32>[batch, targets, vocab] given the encoder's outputs.

    With `decode=True` and a cache, the inputs are one token [batch, 1], and
    the targets are not looked at.
    """
    del decoder_positions
    return self._decode(
      self.token_embedder(decoder_input_tokens.astype(jnp.int32)),
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      decoder_routing_ids=decoder_routing_ids,
      enable_dropout=enable_dropout,
      decode=decode,
      max_decode_length=max_decode_length,
    )

  def _decode(
    self,
    embedded,
    encoded,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids,
    decoder_segment_ids,
    *,
    decoder_routing_ids,
    enable_dropout,
    decode,
    max_decode_length,
  ):
    inputs = decoder_input_tokens.astype(jnp.int32)
    memory = encoder_input_tokens.astype(jnp.int32) > 0
    if decode:
      real, mask = jnp.ones(inputs.shape, bool), None
    else:
      real = decoder_target_tokens > 0
      length = inputs.shape[1]
      causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
      mask = causal & real[:, None, :, None] & real[:, None, None, :]
      mask = _same_segment(mask, decoder_segment_ids, decoder_segment_ids)
    cross_mask = real[:, None, :, None] & memory[:, None, None, :]
    cross_mask = _same_segment(
      cross_mask, decoder_segment_ids, encoder_segment_ids
    )
    if decoder_routing_ids is None and self.config.sparse_decoder_layers:
      decoder_routing_ids = self._decoder_routing_ids(
        inputs, decoder_segment_ids, decode
      )
    tokens = self.decoder(
      embedded,
      encoded,
      mask,
      cross_mask,
      decoder_routing_ids,
      decode=decode,
      max_decode_length=max_decode_length,
      deterministic=not enable_dropout,
    )
    if self.config.logits_via_embedding:
      return self.token_embedder.attend(tokens)
    return self.decoder.logits(tokens)

  def remember(self, encoded: jax.Array) -> None:
    """Puts the decoder's keys and values of `encoded` in `encoder_memory`."""
    self.decoder.remember(encoded)

  def _routing_ids(self, method, ids, segment_ids):
    if self.config.routing is None:
      raise ValueError(
        'A model with sparse layers needs routing ids, but the batch has '
        'none and T5Config.routing is None. Set T5Config.routing to a '
        'RoutingVocabulary, or give the ids with the batch.'
      )
    return getattr(self.config.routing, method)(ids, segment_ids)

  def _decoder_routing_ids(self, inputs, segment_ids, decode):
    if not decode:
      return self._routing_ids('decoder_ids', inputs, segment_ids)
    if not self.has_variable('cache', 'word_so_far'):
      ids = self._routing_ids('decoder_ids', inputs, segment_ids)
      # Rank 2: T5X's beam search leaves leaves of rank 1 alone.
      state = self.config.routing.initial_state(inputs.shape[0])
      self.put_variable('cache', 'word_so_far', jnp.asarray(state))
      return ids
    state = self.get_variable('cache', 'word_so_far')
    ids, state = self.config.routing.decoder_step(inputs, state)
    self.put_variable('cache', 'word_so_far', state)
    return ids


def _same_segment(mask, query_segments, key_segments):
  """Lets a query see only keys of its own packed segment."""
  if query_segments is None or key_segments is None:
    return mask
  same = query_segments[:, None, :, None] == key_segments[:, None, None, :]
  return mask & same
