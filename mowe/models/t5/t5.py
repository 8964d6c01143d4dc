"""T5 encoder-decoder, 1.0 and 1.1, with any feed-forward in any block.

Parameter names, shapes and logical axes of the dense parts are those of
T5X's minimal network, so its checkpoints fit without renaming.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import embedding
from mowe.layers.routers import router_losses
from mowe.models import decoding, model_config, token_memories
from mowe.models.t5 import t5_config, t5_stacks


class T5(nn.Module):
  """T5 encoder-decoder.

  Source: arXiv 1910.10683 (1.0), arXiv 2002.05202 and T5's release notes (1.1).
  The calls are those of T5X's minimal network. Token ids may arrive as floats,
  as from t5x at initialisation, and are cast to integers first.

  Attributes:
    config: the sizes and parts of the model.

  Call: see `__call__`, `encode`, `decode`.
  """

  config: t5_config.T5Config

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
    tables = {}
    for name, table in token_memories.make_tables(config).items():
      setattr(self, name, table)
      tables[name] = getattr(self, name)
    self.encoder = t5_stacks.Encoder(config, shared, tables)
    self.decoder = t5_stacks.Decoder(config, shared, tables)

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
    encoder_routing_ids: jax.Array | None = None,
    decoder_routing_ids: jax.Array | None = None,
    encoder_plan: Any = None,
    decoder_plan: Any = None,
    encoder_memory_rows: Mapping[str, jax.Array] | None = None,
    decoder_memory_rows: Mapping[str, jax.Array] | None = None,
    enable_dropout: bool = True,
    decode: bool = False,
  ) -> jax.Array:
    """Returns logits <float32>[batch, targets, vocab] with teacher forcing.

    Args:
      encoder_input_tokens: <int32>[batch, inputs], token ids; 0 is padding.
      decoder_input_tokens: <int32>[batch, targets], the targets shifted to the
        right by one.
      decoder_target_tokens: <int32>[batch, targets], token ids; 0 is padding.
      encoder_segment_ids: <int32>[batch, inputs], the number of the example to
        which each input of a packed row belongs; None if rows are not packed.
      decoder_segment_ids: <int32>[batch, targets], the number of the example to
        which each target of a packed row belongs; None if rows are not packed.
      encoder_positions: not used. T5X passes it, but relative positions do not
        need it.
      decoder_positions: not used, for the same reason.
      encoder_routing_ids: <int32>[batch, inputs], routing ids of the encoder's
        tokens; None if the config's routing makes them from the tokens.
      decoder_routing_ids: <int32>[batch, targets], routing ids of the decoder's
        tokens; None if the config's routing makes them from the tokens.
      encoder_plan: the `batch_plans.StreamPlan` of the encoder's tokens; None
        if the layers use the routing ids.
      decoder_plan: the `batch_plans.StreamPlan` of the decoder's tokens; None
        if the layers use the routing ids.
      encoder_memory_rows: name of a memory -> the rows that tokens name,
        <int32>[batch, inputs, slots]; None if the model finds them.
      decoder_memory_rows: the same of the decoder's tokens.
      enable_dropout: whether dropout draws from the `dropout` random stream.
      decode: whether to prepare the cache for step-by-step decoding.
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
      routing=model_config.StreamRouting(
        encoder_routing_ids,
        encoder_plan,
        model_config.MemoryInputs(encoder_memory_rows),
      ),
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
      routing=model_config.StreamRouting(
        decoder_routing_ids,
        decoder_plan,
        model_config.MemoryInputs(decoder_memory_rows),
      ),
      enable_dropout=enable_dropout,
      decode=decode,
      max_decode_length=None,
    )

  def of_batch(
    self, batch: Mapping[str, Any], *, enable_dropout: bool = True
  ) -> jax.Array:
    """Logits <float32>[batch, targets, vocab] of a batch by T5X's keys.

    Args:
      batch: arrays by their T5X names, such as `encoder_input_tokens`; plans,
        if there are any, are under `encoder_plan` and `decoder_plan`.
      enable_dropout: whether dropout draws from the `dropout` random stream.
    """
    return self(
      **{name: batch[name] for name in _FEATURES if name in batch},
      enable_dropout=enable_dropout,
    )

  def encode(
    self,
    encoder_input_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    *,
    encoder_routing_ids: jax.Array | None = None,
    enable_dropout: bool = True,
  ) -> jax.Array:
    """Returns the encoder's outputs <dtype>[batch, inputs, embed].

    Args:
      encoder_input_tokens: <int32>[batch, inputs], token ids; 0 is padding.
      encoder_segment_ids: <int32>[batch, inputs], the number of the example to
        which each input of a packed row belongs; None if rows are not packed.
      encoder_routing_ids: <int32>[batch, inputs], routing ids of the tokens;
        None if the config's routing makes them from the tokens.
      enable_dropout: whether dropout draws from the `dropout` random stream.
    """
    return self._encode(
      self.token_embedder(encoder_input_tokens.astype(jnp.int32)),
      encoder_input_tokens,
      encoder_segment_ids,
      routing=model_config.StreamRouting(encoder_routing_ids),
      enable_dropout=enable_dropout,
    )

  def _encode(
    self,
    embedded,
    encoder_input_tokens,
    encoder_segment_ids,
    *,
    routing,
    enable_dropout,
  ):
    ids = encoder_input_tokens.astype(jnp.int32)
    real = ids > 0
    # <bool>[batch, 1, query, key]
    mask = real[:, None, :, None] & real[:, None, None, :]
    mask = _same_segment(mask, encoder_segment_ids, encoder_segment_ids)
    if not routing.is_given and self.config.sparse_encoder_layers:
      routing = routing._replace(
        ids=self._routing_ids('encoder_ids', ids, real, encoder_segment_ids)
      )
    routing = token_memories.with_rows(
      routing, self.config, 'encoder', ids, encoder_segment_ids
    )
    return self.encoder(embedded, mask, routing, not enable_dropout)

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
    decoder_routing_ids: jax.Array | None = None,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> jax.Array:
    """Returns logits <float32>[batch, targets, vocab].

    With `decode=True` and a cache, the call computes the next token alone:
    `decoder_input_tokens` is [batch, 1], and the targets are ignored.

    Args:
      encoded: <dtype>[batch, inputs, embed], the encoder's outputs.
      encoder_input_tokens: <int32>[batch, inputs], token ids; 0 is padding.
      decoder_input_tokens: <int32>[batch, targets], the targets shifted to the
        right by one.
      decoder_target_tokens: <int32>[batch, targets], token ids; 0 is padding.
      encoder_segment_ids: <int32>[batch, inputs], the number of the example to
        which each input of a packed row belongs; None if rows are not packed.
      decoder_segment_ids: <int32>[batch, targets], the number of the example to
        which each target of a packed row belongs; None if rows are not packed.
      decoder_positions: not used. T5X passes it, but relative positions do not
        need it.
      decoder_routing_ids: <int32>[batch, targets], routing ids of the decoder's
        tokens; None if the config's routing makes them from the tokens.
      enable_dropout: whether dropout draws from the `dropout` random stream.
      decode: whether to decode step by step. A call without a cache makes one
        with room for as many tokens as it has inputs.
      max_decode_length: number of tokens for which the cache has room; needed
        when there is a cache.
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
      routing=model_config.StreamRouting(decoder_routing_ids),
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
    routing,
    enable_dropout,
    decode,
    max_decode_length,
  ):
    inputs = decoder_input_tokens.astype(jnp.int32)
    memory = encoder_input_tokens.astype(jnp.int32) > 0
    if decode:
      # The attention masks what is not in the cache yet.
      real, mask = jnp.ones(inputs.shape, bool), None
    else:
      # Padding is told by the targets, because the first input is id 0 too.
      real = decoder_target_tokens > 0
      length = inputs.shape[1]
      causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
      mask = causal & real[:, None, :, None] & real[:, None, None, :]
      mask = _same_segment(mask, decoder_segment_ids, decoder_segment_ids)
    cross_mask = real[:, None, :, None] & memory[:, None, None, :]
    cross_mask = _same_segment(
      cross_mask, decoder_segment_ids, encoder_segment_ids
    )
    if not routing.is_given and self.config.sparse_decoder_layers:
      routing = routing._replace(
        ids=self._decoder_routing_ids(inputs, real, decoder_segment_ids, decode)
      )
    if decode:
      routing = self._with_rows_of_step(routing, inputs)
    routing = token_memories.with_rows(
      routing, self.config, 'decoder', inputs, decoder_segment_ids
    )
    tokens = self.decoder(
      embedded,
      encoded,
      mask,
      cross_mask,
      routing,
      decode=decode,
      max_decode_length=max_decode_length,
      deterministic=not enable_dropout,
    )
    if self.config.logits_via_embedding:
      return self.token_embedder.attend(tokens)
    return self.decoder.logits(tokens)

  def remember(self, encoded: jax.Array) -> None:
    """Stores the cross-attention's keys and values of the encoder's outputs.

    They are put in the collection `encoder_memory`, from which later calls of
    `decode` read them instead of projecting `encoded`.

    Args:
      encoded: <dtype>[batch, inputs, embed], the encoder's outputs.
    """
    self.decoder.remember(encoded)

  def _routing_ids(self, method, ids, real, segment_ids):
    return model_config.routing_ids(self.config, method, ids, real, segment_ids)

  def _decoder_routing_ids(self, inputs, real, segment_ids, decode):
    names = model_config.names_experts(self.config)
    if not decode or names is None:
      return self._routing_ids('decoder_ids', inputs, real, segment_ids)
    if not self.has_variable('cache', 'word_so_far'):
      ids = self._routing_ids('decoder_ids', inputs, real, segment_ids)
      # The state has rank 2, because T5X's beam search does not reorder leaves
      # of rank 1.
      state = names.initial_state(inputs.shape[0])
      self.put_variable('cache', 'word_so_far', jnp.asarray(state))
      return ids
    state = self.get_variable('cache', 'word_so_far')
    ids, state = names.decoder_step(inputs, state)
    self.put_variable('cache', 'word_so_far', state)
    return ids

  def _with_rows_of_step(self, routing, tokens):
    """The routing with the rows of one step, if there is a cache."""
    states = token_memories.initial_states(self.config, tokens.shape[0])
    if not self.has_variable('cache', 'memory_states'):
      states = jax.tree.map(jnp.asarray, states)
      if states:
        self.put_variable('cache', 'memory_states', states)
      return routing
    rows, states = token_memories.next_rows(
      self.config, tokens, self.get_variable('cache', 'memory_states')
    )
    self.put_variable('cache', 'memory_states', states)
    return routing._replace(memories=routing.memories._replace(rows=rows))

  @nn.nowrap
  def start_generation(
    self,
    variables: Any,
    inputs: jax.Array,
    max_length: int,
    rows_per_example: int,
  ) -> tuple[decoding.CountedStep, decoding.Cache]:
    """Returns the step function and the cache that `decoding` begins with.

    Args:
      variables: a dict with 'params', the parameters of the model.
      inputs: <int32>[batch, inputs], token ids of the encoder; 0 is padding.
      max_length: the largest number of tokens of a generated sequence.
      rows_per_example: rows per example with which the strategy calls the step
        function. The cache has one row per example; the strategy expands it.
    """
    apply = functools.partial(self.apply, enable_dropout=False)
    encoded = apply(variables, inputs, method='encode')
    cache = initial_cache(self, variables, encoded, inputs, max_length)
    # The decoder's keys and values of the encoder's outputs are the same at
    # every step, so they are computed once.
    _, memory = self.apply(
      variables, encoded, method='remember', mutable=['encoder_memory']
    )
    encoded, inputs, memory = decoding.expand_rows(
      (encoded, inputs, memory), rows_per_example
    )
    # Without the barrier, XLA moves their transposition into the loop and
    # repeats it at each step.
    memory = jax.lax.optimization_barrier(memory)

    def step_function(tokens, cache):
      logits, changed = apply(
        {**variables, **memory, 'cache': cache},
        encoded,
        inputs,
        tokens,
        tokens,
        decode=True,
        max_decode_length=max_length,
        method='decode',
        mutable=['cache', router_losses.COLLECTION],
      )
      counted = changed.get(router_losses.COLLECTION, {})
      return logits[:, 0], changed['cache'], counted

    return step_function, cache


# Keys of a batch that are arguments of `T5.__call__`.
_FEATURES = (
  'encoder_input_tokens',
  'decoder_input_tokens',
  'decoder_target_tokens',
  'encoder_segment_ids',
  'decoder_segment_ids',
  'encoder_routing_ids',
  'decoder_routing_ids',
  'encoder_plan',
  'decoder_plan',
  'encoder_memory_rows',
  'decoder_memory_rows',
)


def _same_segment(mask, query_segments, key_segments):
  """Restricts a mask to keys of the query's own segment of a packed row.

  Args:
    mask: <bool>[batch, 1, query, key].
    query_segments: <int32>[batch, query], or None if rows are not packed.
    key_segments: <int32>[batch, key], or None if rows are not packed.
  """
  if query_segments is None or key_segments is None:
    return mask
  same = query_segments[:, None, :, None] == key_segments[:, None, None, :]
  return mask & same


def initial_cache(
  model: nn.Module,
  variables: Any,
  encoded: jax.Array,
  encoder_input_tokens: jax.Array,
  max_length: int,
) -> decoding.Cache:
  """Returns the decoder's cache before the first token.

  All of it but the states of memories is zeros. The shapes come from tracing a
  first pass, which is never run.

  Args:
    model: a module with the methods of `mowe.models.t5.t5.T5`.
    variables: a dict with 'params', the parameters of the model.
    encoded: <dtype>[batch, inputs, embed], the encoder's outputs.
    encoder_input_tokens: <int32>[batch, inputs], token ids; 0 is padding.
    max_length: the number of steps for which the cache has room.
  """
  targets = jnp.ones((encoded.shape[0], max_length), jnp.int32)

  def first_pass(variables, encoded, inputs):
    _, changed = model.apply(
      variables,
      encoded,
      inputs,
      targets,
      targets,
      enable_dropout=False,
      decode=True,
      method='decode',
      mutable=['cache'],
    )
    return changed['cache']

  shapes = jax.eval_shape(first_pass, variables, encoded, encoder_input_tokens)
  cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  if 'memory_states' in cache:
    # What stands for the tokens before a text need not be 0.
    states = token_memories.initial_states(model.config, encoded.shape[0])
    cache = {**cache, 'memory_states': jax.tree.map(jnp.asarray, states)}
  return cache
