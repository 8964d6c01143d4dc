"""Tests decoding against teacher forcing, enumeration, and tables by hand."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.attention import inner_attention
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import mixture_of_heads, moe
from mowe.layers.routers import tokens_choose
from mowe.models import decoding
from mowe.models.t5 import t5, t5_config
from mowe.words import byte_vocabulary, vocabulary_builder

BATCH, INPUTS, TARGETS = 2, 9, 6
BYTES = byte_vocabulary.ByteVocabulary(extra_ids=5)
TEXTS = ['the dog and the fox', 'zorblat met the fox', 'a zorblat sang'] * 3


@functools.cache
def make_model(kind):
  """Makes a model and its variables.

  'mowe' shares one table of experts, 'modules' has modules of heads and of the
  feed-forward, and 'sticks' has no positions in the decoder.
  """
  parts = {}
  if kind == 'mowe':
    routing, _ = vocabulary_builder.build_routing_vocabulary(
      TEXTS, BYTES, num_words=12, num_experts=7, num_skipped=2
    )
    parts = {
      'sparse_feed_forward': functools.partial(
        word_experts.MoweLayer, num_experts=7, expert_dim=5
      ),
      'sparse_encoder_layers': (1,),
      'sparse_decoder_layers': (0, 1),
      'routing': routing,
    }
  if kind in ('modules', 'sticks'):
    heads = functools.partial(
      mixture_of_heads.MixtureOfAttentionHeads, num_experts=4, use_bias=True
    )
    parts = {
      'attention': heads,
      'encoder_attention': functools.partial(
        heads, inner=inner_attention.NearestFirst()
      ),
      'sparse_feed_forward': functools.partial(
        moe.MoeLayer, 3, 5, routing=tokens_choose.TokensChoose(2)
      ),
      'sparse_encoder_layers': (1,),
      'sparse_decoder_layers': (0,),
    }
  if kind == 'sticks':
    parts['decoder_attention'] = functools.partial(
      heads, inner=inner_attention.StickBreaking()
    )
  model = t5.T5(
    t5_config.T5Config(
      vocab_size=BYTES.size,
      emb_dim=8,
      num_heads=2,
      head_dim=3,
      mlp_dim=11,
      num_encoder_layers=2,
      num_decoder_layers=2,
      **parts,
    )
  )
  ids = jnp.ones((1, 2), jnp.int32)
  init = functools.partial(model.init, enable_dropout=False)
  shapes = jax.eval_shape(init, jax.random.key(0), ids, ids, ids)['params']
  # Parameters are drawn with numpy, because compiling the initializers takes
  # longer than most tests. Experts are as large as the rest, so that a wrong
  # one shows.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape, scale=0.4).astype(np.float32),
    shapes,
  )
  return model, {'params': params}


def encode(text, length):
  ids = BYTES.encode(text)[:length]
  return np.pad(np.array(ids, np.int32), (0, length - len(ids)))


def shift(targets):
  return np.pad(targets, ((0, 0), (1, 0)))[:, :-1]


INPUT_TOKENS = np.stack([encode('zorblat', INPUTS), encode('the fox', INPUTS)])
# The words continue, begin and end, so that each step changes the word so far.
TARGET_TOKENS = np.stack([encode('a zorb', TARGETS), encode('the fo', TARGETS)])


@functools.partial(jax.jit, static_argnames='model')
def teacher_forced(model, variables, inputs, targets, **segments):
  """Logits of targets; the decoder's inputs are shifted here."""
  shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  if segments:
    before = jnp.pad(segments['decoder_segment_ids'], ((0, 0), (1, 0)))[:, :-1]
    is_first = before != segments['decoder_segment_ids']
    shifted = jnp.where(is_first, 0, shifted)
  return model.apply(
    variables, inputs, shifted, targets, enable_dropout=False, **segments
  )


@pytest.fixture(params=['dense', 'mowe', 'modules'])
def model_and_variables(request):
  return make_model(request.param)


@pytest.mark.slow
@pytest.mark.parametrize(
  'model_and_variables', ['dense', 'mowe', 'modules', 'sticks'], indirect=True
)
def test_steps_with_cache_equal_teacher_forcing(model_and_variables):
  model, variables = model_and_variables
  expected = teacher_forced(model, variables, INPUT_TOKENS, TARGET_TOKENS)

  def follow(step_function, cache, batch_size, max_length, key):
    """A strategy that is told its tokens, and returns the logits of each step."""

    def step(cache, tokens):
      logits, cache = step_function(tokens[:, None], cache)
      return cache, logits

    tokens = jnp.asarray(shift(TARGET_TOKENS)[:, :max_length])
    _, logits = jax.lax.scan(step, cache, tokens.T)
    return logits.swapaxes(0, 1), jnp.zeros(batch_size)

  follow.rows_per_example = 1
  logits, _ = decoding.generate(model, variables, INPUT_TOKENS, TARGETS, follow)
  assert logits.shape == (BATCH, TARGETS, BYTES.size)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_words_of_the_decoder_have_an_effect():
  # If the experts had no effect, the tests of word experts here would test
  # nothing.
  model, variables = make_model('mowe')
  experts = variables['params']['experts']
  rolled = {name: jnp.roll(w, 1, axis=0) for name, w in experts.items()}
  other = {'params': {**variables['params'], 'experts': rolled}}
  logits, other_logits = (
    teacher_forced(model, v, INPUT_TOKENS, TARGET_TOKENS)
    for v in (variables, other)
  )
  assert np.abs(logits - other_logits).max() > 0.1


def test_a_later_target_changes_no_earlier_logit(model_and_variables):
  model, variables = model_and_variables
  expected = teacher_forced(model, variables, INPUT_TOKENS, TARGET_TOKENS)
  for changed in range(1, TARGETS):
    targets = TARGET_TOKENS.copy()
    targets[:, changed:] = encode('x!', TARGETS)[: TARGETS - changed] + 1
    logits = teacher_forced(model, variables, INPUT_TOKENS, targets)
    # The logits at `changed` depend only on the tokens before it.
    np.testing.assert_allclose(
      logits[:, : changed + 1], expected[:, : changed + 1], atol=1e-6
    )


@pytest.mark.slow
def test_greedy_equals_the_argmax_chain_without_cache(model_and_variables):
  model, variables = model_and_variables
  # Every place counts as real. Places that are not yet filled are not seen by
  # earlier ones.
  targets = np.full((BATCH, TARGETS), 9, np.int32)
  expected_scores = np.zeros(BATCH)
  for position in range(TARGETS):
    logits = teacher_forced(model, variables, INPUT_TOKENS, targets)
    targets[:, position] = np.argmax(logits[:, position], axis=-1)
    expected_scores += jax.nn.log_softmax(logits[:, position]).max(axis=-1)
  # The inputs were chosen so that no row ends early, as its rest would be
  # padding.
  assert not np.isin(targets, [0, 1]).any()
  tokens, scores = decoding.generate(
    model, variables, INPUT_TOKENS, TARGETS, decoding.Greedy()
  )
  assert tokens.dtype == jnp.int32 and scores.dtype == jnp.float32
  np.testing.assert_array_equal(tokens, targets)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


def test_no_step_copies_keys_and_values():
  model, variables = make_model('dense')
  program = decoding.generate.lower(
    model, variables, INPUT_TOKENS, TARGETS, decoding.Greedy()
  )
  text = program.compile().as_text()
  (name,) = set(re.findall(r'body=(%[\w.-]+)', text))
  body = re.search(rf'{re.escape(name)} \(.*?\n}}', text, re.DOTALL).group()
  assert 'dynamic-update-slice' in body
  for line in body.splitlines():
    shape = re.search(r' = f32\[(\d+),(\d+),(\d+),(\d+)\]', line)
    # An array of this size has a number for each of two rows, two heads, three
    # numbers of a head, and each position: it is a cache.
    if shape and math.prod(map(int, shape.groups())) >= 2 * 2 * 3 * TARGETS:
      assert 'get-tuple-element' in line or 'dynamic-update-slice' in line


@pytest.mark.slow
def test_beams_of_a_model_keep_their_own_cache(model_and_variables):
  # If a cache followed the wrong beam, scores would not fit any sequence.
  model, variables = model_and_variables
  tokens, scores = decoding.generate(
    model,
    variables,
    INPUT_TOKENS,
    TARGETS,
    decoding.AllBeams(num_beams=3, alpha=0.6),
  )
  assert tokens.shape == (BATCH, 3, TARGETS) and scores.shape == (BATCH, 3)
  for beam in range(3):
    targets = np.asarray(tokens[:, beam])
    is_real = np.cumsum(targets == 1, axis=1) - (targets == 1) == 0
    logits = teacher_forced(
      model, variables, INPUT_TOKENS, np.where(is_real, targets, 9)
    )
    log_probs = np.take_along_axis(
      np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1
    )[..., 0]
    has_ended = (targets == 1).any(axis=1)
    penalty = ((5 + is_real.sum(axis=1)) / 6) ** 0.6
    np.testing.assert_allclose(
      scores[:, beam],
      (log_probs * is_real).sum(axis=1) / np.where(has_ended, penalty, 1),
      rtol=1e-5,
    )
  assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.slow
def test_packed_rows_equal_separate_ones(model_and_variables):
  model, variables = model_and_variables
  inputs = [encode('a zorblat', INPUTS), encode('the foxes', INPUTS)]
  # Without segments the second example would continue the last word of the
  # first.
  targets = [encode('a zorb', 6), encode('blat', 4)]
  packed = teacher_forced(
    model,
    variables,
    np.concatenate(inputs)[None],
    np.concatenate(targets)[None],
    encoder_segment_ids=np.repeat([[1, 2]], [INPUTS, INPUTS], axis=1),
    decoder_segment_ids=np.repeat([[1, 2]], [6, 4], axis=1),
  )[0]
  first, second = teacher_forced(
    model,
    variables,
    np.stack(inputs),
    np.stack([targets[0], encode('blat', 6)]),
  )
  np.testing.assert_allclose(packed[:6], first, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(packed[6:], second[:4], rtol=1e-5, atol=1e-5)


# In the tests below the "model" is a table of logits of the next token, by
# example, position and last token.


def run_table(strategy, log_probs, key=None):
  """Decodes from a table <float>[batch, length, last token, vocab]."""
  log_probs = jnp.asarray(log_probs, jnp.float32)
  batch_size, max_length = log_probs.shape[:2]

  def step_function(tokens, cache):
    example, position = cache['example'][:, 0], cache['position']
    cache = {'example': cache['example'], 'position': position + 1}
    return log_probs[example, position, tokens[:, 0]], cache

  cache = {
    'example': jnp.arange(batch_size)[:, None],
    'position': jnp.zeros((), jnp.int32),
  }
  tokens, scores = jax.jit(
    lambda cache, key: strategy(
      step_function, cache, batch_size, max_length, key
    )
  )(cache, key)
  return np.asarray(tokens), np.asarray(scores)


def random_table(seed, batch=3, length=5, vocab=7):
  rng = np.random.default_rng(seed)
  table = rng.normal(size=(batch, length, vocab, vocab), scale=2.0)
  return np.array(jax.nn.log_softmax(table))


def test_rows_end_with_eos_and_are_padded():
  # Example 0 gives 2 and EOS, and example 1 gives 3, 3 and EOS. Then the loop
  # must stop, or the NaNs from position 3 on would reach the scores.
  table = np.full((2, 5, 4, 4), -9.0)
  table[0, 0, 0, 2] = table[0, 1, 2, 1] = 0
  table[1, 0, 0, 3] = table[1, 1, 3, 3] = table[1, 2, 3, 1] = 0
  table[:, 3:] = np.nan
  tokens, scores = run_table(decoding.Greedy(), table)
  np.testing.assert_array_equal(tokens, [[2, 1, 0, 0, 0], [3, 3, 1, 0, 0]])
  # Each choice has the probability 1 / (1 + 3 exp(-9)).
  one = -np.log1p(3 * np.exp(-9))
  np.testing.assert_allclose(scores, [2 * one, 3 * one], atol=1e-6)


def test_greedy_takes_the_first_of_equals():
  # With whole numbers the greatest logit often occurs more than once, in one
  # block of 8 tokens or in several. EOS is never the greatest.
  table = np.random.default_rng(3).integers(-2, 3, (6, 5, 24, 24)).astype(float)
  table[..., 1] = -9
  tokens, scores = run_table(decoding.Greedy(), table)
  num_ties = 0
  for example, steps in enumerate(table):
    last, score = 0, 0.0
    for position, logits in enumerate(steps):
      row = logits[last]
      num_ties += (row == row.max()).sum() > 1
      last = np.argmax(row)
      assert tokens[example, position] == last
      score += row[last] - np.log(np.exp(row).sum())
    np.testing.assert_allclose(scores[example], score, rtol=1e-6)
  assert num_ties > 10


@pytest.mark.slow
@pytest.mark.parametrize('alpha', [0.0, 0.6, 2.0])
def test_wide_beam_search_equals_enumeration(alpha):
  length, vocab = 3, 4
  table = random_table(0, batch=2, length=length, vocab=vocab)

  def enumerate_all(table):
    """All sequences that end with EOS, with their scores, the best first."""
    found = []
    for size in range(1, length + 1):
      for body in itertools.product([0, 2, 3], repeat=size - 1):
        tokens = [*body, 1]
        lasts = [0, *body]
        log_prob = sum(table[i, lasts[i], tokens[i]] for i in range(size))
        score = log_prob / ((5 + size) / 6) ** alpha
        found.append((score, tokens + [0] * (length - size)))
    return sorted(found, reverse=True)

  expected = [enumerate_all(rows) for rows in table]
  # In the last step there are 9 live beams with 4 tokens each, so 18 beams see
  # all 36 candidates. 13 sequences end with EOS.
  tokens, scores = run_table(decoding.AllBeams(18, alpha), table)
  for row in range(2):
    np.testing.assert_allclose(
      scores[row, :13], [score for score, _ in expected[row]], rtol=1e-5
    )
    np.testing.assert_array_equal(
      tokens[row, :13], [sequence for _, sequence in expected[row]]
    )
  best_tokens, best_scores = run_table(decoding.BeamSearch(18, alpha), table)
  np.testing.assert_array_equal(best_tokens, tokens[:, 0])
  np.testing.assert_array_equal(best_scores, scores[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
def test_one_beam_equals_greedy_where_eos_is_never_second(seed):
  table = random_table(seed)
  table[..., 1] = -50
  # After the token 4 EOS is nearly certain, whatever came before it.
  table[:, :, 4] = -50
  table[:, :, 4, 1] = 0
  greedy, log_probs = run_table(decoding.Greedy(), table)
  tokens, scores = run_table(decoding.BeamSearch(1, alpha=0.6), table)
  np.testing.assert_array_equal(tokens, greedy)
  has_ended = (greedy == 1).any(axis=1)
  sizes = np.where(has_ended, np.argmax(greedy == 1, axis=1) + 1, 0)
  penalty = np.where(has_ended, ((5 + sizes) / 6) ** 0.6, 1)
  np.testing.assert_allclose(scores, log_probs / penalty, rtol=1e-5)


def test_sampling_is_reproduced_by_its_key():
  table = random_table(0, batch=20)
  sample = decoding.Sample(temperature=1.3)
  tokens, scores = run_table(sample, table, jax.random.key(1))
  again = run_table(sample, table, jax.random.key(1))
  np.testing.assert_array_equal(tokens, again[0])
  np.testing.assert_array_equal(scores, again[1])
  other, _ = run_table(sample, table, jax.random.key(2))
  assert (tokens != other).any()


def test_top_1_and_tiny_top_p_are_greedy():
  table = random_table(0)
  expected = run_table(decoding.Greedy(), table)
  for sample in (decoding.Sample(top_k=1), decoding.Sample(top_p=1e-9)):
    actual = run_table(sample, table, jax.random.key(0))
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize(
  'sample, expected',
  [
    (decoding.Sample(), [0.05, 0, 0.5, 0.15, 0.3]),
    # 0.5 + 0.3 reach 0.6, and 0.5 alone does not. So two tokens are left, with
    # 5/8 and 3/8.
    (decoding.Sample(top_p=0.6), [0, 0, 0.625, 0, 0.375]),
    (decoding.Sample(top_k=3), [0, 0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
    # The square roots of the two largest probabilities are 0.7071 and 0.5477,
    # which are normalized.
    (decoding.Sample(temperature=2.0, top_k=2), [0, 0, 0.5635, 0, 0.4365]),
  ],
)
def test_sampled_frequencies(sample, expected):
  probs = np.array([0.05, 1e-30, 0.5, 0.15, 0.3])
  table = np.broadcast_to(np.log(probs), (8000, 1, 5, 5))
  tokens, scores = run_table(sample, table, jax.random.key(3))
  frequencies = np.bincount(tokens[:, 0], minlength=5) / 8000
  # Three standard deviations of 8000 draws are below 0.017.
  np.testing.assert_allclose(frequencies, expected, atol=0.017)
  np.testing.assert_array_equal(frequencies == 0, np.array(expected) == 0)
  # The scores are the log-probabilities of the model itself.
  np.testing.assert_allclose(scores, np.log(probs)[tokens[:, 0]], rtol=1e-4)


def test_bad_settings_are_named():
  with pytest.raises(ValueError, match=r'Use Greedy\(\)'):
    decoding.Sample(temperature=0.0)
  with pytest.raises(ValueError, match='num_beams >= 1'):
    decoding.BeamSearch(num_beams=0)
  with pytest.raises(ValueError, match='key=jax.random.key'):
    run_table(decoding.Sample(), random_table(0))
