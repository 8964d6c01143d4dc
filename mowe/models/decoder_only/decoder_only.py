"""Decoder-only language model, with any attention and any feed-forward."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.layers import embedding
from mowe.layers.attention import self_attention
from mowe.layers.routers import router_losses
from mowe.models import decoding, model_config, token_memories
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
    tables = {}
    for name, table in token_memories.make_tables(config).items():
      setattr(self, name, table)
      tables[name] = getattr(self, name)
    self.decoder = decoder_only_stack.DecoderOnlyStack(config, shared, tables)

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
    decoder_memory_rows: Mapping[str, jax.Array] | None = None,
    enable_dropout: bool = True,
  ) -> jax.Array:
    """Returns logits <float32>[batch, length, vocab] with teacher forcing.

    If the collection MEMORY is given, each row continues the same row of the
    previous batch.

    Args:
      decoder_input_tokens: <int32>[batch, length], the targets shifted to the
        right by one.
      decoder_target_tokens: <int32>[batch, length], token ids; 0 is padding.
      decoder_segment_ids: <int32>[batch, length], the number of the example to
        which each token of a packed row belongs; None if rows are not packed.
      decoder_positions: not used. T5X passes it, but attention here depends on
        distances alone.
      decoder_causal_attention: <int32>[batch, length], 1 where the token is one
        of the example's inputs. It is used with `prefix_lm` only; None is a
        causal mask everywhere.
      decoder_routing_ids: <int32>[batch, length], routing ids; None if the
        config's routing makes them from the tokens.
      decoder_plan: a `batch_plans.StreamPlan`, where the host decided in which
        slot each token is computed; None if the layers use the routing ids.
      decoder_memory_rows: name of a memory -> <int32>[batch, length, slots],
        the rows that tokens name; None if the model finds them.
      enable_dropout: whether dropout draws from the `dropout` random stream.
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
    # Keys are the remembered tokens followed by those of this batch; every mask
    # is <bool>[batch, query, key].
    real_keys = real if old is None else jnp.concatenate([old, real], axis=1)
    sees = sees & real[:, :, None] & real_keys[:, None, :]
    if decoder_segment_ids is not None:
      # The memory is visible from all segments.
      same = decoder_segment_ids[:, :, None] == decoder_segment_ids[:, None, :]
      sees = sees & jnp.pad(
        same, ((0, 0), (0, 0), (num_old, 0)), constant_values=True
      )
    routing = model_config.StreamRouting(
      decoder_routing_ids,
      decoder_plan,
      model_config.MemoryInputs(decoder_memory_rows),
    )
    if not routing.is_given and self.config.sparse_decoder_layers:
      routing = routing._replace(
        ids=model_config.routing_ids(
          self.config, 'decoder_ids', ids, real, decoder_segment_ids
        )
      )
    routing = token_memories.with_rows(
      routing, self.config, 'decoder', ids, decoder_segment_ids
    )
    return self._logits(
      ids, positions, sees, routing, False, not enable_dropout
    )

  def of_batch(
    self, batch: Mapping[str, Any], *, enable_dropout: bool = True
  ) -> jax.Array:
    """Logits <float32>[batch, length, vocab] of a batch by T5X's keys.

    Args:
      batch: arrays by their T5X names, such as `decoder_input_tokens`; the plan
        of the tokens, if there is one, is under `decoder_plan`.
      enable_dropout: whether dropout draws from the `dropout` random stream.
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
    memory_rows: Mapping[str, jax.Array],
    length: int,
  ) -> jax.Array:
    """Returns logits <float32>[batch, query, vocab] and updates the cache.

    Args:
      tokens: <int32>[batch, query], all inputs at the first call and one new
        token per row at each later call.
      real: <bool>[batch, query], False for padding on the left.
      routing_ids: <int32>[batch, query], routing ids; None if no layer of the
        model reads any.
      memory_rows: name of a memory -> <int32>[batch, query, slots], the rows
        that tokens name.
      length: the number of tokens for which the cache has room.
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
      # The inputs arrive in one call, and all of them see each other.
      sees = jnp.broadcast_to(positions.keys < num_queries, sees.shape)
    sees = sees[None] & all_real[:, None, :]
    routing = model_config.StreamRouting(
      routing_ids, memories=model_config.MemoryInputs(memory_rows)
    )
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
    """Returns the step function and the cache that `decoding` begins with.

    All inputs go through the model in one pass. They are aligned at their ends,
    so that the next token has the same position in every row.

    Args:
      variables: a dict with 'params', the parameters of the model.
      inputs: <int32>[batch, inputs], token ids; rows end with padding, 0.
      max_length: the largest number of tokens of a generated sequence.
      rows_per_example: rows per example with which the strategy calls the step
        function. The cache has one row per example; the strategy expands it.
    """
    del rows_per_example
    tokens, real = aligned_at_end(inputs)
    length = tokens.shape[1] + max_length
    cache = self._empty_cache(variables, inputs.shape[0], length)
    router = _GenerationRouter(self.config, inputs.shape[0])
    addressed, words = router.of_inputs(tokens, real)
    run = functools.partial(_decode_tokens, self, variables, length)
    logits, cache, counted = run(cache, tokens, real, addressed)
    state = _generation_state(logits, cache, words, is_first=True)
    return _GenerationStep(run, router, counted), state

  @nn.nowrap
  def _empty_cache(self, variables, batch_size, length):
    """Returns a cache of zeros with room for `length` tokens.

    The shapes come from tracing a pass over all tokens, which is never run.
    """
    tokens = jnp.ones((batch_size, length), jnp.int32)
    routing_ids = None
    if self.config.sparse_feed_forward is not None:
      routing_ids = jnp.zeros_like(tokens)
    rows = token_memories.rows_of(self.config, 'decoder', tokens)

    def whole_pass(variables):
      _, changed = self.apply(
        variables,
        tokens,
        tokens > 0,
        routing_ids,
        rows,
        length,
        method='decode',
        mutable=['cache'],
      )
      return changed['cache']

    shapes = jax.eval_shape(whole_pass, variables)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


# Keys of a batch that are arguments of `DecoderOnly.__call__`.
_FEATURES = (
  'decoder_input_tokens',
  'decoder_target_tokens',
  'decoder_segment_ids',
  'decoder_causal_attention',
  'decoder_routing_ids',
  'decoder_plan',
  'decoder_memory_rows',
)


def _decode_tokens(
  model: DecoderOnly,
  variables: Any,
  length: int,
  cache: decoding.Cache,
  tokens: jax.Array,
  real: jax.Array,
  addressed: '_Addressed',
) -> tuple[jax.Array, decoding.Cache, Any]:
  """Returns the last logits <float32>[batch, vocab], the cache, and counts.

  The counts are the collection `router_losses.COLLECTION`, {} without routers.
  """
  logits, changed = model.apply(
    {**variables, 'cache': cache},
    tokens,
    real,
    addressed.routing_ids,
    addressed.rows,
    length,
    method='decode',
    mutable=['cache', router_losses.COLLECTION],
  )
  counted = changed.get(router_losses.COLLECTION, {})
  return logits[:, -1], changed['cache'], counted


def _generation_state(logits, cache, words, *, is_first):
  """Returns the cache of the strategy: the model's, and the state around it."""
  return {
    'is_first': jnp.full((), is_first, bool),
    'logits': logits,
    'model': cache,
    'words': words,
  }


@dataclasses.dataclass(frozen=True, eq=False)
class _GenerationStep:
  """The step function of a generation, a `decoding.CountedStep`.

  Attributes:
    run: `_decode_tokens` with its model, variables and length.
    router: gives the routing ids of each new token.
    counted_of_inputs: counts of the routers in the pass over the inputs.
  """

  run: Callable[..., tuple[jax.Array, decoding.Cache, Any]]
  router: '_GenerationRouter'
  counted_of_inputs: Any

  def __call__(
    self, tokens: jax.Array, state: decoding.Cache
  ) -> tuple[jax.Array, decoding.Cache, Any]:
    """Returns logits <float32>[rows, vocab], the next state, and counts."""
    # A strategy begins with id 0, which here stands before the inputs and has
    # been read with them: the first step returns the logits of that pass.
    return jax.lax.cond(
      state['is_first'], self._first, self._later, tokens, state
    )

  def _first(self, tokens, state):
    del tokens
    later = state | {'is_first': jnp.zeros((), bool)}
    return state['logits'], later, self.counted_of_inputs

  def _later(self, tokens, state):
    addressed, words = self.router.of_token(tokens, state['words'])
    real = jnp.ones(tokens.shape, bool)
    logits, cache, counted = self.run(state['model'], tokens, real, addressed)
    state = _generation_state(logits, cache, words, is_first=False)
    return logits, state, counted


class _Addressed(NamedTuple):
  """What tokens name while text is generated.

  Attributes:
    routing_ids: <int32>[batch, length]; None if no layer reads any.
    rows: name of a memory -> <int32>[batch, length, slots].
  """

  routing_ids: jax.Array | None
  rows: dict[str, jax.Array]


class _GenerationRouter:
  """Finds what tokens name while they are generated.

  With a routing vocabulary, the id of a token depends on the word so far, and
  with an address, as the rows of a memory, on some tokens before it. The states
  of both are carried from step to step.
  """

  def __init__(
    self, config: decoder_only_config.DecoderOnlyConfig, batch_size: int
  ):
    self._config = config
    self._is_needed = bool(config.sparse_decoder_layers)
    self._names = model_config.names_experts(config)
    self._has_words = self._is_needed and self._names is not None
    self._batch_size = batch_size

  def of_inputs(self, tokens, real):
    """Returns what the inputs name, and the states after them.

    The inputs end in the last column, and are padded before. Without a routing
    vocabulary and memories, the state is {}.
    """
    words = {}
    if self._has_words:
      words['word'] = self._names.initial_state(self._batch_size)
    words['memories'] = token_memories.initial_states(
      self._config, self._batch_size
    )
    words = jax.tree.map(jnp.asarray, words)
    if not jax.tree.leaves(words):
      return _Addressed(self._of_tokens(tokens, real), {}), words

    def step(words, inputs):
      token, is_real = inputs
      addressed, after = self.of_token(token[:, None], words)
      # Padding before the inputs leaves the states as they are.
      words = jax.tree.map(
        lambda new, old: jnp.where(is_real[:, None], new, old), after, words
      )
      return words, jax.tree.map(lambda x: x[:, 0], addressed)

    words, addressed = jax.lax.scan(step, words, (tokens.T, real.T))
    # [length, batch, ...] -> [batch, length, ...]
    ids, rows = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), addressed)
    if not self._has_words:
      return _Addressed(self._of_tokens(tokens, real), rows), words
    return _Addressed(jnp.where(real, ids, -1), rows), words

  def of_token(self, tokens, words):
    """Returns what the next tokens [rows, 1] name, and the states."""
    rows, states = token_memories.next_rows(
      self._config, tokens, words['memories']
    )
    if not self._has_words:
      ids = self._of_tokens(tokens, jnp.ones(tokens.shape, bool))
      return _Addressed(ids, rows), {'memories': states}
    ids, word = self._names.decoder_step(tokens, words['word'])
    return _Addressed(ids, rows), {'memories': states, 'word': word}

  def _of_tokens(self, tokens, real):
    if not self._is_needed:
      return None
    return model_config.routing_ids(self._config, '', tokens, real, None)


def aligned_at_end(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Moves rows to the right, so that all of them end in the last column.

  Args:
    inputs: <int32>[batch, inputs], token ids; rows end with padding, 0.

  Returns:
    Tokens <int32>[batch, inputs + 1], where the id 0, with which every text
    begins, stands before each row, and a mask <bool>[batch, inputs + 1] that is
    True for the inputs and for that 0.
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
