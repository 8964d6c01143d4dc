"""Decoder-only language model, with any attention and any feed-forward."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.layers import embedding
from mowe.layers.attention import self_attention
from mowe.layers.routers import router_losses
from mowe.models import decoding, model_config
from mowe.models.decoder_only import decoder_only_config, decoder_only_stack

MEMORY = model_config.MEMORY


class DecoderOnly(nn.Module):
  """Decoder-only language model.

  The first input of a row is id 0, as in T5's decoder; the inputs of an example
  that has some stand before its targets.

  Call: see `__call__`.
  """

  config: decoder_only_config.DecoderOnlyConfig

  def setup(self):
    config = self.config
    self.token_embedder = embedding.Embedding(
      config.vocab_size,
      config.emb_dim,
      config.dtype,
      stddev=config.embedding_stddev,
    )
    shared = {}
    for name, module in config.make_shared().items():
      # Assigning gives the module its place in the tree: `experts/...`.
      setattr(self, name, module)
      shared[name] = getattr(self, name)
    self.decoder = decoder_only_stack.Decoder(config, shared)

  def __call__(
    self,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    decoder_segment_ids: jax.Array | None = None,
    decoder_positions: jax.Array | None = None,
    decoder_causal_attention: jax.Array | None = None,
    *,
    decoder_routing_ids: jax.Array | None = None,
    decoder_plan: Any = None,
    enable_dropout: bool = True,
  ) -> jax.Array:
    """Logits <float32>[batch, length, vocab] with teacher forcing.

    With the collection MEMORY, rows continue those of the batch before.

    Args:
      decoder_input_tokens: <int32>[batch, length], shifted targets.
      decoder_target_tokens: <int32>[batch, length], 0 is padding.
      decoder_segment_ids: <int32>[batch, length] of packed examples, or None.
      decoder_positions: taken for T5X's sake; distances need none.
      decoder_causal_attention: <int32>[batch, length], 1 where a token of the
        inputs goes in; of use with `prefix_lm`.
      decoder_routing_ids: <int32>[batch, length]; None: they are made from the
        tokens by the config's routing.
      decoder_plan: the plan of these tokens (`batch_plans.StreamPlan`), or
        None.
      enable_dropout: draws from the `dropout` stream.
    """
    del decoder_positions
    ids = decoder_input_tokens.astype(jnp.int32)
    real = decoder_target_tokens > 0
    old = self.decoder.remembered(real)
    num_old = 0 if old is None else old.shape[1]
    keys = np.arange(num_old + ids.shape[1])
    positions = self_attention.Positions(keys[num_old:], keys)
    sees = (keys[None, :] <= positions.queries[:, None])[None]
    if self.config.prefix_lm and decoder_causal_attention is not None:
      inputs = decoder_causal_attention > 0
      sees = sees | (inputs[:, :, None] & inputs[:, None, :])
    real_keys = real if old is None else jnp.concatenate([old, real], axis=1)
    sees = sees & real[:, :, None] & real_keys[:, None, :]
    if decoder_segment_ids is not None:
      same = decoder_segment_ids[:, :, None] == decoder_segment_ids[:, None, :]
      sees = sees & jnp.pad(
        same, ((0, 0), (0, 0), (num_old, 0)), constant_values=True
      )
    routing = model_config.StreamRouting(decoder_routing_ids, decoder_plan)
    if not routing.is_given and self.config.sparse_decoder_layers:
      routing = model_config.StreamRouting(
        model_config.routing_ids(
          self.config, 'decoder_ids', ids, real, decoder_segment_ids
        )
      )
    return self._logits(
      ids, positions, sees, routing, False, not enable_dropout
    )

  def of_batch(
    self, batch: Mapping[str, Any], *, enable_dropout: bool = True
  ) -> jax.Array:
    """Logits <float32>[batch, length, vocab] of a batch by T5X's keys.

    Args:
      batch: as in docs/architecture; the plan is under `decoder_plan`.
      enable_dropout: draws from the `dropout` stream.
    """
    return self(
      **{name: batch[name] for name in _FEATURES if name in batch},
      enable_dropout=enable_dropout,
    )

  def decode(
    self,
    tokens: jax.Array,
    real: jax.Array,
    routing_ids: jax.Array | None,
    length: int,
  ) -> jax.Array:
    """Logits <float32>[batch, query, vocab] of tokens after those in the cache.

    Args:
      tokens: <int32>[batch, query], the first ones or one more.
      real: <bool>[batch, query], False for padding on the left.
      routing_ids: <int32>[batch, query], or None.
      length: tokens for which the cache has room.
    """
    num_queries = tokens.shape[1]
    if not self.has_variable('cache', 'cache_index'):
      self.put_variable('cache', 'cache_index', jnp.zeros((), jnp.int32))
      self.put_variable('cache', 'real', jnp.zeros_like(real))
      index, all_real = 0, real
    else:
      index = self.get_variable('cache', 'cache_index')
      all_real = jax.lax.dynamic_update_slice(
        self.get_variable('cache', 'real'), real, (0, index)
      )
      self.put_variable('cache', 'cache_index', index + num_queries)
      self.put_variable('cache', 'real', all_real)
    positions = self_attention.Positions(
      index + jnp.arange(num_queries), jnp.arange(length)
    )
    sees = positions.keys[None, :] <= positions.queries[:, None]
    if self.config.prefix_lm and num_queries > 1:
      # The inputs, which come together.
      sees = jnp.broadcast_to(positions.keys < num_queries, sees.shape)
    sees = sees[None] & all_real[:, None, :]
    routing = model_config.StreamRouting(routing_ids)
    return self._logits(tokens, positions, sees, routing, True, True)

  def _logits(self, ids, positions, sees, routing, decode, deterministic):
    tokens = self.decoder(
      self.token_embedder(ids),
      positions,
      sees[:, None],
      routing,
      decode,
      deterministic,
    )
    if self.config.logits_via_embedding:
      return self.token_embedder.attend(tokens)
    return self.decoder.logits(tokens)

  @nn.nowrap
  def start_generation(
    self,
    variables: Any,
    inputs: jax.Array,
    max_length: int,
    rows_per_example: int,
  ) -> tuple[decoding.CountedStep, decoding.Cache]:
    """The step function and the cache that `decoding` begins with.

    All inputs go through the model at once, aligned at their ends: so the next
    token has the same place in every row.

    Args:
      variables: a dict with 'params'.
      inputs: <int32>[batch, inputs], 0 is padding at their ends.
      max_length: most tokens of a sequence.
      rows_per_example: rows of the step function; the cache has one.
    """
    del rows_per_example
    tokens, real = aligned_at_end(inputs)
    length = tokens.shape[1] + max_length
    cache = self._empty_cache(variables, inputs.shape[0], length)
    router = _Router(self.config, inputs.shape[0])
    routing_ids, words = router.of_inputs(tokens, real)

    def run(cache, tokens, real, routing_ids):
      logits, changed = self.apply(
        {**variables, 'cache': cache},
        tokens,
        real,
        routing_ids,
        length,
        method='decode',
        mutable=['cache', router_losses.COLLECTION],
      )
      counted = changed.get(router_losses.COLLECTION, {})
      return logits[:, -1], changed['cache'], counted

    logits, cache, counted_of_inputs = run(cache, tokens, real, routing_ids)
    first = {
      'is_first': jnp.ones((), bool),
      'logits': logits,
      'model': cache,
      'words': words,
    }

    def later(tokens, state):
      routing_ids, words = router.of_token(tokens, state['words'])
      real = jnp.ones(tokens.shape, bool)
      logits, cache, counted = run(state['model'], tokens, real, routing_ids)
      state = {
        'is_first': jnp.zeros((), bool),
        'logits': logits,
        'model': cache,
        'words': words,
      }
      return logits, state, counted

    def step_function(tokens, state):
      # A strategy begins with id 0, which stands before the inputs here.
      return jax.lax.cond(
        state['is_first'],
        lambda tokens, state: (
          state['logits'],
          state | {'is_first': jnp.zeros((), bool)},
          counted_of_inputs,
        ),
        later,
        tokens,
        state,
      )

    return step_function, first

  @nn.nowrap
  def _empty_cache(self, variables, batch_size, length):
    """Zeros, in the shapes of a pass over all tokens that is not made."""
    tokens = jnp.ones((batch_size, length), jnp.int32)
    routing_ids = None
    if self.config.sparse_feed_forward is not None:
      routing_ids = jnp.zeros_like(tokens)

    def whole_pass(variables):
      _, changed = self.apply(
        variables,
        tokens,
        tokens > 0,
        routing_ids,
        length,
        method='decode',
        mutable=['cache'],
      )
      return changed['cache']

    shapes = jax.eval_shape(whole_pass, variables)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


# What of a batch `DecoderOnly.__call__` takes.
_FEATURES = (
  'decoder_input_tokens',
  'decoder_target_tokens',
  'decoder_segment_ids',
  'decoder_causal_attention',
  'decoder_routing_ids',
  'decoder_plan',
)


class _Router:
  """Routing ids of tokens that are generated, with the state of words."""

  def __init__(
    self, config: decoder_only_config.DecoderOnlyConfig, batch_size: int
  ):
    self._config = config
    self._is_needed = bool(config.sparse_decoder_layers)
    self._has_words = self._is_needed and config.routing is not None
    self._batch_size = batch_size

  def of_inputs(self, tokens, real):
    """Ids of all inputs, and the state after them, {} without words."""
    if not self._has_words:
      return self._of_tokens(tokens, real), {}
    routing = self._config.routing
    state = jnp.asarray(routing.initial_state(self._batch_size))

    def step(state, token):
      ids, state = routing.decoder_step(token[:, None], state)
      return state, ids[:, 0]

    state, ids = jax.lax.scan(step, state, tokens.T)
    return jnp.where(real, ids.T, -1), {'state': state}

  def of_token(self, tokens, words):
    """Ids of one token more [batch, 1], and the next state."""
    if not self._has_words:
      return self._of_tokens(tokens, jnp.ones(tokens.shape, bool)), {}
    ids, state = self._config.routing.decoder_step(tokens, words['state'])
    return ids, {'state': state}

  def _of_tokens(self, tokens, real):
    if not self._is_needed:
      return None
    return model_config.routing_ids(self._config, '', tokens, real, None)


def aligned_at_end(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Rows moved to the right, each after the id 0 with which texts begin.

  Args:
    inputs: <int32>[batch, inputs], 0 is padding at their ends.

  Returns:
    Tokens <int32>[batch, inputs + 1], and which are real: those of the inputs
    and the one 0 before them.
  """
  length = inputs.shape[1] + 1
  sizes = jnp.sum(inputs > 0, axis=1)[:, None]
  # [0, a, b, pad, pad] -> [pad, pad, 0, a, b]
  started = jnp.pad(inputs, ((0, 0), (1, 0)))
  shift = inputs.shape[1] - sizes
  places = jnp.arange(length)[None, :]
  source = jnp.maximum(places - shift, 0)
  tokens = jnp.take_along_axis(started, source, axis=1)
  real = places >= shift
  return jnp.where(real, tokens, 0), real
