"""Generating tokens step by step: greedy, sampling and beam search.

The three strategies replace each other: each is a frozen dataclass with one
call, `strategy(step_function, initial_cache, batch_size, max_length, key)`, and
knows nothing of the model. `generate` makes the step function out of a model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.words import base_vocabulary

Cache = Any
# A function from the last tokens <int32>[rows, 1] and a cache to the logits
# <float>[rows, vocab] of the next tokens and the next cache. Leaves of the
# cache of rank 2 and more have the rows on axis 0.
StepFunction = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]
# A step function that also returns the counts of this step's routers, the
# collection `router_losses.COLLECTION`. If the caller drops them, XLA does not
# compute them.
CountedStep = Callable[[jax.Array, Cache], tuple[jax.Array, Cache, Any]]

# T5X's score of a beam that does not exist. It is finite, because sums and
# differences of infinities would be NaN.
_IMPOSSIBLE = -1.0e7


class Strategy(Protocol):
  """How tokens are chosen, given their probabilities.

  Attributes:
    rows_per_example: number of rows per example with which the strategy calls
      the step function, such as the number of beams.
  """

  rows_per_example: int

  def __call__(
    self,
    step_function: StepFunction,
    initial_cache: Cache,
    batch_size: int,
    max_length: int,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns tokens <int32>[batch, length] and scores <float32>[batch].

    The first input token of each row is 0. A row ends with EOS and is padded
    with 0; the loop stops early when all rows have ended.

    Args:
      step_function: computes the logits of the next tokens.
      initial_cache: the cache before the first step, with one row per example.
      batch_size: number of examples.
      max_length: the largest number of tokens of a sequence, EOS included.
      key: random key of strategies that draw; others accept None.
    """


@dataclasses.dataclass(frozen=True)
class Greedy:
  """The most probable token at each step.

  The score is the log-probability of the tokens, EOS included.
  """

  rows_per_example = 1

  def __call__(
    self,
    step_function: StepFunction,
    initial_cache: Cache,
    batch_size: int,
    max_length: int,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """See `Strategy`; the key is not used."""
    del key
    rows = _extend(
      step_function,
      initial_cache,
      batch_size,
      max_length,
      lambda logits, position: _argmax(logits),
    )
    return rows.tokens, rows.scores


@dataclasses.dataclass(frozen=True)
class Sample:
  """A random token at each step.

  The score is the log-probability of the tokens in the model's own
  distribution, before temperature, top_k and top_p: it compares with those of
  other strategies. (T5X gives that of the changed distribution by default.)

  Attributes:
    temperature: number by which the logits are divided; values below 1 are
      closer to greedy decoding.
    top_k: number of most probable tokens among which one is drawn; 0 for all.
    top_p: of those, only the smallest set of most probable tokens whose
      probabilities add up to at least top_p is kept; 1.0 keeps all.

  Raises:
    ValueError: a value out of its range; a call without a key.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  rows_per_example = 1

  def __post_init__(self):
    if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(
        'Sample needs temperature > 0, top_k >= 0 and 0 < top_p <= 1, but they '
        f'are {self.temperature}, {self.top_k} and {self.top_p}. Use Greedy() '
        'for the most probable token, top_k=0 and top_p=1.0 for all tokens.'
      )

  def __call__(
    self,
    step_function: StepFunction,
    initial_cache: Cache,
    batch_size: int,
    max_length: int,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """See `Strategy`; equal keys give equal tokens."""
    if key is None:
      raise ValueError(
        'Sample needs a key, but got None. Pass key=jax.random.key(seed).'
      )

    def choose(logits, position):
      return self._draw(logits, jax.random.fold_in(key, position))

    rows = _extend(step_function, initial_cache, batch_size, max_length, choose)
    return rows.tokens, rows.scores

  def _draw(self, logits, key):
    logits = logits / self.temperature
    if not self.top_k and self.top_p == 1:
      return jax.random.categorical(key, logits)
    # Drawing among sorted logits keeps exactly k of them, even if some tie; a
    # threshold would keep all tied ones. Both are [rows, k], greatest first.
    k = min(self.top_k or logits.shape[-1], logits.shape[-1])
    logits, ids = jax.lax.top_k(logits, k)
    probs = jax.nn.softmax(logits)
    # A token is kept if those before it do not reach top_p on their own.
    before = jnp.cumsum(probs, axis=-1) - probs
    # The first token is always kept: rounding may make the sum before it
    # slightly larger than 0.
    is_kept = (before < self.top_p).at[:, 0].set(True)
    drawn = jax.random.categorical(key, jnp.where(is_kept, logits, -jnp.inf))
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]


def _argmax(logits: jax.Array) -> jax.Array:
  """Returns `jnp.argmax` of <float>[rows, vocab] as <int32>[rows].

  It finds the block with the greatest logit, then the place in that block, so
  that a large vocabulary is read only once. Of equal logits it takes the first.
  """
  rows, vocab_size = logits.shape
  size = math.gcd(vocab_size, 128)
  blocks = logits.reshape(rows, vocab_size // size, size)
  block = _first_greatest(jnp.max(blocks, axis=-1))
  best = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  return block * size + _first_greatest(best)


def _first_greatest(values):
  """Returns the index of the first greatest value: [rows, n] to <int32>[rows].

  It uses two plain reductions, because XLA vectorises these on CPU but not the
  one of `jnp.argmax`, which over 32,000 logits took longer than all the rest of
  a small model.
  """
  # float32 holds integers exactly up to 2**24. Comparisons with NaN are False,
  # so the result is a valid index even then.
  places = -jnp.arange(values.shape[-1], dtype=jnp.float32)[None, :]
  is_less = values < jnp.max(values, axis=-1, keepdims=True)
  first = -jnp.max(jnp.where(is_less, -jnp.inf, places), axis=-1)
  return first.astype(jnp.int32)


def _log_prob(logits, chosen):
  """Returns log-probabilities <float32>[rows] of `chosen` <int32>[rows, 1].

  The values are those of `jax.nn.log_softmax`, of which only one per row is
  needed.
  """
  greatest = jnp.max(logits, axis=-1, keepdims=True)
  sums = jnp.sum(jnp.exp(logits - greatest), axis=-1, keepdims=True)
  shifted = jnp.take_along_axis(logits, chosen, axis=1) - greatest
  return (shifted - jnp.log(sums))[:, 0]


class _Rows(NamedTuple):
  """Rows that grow by one token each step.

  Attributes:
    position: <int32>[], the number of tokens generated so far.
    tokens: <int32>[rows, length], the tokens so far, then 0.
    scores: <float32>[rows], the sums of the tokens' log-probabilities.
    ended: <bool>[rows], whether EOS was chosen.
    last: <int32>[rows, 1], the last tokens, which are the next step's input.
    cache: the cache of the step function.
  """

  position: jax.Array
  tokens: jax.Array
  scores: jax.Array
  ended: jax.Array
  last: jax.Array
  cache: Cache


def _extend(step_function, initial_cache, batch_size, max_length, choose):
  """Appends `choose(logits, position)` to each row until it ends."""

  def step(rows):
    logits, cache = step_function(rows.last, rows.cache)
    logits = logits.astype(jnp.float32)
    chosen = choose(logits, rows.position).astype(jnp.int32)[:, None]
    log_prob = _log_prob(logits, chosen)
    last = jnp.where(rows.ended[:, None], base_vocabulary.PAD_ID, chosen)
    tokens = jax.lax.dynamic_update_slice(rows.tokens, last, (0, rows.position))
    return _Rows(
      position=rows.position + 1,
      tokens=tokens,
      scores=rows.scores + jnp.where(rows.ended, 0.0, log_prob),
      ended=rows.ended | (last[:, 0] == base_vocabulary.EOS_ID),
      last=last,
      cache=cache,
    )

  rows = _Rows(
    position=jnp.zeros((), jnp.int32),
    tokens=jnp.zeros((batch_size, max_length), jnp.int32),
    scores=jnp.zeros(batch_size, jnp.float32),
    ended=jnp.zeros(batch_size, bool),
    last=jnp.zeros((batch_size, 1), jnp.int32),
    cache=initial_cache,
  )
  return jax.lax.while_loop(
    lambda rows: (rows.position < max_length) & ~jnp.all(rows.ended),
    step,
    rows,
  )


@dataclasses.dataclass(frozen=True)
class BeamSearch:
  """The best sequence that a search of limited width finds.

  Source: T5X's decoding.beam_search. The score of a finished sequence is its
  log-probability over the brevity penalty ((5 + length) / 6) ** alpha, EOS
  counted; if none has finished at the maximal length, the most probable
  unfinished sequence is given with its plain log-probability.

  With one beam this is not always greedy: EOS as the second best token already
  makes a finished sequence, which may win in the end.

  Attributes:
    num_beams: number of live sequences per example that each step keeps.
    alpha: exponent of the brevity penalty; 0 compares plain log-probabilities,
      which favours short sequences.

  Raises:
    ValueError: num_beams below 1 or alpha below 0.
  """

  num_beams: int = 4
  alpha: float = 0.6

  def __post_init__(self):
    if self.num_beams < 1 or self.alpha < 0:
      raise ValueError(
        'BeamSearch needs num_beams >= 1 and alpha >= 0, but they are '
        f"{self.num_beams} and {self.alpha}. Use T5X's values, 4 and 0.6."
      )

  @property
  def rows_per_example(self) -> int:
    return self.num_beams

  def __call__(
    self,
    step_function: StepFunction,
    initial_cache: Cache,
    batch_size: int,
    max_length: int,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """See `Strategy`; the key is not used."""
    del key
    tokens, scores = self.search(
      step_function, initial_cache, batch_size, max_length
    )
    return tokens[:, 0], scores[:, 0]

  def search(
    self,
    step_function: StepFunction,
    initial_cache: Cache,
    batch_size: int,
    max_length: int,
  ) -> tuple[jax.Array, jax.Array]:
    """All beams, best first: [batch, beams, length] and [batch, beams]."""
    beams = _initial_beams(
      expand_rows(initial_cache, self.num_beams),
      batch_size,
      self.num_beams,
      max_length,
    )
    beams = jax.lax.while_loop(
      functools.partial(self._goes_on, max_length=max_length),
      functools.partial(self._step, step_function),
      beams,
    )
    is_any = jnp.any(beams.finished, axis=1)
    tokens = jnp.where(
      is_any[:, None, None], beams.finished_tokens, beams.live_tokens
    )
    scores = jnp.where(
      is_any[:, None], beams.finished_scores, beams.live_log_probs
    )
    return tokens, scores

  def _penalty(self, length):
    return ((5.0 + length) / 6.0) ** self.alpha

  def _goes_on(self, beams, max_length):
    """Whether a live beam of some example may still beat a finished one.

    A log-probability only falls as a sequence grows, and the penalty divides by
    most at the maximal length: the best score that a live beam can reach is its
    log-probability now over the penalty of that length.
    """
    best_live = beams.live_log_probs[:, 0] / self._penalty(max_length)
    worst_finished = jnp.where(
      jnp.all(beams.finished, axis=1),
      jnp.min(beams.finished_scores, axis=1),
      _IMPOSSIBLE,
    )
    is_settled = jnp.all(worst_finished > best_live)
    return (beams.position < max_length) & ~is_settled

  def _step(self, step_function, beams):
    batch_size, num_beams = beams.live_log_probs.shape
    last, position = beams.last.reshape(-1, 1), beams.position
    logits, cache = step_function(last, beams.cache)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    vocab_size = log_probs.shape[-1]
    # [batch * beams, vocab] -> [batch, beams, vocab]
    log_probs = log_probs.reshape(batch_size, num_beams, vocab_size)
    log_probs = log_probs + beams.live_log_probs[:, :, None]
    # Each beam has one continuation by EOS, so at most `num_beams` of the best
    # candidates end: among twice as many, `num_beams` live ones remain.
    # log_probs and index: [batch, 2 * beams]
    log_probs, index = jax.lax.top_k(
      log_probs.reshape(batch_size, -1), 2 * num_beams
    )
    parents, chosen = index // vocab_size, index % vocab_size
    tokens = _take(beams.live_tokens, parents)
    tokens = jax.lax.dynamic_update_slice(
      tokens, chosen[:, :, None], (0, 0, position)
    )
    ended = chosen == base_vocabulary.EOS_ID

    # The best candidates that have not ended are the next live beams.
    live_log_probs, best = jax.lax.top_k(
      jnp.where(ended, _IMPOSSIBLE, log_probs), num_beams
    )
    parents = _take(parents, best)
    # The cache row of each new beam's parent, [batch, beams] -> [batch * beams]
    first_rows = jnp.arange(batch_size)[:, None] * num_beams
    rows = (first_rows + parents).reshape(-1)

    # Candidates that have ended compete with the sequences finished earlier:
    # [batch, beams + 2 * beams] -> [batch, beams]
    scores = jnp.where(
      ended, log_probs / self._penalty(position + 1), _IMPOSSIBLE
    )
    scores = jnp.concatenate([beams.finished_scores, scores], axis=1)
    finished_scores, kept = jax.lax.top_k(scores, num_beams)
    finished_tokens = jnp.concatenate([beams.finished_tokens, tokens], axis=1)
    finished = jnp.concatenate([beams.finished, ended], axis=1)
    return _Beams(
      position=position + 1,
      live_tokens=_take(tokens, best),
      live_log_probs=live_log_probs,
      finished_tokens=_take(finished_tokens, kept),
      finished_scores=finished_scores,
      finished=_take(finished, kept),
      last=_take(chosen, best),
      cache=_map_rows(lambda leaf: leaf[rows], cache),
    )


@dataclasses.dataclass(frozen=True)
class AllBeams(BeamSearch):
  """`BeamSearch` that gives all beams, best first.

  Call: as `BeamSearch`, to tokens <int32>[batch, beams, length] and scores
    <float32>[batch, beams]; a beam that holds no finished sequence has a score
    near -1e7.
  """

  def __call__(
    self,
    step_function: StepFunction,
    initial_cache: Cache,
    batch_size: int,
    max_length: int,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """See the class; the key is not used."""
    del key
    return self.search(step_function, initial_cache, batch_size, max_length)


class _Beams(NamedTuple):
  """State of the search; beams stand best first.

  Attributes:
    position: <int32>[], the number of tokens of the live beams.
    live_tokens: <int32>[batch, beams, length], unfinished sequences, no EOS.
    live_log_probs: <float32>[batch, beams], log-probabilities of live beams.
    finished_tokens: <int32>[batch, beams, length], sequences that end with EOS.
    finished_scores: <float32>[batch, beams], log-probabilities of finished
      sequences over their brevity penalty.
    finished: <bool>[batch, beams], whether a finished sequence is in this
      place.
    last: <int32>[batch, beams], last tokens of live beams, the next input.
    cache: the cache of the step function, with batch * beams rows.
  """

  position: jax.Array
  live_tokens: jax.Array
  live_log_probs: jax.Array
  finished_tokens: jax.Array
  finished_scores: jax.Array
  finished: jax.Array
  last: jax.Array
  cache: Cache


def _initial_beams(cache, batch_size, num_beams, max_length):
  shape = (batch_size, num_beams)
  # Only the first beam is alive at the start: equal beams would all choose the
  # same tokens.
  alive = jnp.where(jnp.arange(num_beams) == 0, 0.0, _IMPOSSIBLE)
  return _Beams(
    position=jnp.zeros((), jnp.int32),
    live_tokens=jnp.zeros((*shape, max_length), jnp.int32),
    live_log_probs=jnp.broadcast_to(alive, shape),
    finished_tokens=jnp.zeros((*shape, max_length), jnp.int32),
    finished_scores=jnp.full(shape, _IMPOSSIBLE),
    finished=jnp.zeros(shape, bool),
    last=jnp.zeros(shape, jnp.int32),
    cache=cache,
  )


def _take(beams, index):
  """Takes of beams [batch, beams, ...] those of index [batch, taken]."""
  index = index.reshape(*index.shape, *(1,) * (beams.ndim - index.ndim))
  return jnp.take_along_axis(beams, index, axis=1)


def expand_rows(tree: Any, rows_per_example: int) -> Any:
  """Repeats each row of the leaves [batch, ...].

  Leaves of rank 0 and 1 have no rows and stay as they are.
  """
  if rows_per_example == 1:
    return tree
  return _map_rows(
    lambda leaf: jnp.repeat(leaf, rows_per_example, axis=0), tree
  )


def _map_rows(function, tree):
  return jax.tree.map(
    lambda leaf: function(leaf) if leaf.ndim > 1 else leaf, tree
  )


@functools.partial(jax.jit, static_argnames=('model', 'max_length', 'strategy'))
def generate(
  model: nn.Module,
  variables: Any,
  inputs: jax.Array,
  max_length: int,
  strategy: Strategy,
  key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Generates a sequence for every row of the inputs.

  The function is compiled once for each model, strategy, length and shape of
  the inputs. A model with word experts needs the `routing` of its config. It
  also needs its whole tables on the device, or layers that read them from the
  host, because nobody knows in advance which experts the decoder will need.

  Args:
    model: the module of a `model_config.ModelConfig`.
    variables: a dict with 'params', the parameters of the model.
    inputs: <int32>[batch, inputs], token ids; 0 is padding.
    max_length: the largest number of tokens of a sequence, EOS included.
    strategy: chooses the tokens, such as `Greedy()`.
    key: random key; None is allowed for strategies that do not draw.

  Returns:
    Tokens <int32>[batch, max_length], EOS and 0 after their end, and scores
    <float32>[batch].
  """
  counted_step, cache = model.start_generation(
    variables, inputs, max_length, strategy.rows_per_example
  )
  step_function = lambda tokens, cache: counted_step(tokens, cache)[:2]
  return strategy(step_function, cache, inputs.shape[0], max_length, key)


@functools.partial(jax.jit, static_argnames=('model', 'max_length'))
def count_routed(
  model: nn.Module, variables: Any, inputs: jax.Array, max_length: int
) -> Any:
  """Counts what the decoder's routers choose during greedy generation.

  Args:
    model: the module of a `model_config.ModelConfig`.
    variables: a dict with 'params', the parameters of the model.
    inputs: <int32>[batch, inputs], token ids; 0 is padding.
    max_length: the largest number of tokens of a sequence, EOS included.

  Returns:
    The collection `router_losses.COLLECTION`, added up over all steps; {} if
    the decoder has no router.
  """
  counted_step, cache = model.start_generation(variables, inputs, max_length, 1)
  last = jnp.zeros((inputs.shape[0], 1), jnp.int32)
  shapes = jax.eval_shape(counted_step, last, cache)[2]
  if not jax.tree.leaves(shapes):
    # Without counts, XLA compiles nothing of the above.
    return {}
  none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def step_function(tokens, state):
    logits, cache, counted = counted_step(tokens, state['cache'])
    return logits, {
      'cache': cache,
      'counted': jax.tree.map(jnp.add, state['counted'], counted),
    }

  rows = _extend(
    step_function,
    {'cache': cache, 'counted': none},
    inputs.shape[0],
    max_length,
    lambda logits, position: _argmax(logits),
  )
  return rows.cache['counted']
