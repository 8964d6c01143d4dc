"""Blocks of a decoder-only model, from embedded to normed tokens."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import linear, parameter
from mowe.models import model_config, token_memories
from mowe.models.decoder_only import decoder_only_config

# The collection in which a batch leaves the inputs of each block to the next.
MEMORY = model_config.MEMORY


class Block(nn.Module):
  """Self-attention and feed-forward, each with a norm and a residual.

  Attributes:
    config: the config whose layers are those of this block.
    number: the number of this block, counted from 0.
    shared: modules by name that all sparse feed-forwards share.
    attention_shared: modules by name that all attentions share.
    tables: the tables of the model's memories, by name.
  """

  config: decoder_only_config.DecoderOnlyConfig
  number: int
  shared: dict[str, nn.Module]
  attention_shared: dict[str, nn.Module]
  tables: dict[str, nn.Module]

  def setup(self):
    config = self.config
    self.pre_self_attention_layer_norm = config.make_norm()
    self.self_attention = config.make_attention().with_shared(
      self.attention_shared
    )
    self.pre_mlp_layer_norm = config.make_norm()
    self.memories = token_memories.BlockMemories(
      config, 'decoder', self.number, self.tables
    )
    self.has_feed_forward = token_memories.has_feed_forward(
      config, 'decoder', self.number
    )
    if self.has_feed_forward:
      self.mlp = config.make_feed_forward(self.number, self.shared)
    self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))

  def __call__(self, tokens, positions, mask, routing, decode, deterministic):
    settings = {'decode': decode, 'deterministic': deterministic}
    tokens = token_memories.before_attention(self, tokens, routing, **settings)
    normed = self.pre_self_attention_layer_norm(tokens)
    attended = self.self_attention(
      normed,
      self._with_memory(tokens, normed),
      positions=positions,
      mask=mask,
      decode=decode,
      deterministic=deterministic,
    )
    tokens = tokens + self.dropout(attended, deterministic=deterministic)
    return token_memories.feed_forward(self, tokens, routing, **settings)

  def _with_memory(self, tokens, normed):
    """Prepends the memory to normed tokens, and stores the tokens in it.

    Both are <dtype>[batch, length, embed]; the memory keeps its length.
    """
    if not self.has_variable(MEMORY, 'tokens'):
      return normed
    # The memory holds the inputs of the block before its norm. The current norm
    # and kernels are applied to them, and so get gradients from them.
    old = jax.lax.stop_gradient(self.get_variable(MEMORY, 'tokens'))
    if self.is_mutable_collection(MEMORY):
      both = jnp.concatenate([old, tokens], axis=1)
      self.put_variable(MEMORY, 'tokens', both[:, -old.shape[1] :])
    return jnp.concatenate(
      [self.pre_self_attention_layer_norm(old), normed], axis=1
    )


class DecoderOnlyStack(nn.Module):
  """All blocks, from embedded to normed tokens, and the kernel of the logits.

  Attributes:
    config: the sizes and parts of the model.
    shared: modules by name that all sparse feed-forwards share, such as a table
      of experts.
    tables: the tables of the model's memories, by name.
  """

  config: decoder_only_config.DecoderOnlyConfig
  shared: dict[str, nn.Module]
  tables: dict[str, nn.Module]

  def setup(self):
    config = self.config
    block = nn.remat(Block, static_argnums=(5, 6)) if config.remat else Block
    attention_shared = {}
    for name, module in config.make_attention().make_shared().items():
      setattr(self, name, module)
      attention_shared[name] = getattr(self, name)
    self.layers = [
      block(
        config.of_block('decoder', number),
        number,
        self.shared,
        attention_shared,
        self.tables,
      )
      for number in range(config.num_layers)
    ]
    self.input_memories = token_memories.BlockMemories(
      config, 'decoder', 0, self.tables
    )
    self.decoder_norm = config.make_norm()
    self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
    if not config.logits_via_embedding:
      # float32: a loss from bfloat16 logits is noisy.
      self.logits_dense = linear.Dense(
        config.vocab_size, ('embed', 'vocab'), dtype=jnp.float32
      )
    if config.logits_bias:
      self.logits_bias = parameter.declare(
        self,
        'logits_bias',
        nn.initializers.zeros,
        (config.vocab_size,),
        axes=('vocab',),
      )

  def __call__(self, tokens, positions, mask, routing, decode, deterministic):
    routing = routing.with_embedded(tokens)
    tokens = token_memories.at_input(
      self.input_memories,
      tokens,
      routing.memories,
      decode=decode,
      deterministic=deterministic,
    )
    tokens = self.dropout(tokens, deterministic=deterministic)
    for layer in self.layers:
      tokens = layer(tokens, positions, mask, routing, decode, deterministic)
    tokens = self.decoder_norm(tokens)
    return self.dropout(tokens, deterministic=deterministic)

  def logits(self, tokens):
    logits = self.logits_dense(tokens)
    if self.config.logits_bias:
      logits += self.logits_bias[None, None]
    return logits

  def remembered(self, real):
    """Returns which tokens of the memory are real, and appends those of now.

    Args:
      real: <bool>[batch, length], False for padding.

    Returns:
      <bool>[batch, memory], False where the memory holds no token yet or holds
      padding; None if the model has no memory.
    """
    if not self.has_variable(MEMORY, 'real'):
      return None
    old = self.get_variable(MEMORY, 'real')
    if self.is_mutable_collection(MEMORY):
      both = jnp.concatenate([old, real], axis=1)
      self.put_variable(MEMORY, 'real', both[:, -old.shape[1] :])
    return old
