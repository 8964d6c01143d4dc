"""Encoder and decoder of a T5, from embedded tokens to normed outputs."""

import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import layer_norm, linear
from mowe.layers.attention import multi_head, relative_position
from mowe.models import token_memories
from mowe.models.t5 import t5_config


class _Block(nn.Module):
  """Base of encoder and decoder blocks: feed-forward, memories and norms.

  Attributes:
    config: the config whose layers are those of this block.
    number: the number of the block in its stack, counted from 0.
    shared: modules by name that all sparse feed-forwards share.
    tables: the tables of the model's memories, by name.
    stream: 'encoder' or 'decoder'.
  """

  config: t5_config.T5Config
  number: int
  shared: dict[str, nn.Module]
  tables: dict[str, nn.Module]
  stream = 'encoder'

  def _norm(self):
    return layer_norm.LayerNorm(dtype=self.config.dtype)

  def _setup_feed_forward(self):
    config, place = self.config, (self.stream, self.number)
    self.pre_mlp_layer_norm = self._norm()
    self.memories = token_memories.BlockMemories(config, *place, self.tables)
    self.has_feed_forward = token_memories.has_feed_forward(config, *place)
    if self.has_feed_forward:
      self.mlp = config.make_feed_forward(*place, self.shared)
    self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


class EncoderBlock(_Block):
  """Self-attention and feed-forward, each with a norm and a residual.

  Call: tokens <dtype>[batch, length, embed], bias <float>[1, heads, query,
    key], mask <bool>[batch, 1, query, key], routing
    (`model_config.StreamRouting`) and deterministic, to <dtype>[batch, length,
    embed].
  """

  def setup(self):
    self.pre_attention_layer_norm = self._norm()
    self.attention = self.config.make_attention('attention')
    self._setup_feed_forward()

  def __call__(self, tokens, bias, mask, routing, deterministic):
    settings = {'decode': False, 'deterministic': deterministic}
    tokens = token_memories.before_attention(self, tokens, routing, **settings)
    normed = self.pre_attention_layer_norm(tokens)
    attended = self.attention(
      normed, normed, bias=bias, mask=mask, deterministic=deterministic
    )
    tokens = tokens + self.dropout(attended, deterministic=deterministic)
    return token_memories.feed_forward(self, tokens, routing, **settings)


class DecoderBlock(_Block):
  """Causal self-attention, attention to the encoder, and feed-forward.

  Call: tokens <dtype>[batch, length, embed], encoded <dtype>[batch, inputs,
    embed], bias and mask of the self-attention, cross_mask <bool>[batch, 1,
    length, inputs], routing (`model_config.StreamRouting`), decode and
    deterministic, to <dtype>[batch, length, embed].
  """

  stream = 'decoder'

  def setup(self):
    self.pre_self_attention_layer_norm = self._norm()
    self.self_attention = self.config.make_attention('self_attention')
    self.pre_cross_attention_layer_norm = self._norm()
    self.encoder_decoder_attention = self.config.make_attention(
      'encoder_decoder_attention'
    )
    self._setup_feed_forward()

  def __call__(
    self,
    tokens,
    encoded,
    bias,
    mask,
    cross_mask,
    routing,
    decode,
    deterministic,
  ):
    settings = {'decode': decode, 'deterministic': deterministic}
    tokens = token_memories.before_attention(self, tokens, routing, **settings)
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
    # In generation the keys and values of the encoder's outputs are the same at
    # every step, so they are projected once, by `remember`.
    if self.has_variable('encoder_memory', 'key'):
      keys, values = (
        multi_head.as_projected(self.get_variable('encoder_memory', name))
        for name in ('key', 'value')
      )
    else:
      keys, values = self.encoder_decoder_attention.project_memory(encoded)
    attended = self.encoder_decoder_attention.attend(
      normed, keys, values, mask=cross_mask, deterministic=deterministic
    )
    tokens = tokens + self.dropout(attended, deterministic=deterministic)
    return token_memories.feed_forward(self, tokens, routing, **settings)

  def remember(self, encoded):
    """Stores keys and values of the encoder's outputs in `encoder_memory`."""
    keys, values = self.encoder_decoder_attention.project_memory(encoded)
    self.put_variable('encoder_memory', 'key', multi_head.as_kept(keys))
    self.put_variable('encoder_memory', 'value', multi_head.as_kept(values))


class Encoder(nn.Module):
  """All encoder blocks, from embedded tokens to normed outputs.

  Attributes:
    config: the sizes and parts of the model.
    shared: modules by name that all sparse feed-forwards share.
    tables: the tables of the model's memories, by name.

  Call: tokens <dtype>[batch, length, embed], mask <bool>[batch, 1, query, key],
    routing (`model_config.StreamRouting`) and deterministic, to <dtype>[batch,
    length, embed].
  """

  config: t5_config.T5Config
  shared: dict[str, nn.Module]
  tables: dict[str, nn.Module]

  def setup(self):
    config = self.config
    # `deterministic` is static, because it decides what is traced. Arguments
    # count from `self`, which is 0.
    block = (
      nn.remat(EncoderBlock, static_argnums=(5,))
      if config.remat
      else (EncoderBlock)
    )
    self.relpos_bias = relative_position.RelativePositionBias(
      config.num_heads, bidirectional=True, dtype=config.dtype
    )
    self.layers = [
      block(config.of_block('encoder', i), i, self.shared, self.tables)
      for i in range(config.num_encoder_layers)
    ]
    self.input_memories = token_memories.BlockMemories(
      config, 'encoder', 0, self.tables
    )
    self.encoder_norm = layer_norm.LayerNorm(dtype=config.dtype)
    self.input_dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
    self.output_dropout = nn.Dropout(config.dropout_rate)

  def __call__(self, tokens, mask, routing, deterministic):
    routing = routing.with_embedded(tokens)
    tokens = token_memories.at_input(
      self.input_memories,
      tokens,
      routing.memories,
      decode=False,
      deterministic=deterministic,
    )
    tokens = self.input_dropout(tokens, deterministic=deterministic)
    positions = jnp.arange(tokens.shape[1])
    bias = self.relpos_bias(positions, positions)
    for layer in self.layers:
      tokens = layer(tokens, bias, mask, routing, deterministic)
    tokens = self.encoder_norm(tokens)
    return self.output_dropout(tokens, deterministic=deterministic)


class Decoder(nn.Module):
  """All decoder blocks, from embedded tokens to normed outputs.

  Attributes:
    config: the sizes and parts of the model.
    shared: modules by name that all sparse feed-forwards share.
    tables: the tables of the model's memories, by name.

  Call: tokens <dtype>[batch, length, embed], encoded <dtype>[batch, inputs,
    embed], the masks and routing of a DecoderBlock, and by name decode,
    max_decode_length and deterministic, to <dtype>[batch, length, embed].
  """

  config: t5_config.T5Config
  shared: dict[str, nn.Module]
  tables: dict[str, nn.Module]

  def setup(self):
    config = self.config
    # `decode` and `deterministic` are static, because they decide what is
    # traced. Arguments count from `self`, which is 0.
    block = (
      nn.remat(DecoderBlock, static_argnums=(7, 8))
      if config.remat
      else DecoderBlock
    )
    self.relpos_bias = relative_position.RelativePositionBias(
      config.num_heads, bidirectional=False, dtype=config.dtype
    )
    self.layers = [
      block(config.of_block('decoder', i), i, self.shared, self.tables)
      for i in range(config.num_decoder_layers)
    ]
    self.input_memories = token_memories.BlockMemories(
      config, 'decoder', 0, self.tables
    )
    self.decoder_norm = layer_norm.LayerNorm(dtype=config.dtype)
    self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
    if not config.logits_via_embedding:
      # Logits are float32, because a loss from bfloat16 logits is noisy.
      self.logits_dense = linear.Dense(
        config.vocab_size, ('embed', 'vocab'), dtype=jnp.float32
      )

  def __call__(
    self,
    tokens,
    encoded,
    mask,
    cross_mask,
    routing,
    *,
    decode,
    max_decode_length,
    deterministic,
  ):
    routing = routing.with_embedded(tokens)
    tokens = token_memories.at_input(
      self.input_memories,
      tokens,
      routing.memories,
      decode=decode,
      deterministic=deterministic,
    )
    tokens = self.dropout(tokens, deterministic=deterministic)
    bias = self._bias(tokens.shape[1], decode, max_decode_length)
    for layer in self.layers:
      tokens = layer(
        tokens,
        encoded,
        bias,
        mask,
        cross_mask,
        routing,
        decode,
        deterministic,
      )
    tokens = self.decoder_norm(tokens)
    return self.dropout(tokens, deterministic=deterministic)

  def _bias(self, length, decode, max_decode_length):
    """Returns the relative-position bias <dtype>[1, heads, query, key].

    Args:
      length: number of queries, all of which are at the first positions unless
        there is a cache.
      decode: whether to decode step by step. If there is a cache, the only
        query is the token at its index, which then grows by one.
      max_decode_length: number of keys in the cache.
    """
    if not decode:
      positions = jnp.arange(length)
      return self.relpos_bias(positions, positions)
    if not self.has_variable('cache', 'cache_index'):
      self.put_variable('cache', 'cache_index', jnp.zeros((), jnp.int32))
      positions = jnp.arange(length)
      return self.relpos_bias(positions, positions)
    # T5X's beam search knows by the name `cache_index` that this leaf has no
    # rows to reorder.
    position = self.get_variable('cache', 'cache_index')
    self.put_variable('cache', 'cache_index', position + 1)
    return self.relpos_bias(position[None], jnp.arange(max_decode_length))

  def logits(self, tokens):
    return self.logits_dense(tokens)

  def remember(self, encoded):
    for layer in self.layers:
      layer.remember(encoded)
