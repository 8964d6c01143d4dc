"""Tests decoder-only models against numpy, and forms of one computation.

Also tests `attention_base`, `centered_norm`, `decoder_only_config`,
`decoder_only_stack`, `inner_attention`, `relative_attention`, and
`self_attention`.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers import centered_norm
from mowe.layers.attention import (
  inner_attention,
  relative_attention,
  relative_position,
  self_attention,
  stick_breaking,
)
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import mixture_of_heads, moe
from mowe.layers.routers import module_router, tokens_choose
from mowe.models import decoding, initialization
from mowe.models.decoder_only import decoder_only, decoder_only_config
from mowe.models.families import families, saved_config
from mowe.words import byte_vocabulary, vocabulary_builder

BATCH, LENGTH, VOCAB = 3, 7, 19
EMBED, HEADS, KV, MLP, BLOCKS = 10, 2, 4, 11, 2
ATTENTIONS = {
  't5': self_attention.T5Attention,
  'rotary': self_attention.RotaryAttention,
  'relative': relative_attention.RelativeAttention,
  'stick': stick_breaking.StickBreakingAttention,
}
# The oracle below does not cover modules, whose logits come from an MLP.
WITH_MODULES = ATTENTIONS | {
  'modules': functools.partial(
    mixture_of_heads.MixtureOfSelfAttentionHeads,
    num_experts=5,
    logits=module_router.MlpLogits(6),
    use_bias=True,
  )
}
BYTES = byte_vocabulary.ByteVocabulary(extra_ids=5)


def make_config(attention='t5', **changes):
  settings = {
    'vocab_size': VOCAB,
    'emb_dim': EMBED,
    'num_heads': HEADS,
    'head_dim': KV,
    'mlp_dim': MLP,
    'num_layers': BLOCKS,
    'dropout_rate': 0.0,
    'attention': WITH_MODULES[attention],
  }
  return decoder_only_config.DecoderOnlyConfig(**(settings | changes))


@functools.cache
def make_model(config):
  model = families.build(config)
  shapes = initialization.abstract_variables(model)['params']
  # Parameters are larger than fresh ones, and biases are not zero, so that
  # errors show.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape, scale=0.5).astype(np.float32),
    shapes,
  )
  return model, {'params': params}


def make_batch(seed=0, lengths=(7, 7, 4)):
  """Rows of targets of these lengths, and inputs that are shifted by one."""
  rng = np.random.default_rng(seed)
  targets = rng.integers(3, VOCAB, (BATCH, LENGTH)).astype(np.int32)
  targets *= np.arange(LENGTH) < np.array(lengths)[:, None]
  inputs = np.zeros_like(targets)
  inputs[:, 1:] = targets[:, :-1]
  return {
    'decoder_input_tokens': inputs,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets > 0).astype(np.float32),
  }


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, variables, batch):
  return model.apply(variables, batch, enable_dropout=False, method='of_batch')


def close(actual, expected, where=None):
  actual, expected = np.asarray(actual), np.asarray(expected)
  if where is not None:
    actual, expected = actual[where], expected[where]
  assert actual.size and np.abs(expected).max() > 0.1
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max()
  )


# The functions below compute the whole model in float64, from its formulas.


def _softmax(logits):
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def _rms(x, params):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params['scale']


def _centered(x, params):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  return x * params['scale'] + params['bias']


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _heads(x):
  return x.reshape(*x.shape[:-1], HEADS, KV)


def _rotate_one(vector, position):
  """Takes pairs as complex numbers, and multiplies by e^(i position speed)."""
  half = KV // 2
  numbers = vector[:half] + 1j * vector[half:]
  speeds = np.array([10_000.0 ** (-2 * i / KV) for i in range(half)])
  numbers = numbers * np.exp(1j * position * speeds)
  return np.concatenate([numbers.real, numbers.imag])


def _logit(kind, params, stack, q, k, head, i, j):
  """The logit of query i and key j; q and k are the vectors of one head."""
  if kind == 't5':
    bucket = relative_position.position_bucket(
      jnp.array(j - i), bidirectional=False
    )
    table = stack['relpos_bias']['rel_embedding']
    return q @ k + table[head, int(bucket)]
  if kind == 'rotary':
    return _rotate_one(q, i) @ _rotate_one(k, j)
  if kind == 'stick':
    return q @ k / np.sqrt(KV)
  speeds = [10_000.0 ** (-2 * n / EMBED) for n in range(EMBED // 2)]
  angles = (i - j) * np.array(speeds)
  code = np.concatenate([np.sin(angles), np.cos(angles)])
  r = _heads(code @ params['position']['kernel'])[head]
  u, v = params['content_bias'][head], params['position_bias'][head]
  return ((q + u) @ k + (q + v) @ r) / np.sqrt(KV)


def _weights(kind, logits):
  if kind != 'stick':
    return _softmax(logits)
  fractions = 1 / (1 + np.exp(-logits))
  left = np.cumprod((1 - fractions)[::-1])[::-1]
  return fractions * np.append(left[1:], 1.0)


def oracle(kind, variables, inputs, sees, norm=_rms):
  """Logits [length, vocab] of one row; sees(i, j): query i may see key j."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
  params = params['params']
  stack = params['decoder']
  x = params['token_embedder']['embedding'][inputs]
  length = len(inputs)
  for number in range(BLOCKS):
    layer = stack[f'layers_{number}']
    attention = layer['self_attention']
    normed = norm(x, layer['pre_self_attention_layer_norm'])
    q, k, v = (
      _heads(normed @ attention[name]['kernel'])
      for name in ('query', 'key', 'value')
    )
    attended = np.zeros((length, HEADS, KV))
    for head in range(HEADS):
      for i in range(length):
        keys = [j for j in range(length) if sees(i, j)]
        if not keys:
          continue
        logits = [
          _logit(kind, attention, stack, q[i, head], k[j, head], head, i, j)
          for j in keys
        ]
        attended[i, head] = _weights(kind, np.array(logits)) @ v[keys, head]
    x = x + attended.reshape(length, -1) @ attention['out']['kernel']
    mlp, normed = layer['mlp'], norm(x, layer['pre_mlp_layer_norm'])
    hidden = _gelu(normed @ mlp['wi_0']['kernel'])
    hidden = hidden * (normed @ mlp['wi_1']['kernel'])
    x = x + hidden @ mlp['wo']['kernel']
  x = norm(x, stack['decoder_norm'])
  if 'logits_dense' not in stack:
    return x / np.sqrt(EMBED) @ params['token_embedder']['embedding'].T
  return x @ stack['logits_dense']['kernel'] + stack.get('logits_bias', 0)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ATTENTIONS)
def test_logits_are_those_of_the_formulas(kind):
  model, variables = make_model(make_config(kind))
  batch = make_batch()
  logits = logits_of(model, variables, batch)
  for row in range(BATCH):
    size = np.count_nonzero(batch['decoder_target_tokens'][row])
    inputs = batch['decoder_input_tokens'][row, :size]
    expected = oracle(kind, variables, inputs, lambda i, j: j <= i)
    close(logits[row, :size], expected)


def test_tied_logits_and_centered_norms():
  tied = make_config(logits_via_embedding=True)
  biased = make_config(logits_bias=True, norm=centered_norm.CenteredLayerNorm)
  batch = make_batch()
  for config, norm in ((tied, _rms), (biased, _centered)):
    model, variables = make_model(config)
    expected = oracle(
      't5',
      variables,
      batch['decoder_input_tokens'][0],
      lambda i, j: j <= i,
      norm,
    )
    close(logits_of(model, variables, batch)[0], expected)


@pytest.mark.parametrize('kind', ['t5', 'rotary'])
def test_inputs_see_each_other_in_a_prefix_lm(kind):
  model, variables = make_model(make_config(kind, prefix_lm=True))
  batch = make_batch()
  prefix = np.array([3, 0, 2])
  batch['decoder_causal_attention'] = (
    np.arange(LENGTH) < prefix[:, None]
  ).astype(np.int32)
  logits = logits_of(model, variables, batch)
  for row, inputs in ((0, 3), (1, 0)):
    expected = oracle(
      kind,
      variables,
      batch['decoder_input_tokens'][row],
      lambda i, j, inputs=inputs: j <= i or (i < inputs and j < inputs),
    )
    close(logits[row], expected)


@pytest.mark.slow
@pytest.mark.parametrize('kind', WITH_MODULES)
def test_packed_texts_are_those_alone(kind):
  model, variables = make_model(make_config(kind))
  alone = make_batch(lengths=(3, 4, 0))
  logits = logits_of(model, variables, alone)
  packed = {name: np.zeros_like(x) for name, x in alone.items()}
  segments = np.array([1, 1, 1, 2, 2, 2, 2], np.int32)
  for name in ('decoder_input_tokens', 'decoder_target_tokens'):
    packed[name][1] = np.concatenate([alone[name][0, :3], alone[name][1, :4]])
  packed['decoder_segment_ids'] = np.zeros((BATCH, LENGTH), np.int32)
  packed['decoder_segment_ids'][1] = segments
  together = logits_of(model, variables, packed)[1]
  close(together[:3], logits[0, :3])
  close(together[3:], logits[1, :4])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ATTENTIONS)
@pytest.mark.parametrize('memory', [3, 9])
def test_memory_is_a_longer_row_with_a_window(kind, memory):
  """Four batches that continue each other must equal one long row."""
  config = make_config(kind, memory_length=memory)
  model, variables = make_model(config)
  steps, size = 4, 5
  rng = np.random.default_rng(1)
  text = rng.integers(3, VOCAB, (BATCH, steps * size)).astype(np.int32)
  inputs = np.zeros_like(text)
  inputs[:, 1:] = text[:, :-1]
  state = config.initial_memory(BATCH)

  @jax.jit
  def step(state, batch):
    logits, changed = model.apply(
      variables | {decoder_only.MEMORY: state},
      batch,
      enable_dropout=False,
      method='of_batch',
      mutable=[decoder_only.MEMORY],
    )
    return logits, changed[decoder_only.MEMORY]

  logits = []
  for number in range(steps):
    part = slice(number * size, (number + 1) * size)
    of_step, state = step(
      state,
      {
        'decoder_input_tokens': inputs[:, part],
        'decoder_target_tokens': text[:, part],
      },
    )
    logits.append(of_step)
  sees = lambda i, j: j <= i and j >= i // size * size - memory
  for row in range(BATCH):
    expected = oracle(kind, variables, inputs[row], sees)
    close(np.concatenate(logits, axis=1)[row], expected)


def make_sparse(kind):
  """Parts of a config with word experts, or with mixtures in every block."""
  if kind == 'moe':
    return {
      'sparse_feed_forward': functools.partial(moe.MoeLayer, 4, 5),
      'sparse_decoder_layers': (0, 1),
    }
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    ['the dog and the fox', 'a fox'] * 3,
    BYTES,
    num_words=9,
    num_experts=6,
    num_skipped=1,
  )
  return {
    'sparse_feed_forward': functools.partial(
      word_experts.MoweLayer, num_experts=6, expert_dim=5
    ),
    'sparse_decoder_layers': (1,),
    'routing': routing,
    'vocab_size': BYTES.size,
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'changes'),
  [(kind, {}) for kind in ATTENTIONS]
  + [
    ('rotary', {'prefix_lm': True}),
    ('rotary', {'sparse': 'moe'}),
    ('modules', {'sparse': 'moe'}),
    ('t5', {'sparse': 'mowe'}),
  ],
)
def test_generation_with_a_cache_is_the_argmax_of_full_passes(kind, changes):
  changes = dict(changes)
  sparse = changes.pop('sparse', None)
  parts = make_sparse(sparse) if sparse else {}
  config = make_config(kind, **changes, **parts)
  model, variables = make_model(config)
  # Id 0 counts as padding in the passes over all tokens, so it must not be
  # generated.
  variables = copy.deepcopy(variables)
  variables['params']['decoder']['logits_dense']['kernel'][:, 0] = 0
  if sparse == 'mowe':
    texts = ['the dog', 'fox', 'a fox and']
    rows = [BYTES.encode(text) for text in texts]
  else:
    rows = [[5, 3, 9], [4], [7, 8, 11, 6]]
  most = max(map(len, rows)) + 2
  inputs = np.zeros((BATCH, most), np.int32)
  for place, row in enumerate(rows):
    inputs[place, : len(row)] = row
  max_length = 5
  tokens, scores = decoding.generate(
    model, variables, inputs, max_length, decoding.Greedy()
  )
  tokens = np.asarray(tokens)
  length = most + max_length
  written = [list(row) for row in rows]
  total = np.zeros(BATCH)
  ended = np.zeros(BATCH, bool)
  for position in range(max_length):
    batch = np.zeros((2, BATCH, length), np.int32)
    for place, row in enumerate(written):
      batch[0, place, 1 : len(row) + 1] = row
      # The last token only fills the place of the one that is to be predicted.
      batch[1, place, : len(row) + 1] = [*row, 3]
    prefix = np.arange(length) < np.array([[len(row) + 1] for row in rows])
    logits = logits_of(
      model,
      variables,
      {
        'decoder_input_tokens': batch[0],
        'decoder_target_tokens': batch[1],
        'decoder_causal_attention': prefix.astype(np.int32),
      },
    )
    for place, row in enumerate(written):
      of_row = np.asarray(logits[place, len(row)], np.float64)
      best = int(of_row.argmax())
      assert tokens[place, position] == (0 if ended[place] else best)
      if not ended[place]:
        total[place] += np.log(_softmax(of_row)[best])
      ended[place] |= best == 1
      row.append(best)
  np.testing.assert_allclose(scores, total, rtol=1e-4)


@pytest.mark.slow
def test_beams_share_the_pass_over_the_inputs():
  """One beam is alive at first, and then all have the cache of their input."""
  model, variables = make_model(make_config('rotary'))
  inputs = np.array([[5, 3, 9], [4, 0, 0], [7, 8, 0]], np.int32)
  wide = decoding.BeamSearch(num_beams=VOCAB, alpha=0.0)
  _, scores = decoding.generate(model, variables, inputs, 1, wide)
  greedy, best = decoding.generate(
    model, variables, inputs, 1, decoding.Greedy()
  )
  # After one step a beam is unfinished, or it is EOS alone. Scores must agree
  # where greedy decoding has chosen EOS.
  ended = np.asarray(greedy)[:, 0] == 1
  np.testing.assert_allclose(
    np.asarray(scores)[ended], np.asarray(best)[ended], rtol=1e-5
  )
  assert np.all(np.asarray(scores) <= np.asarray(best) + 1e-5)


def test_inputs_are_aligned_at_their_ends():
  inputs = np.array([[5, 6, 7], [4, 0, 0]], np.int32)
  tokens, real = decoder_only.aligned_at_end(jnp.asarray(inputs))
  np.testing.assert_array_equal(tokens, [[0, 5, 6, 7], [0, 0, 0, 4]])
  np.testing.assert_array_equal(real, [[1, 1, 1, 1], [0, 0, 1, 1]])


def test_rotation_keeps_lengths_and_knows_only_distances():
  rng = np.random.default_rng(2)
  q, k = rng.normal(size=(2, 1, 6, HEADS, 8)).astype(np.float32)
  places = jnp.array([0, 1, 5, 6, 40, 300])
  turned = self_attention.rotate(q, places)
  np.testing.assert_allclose(
    np.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5
  )
  np.testing.assert_array_equal(turned[:, 0], q[:, 0])

  def products(shift):
    return jnp.einsum(
      'blhd,bkhd->bhlk',
      self_attention.rotate(q, places + shift),
      self_attention.rotate(k, places + shift),
    )

  np.testing.assert_allclose(products(0), products(1000), atol=2e-3)
  # This is a quarter turn of the first pair: (x, y) becomes (-y, x).
  one = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
  quarter = self_attention.rotate(one, jnp.array([1]), 10.0)
  np.testing.assert_allclose(
    quarter.reshape(-1), [np.cos(1), np.sin(1)], rtol=1e-6
  )


def test_values_of_distances_go_to_their_keys():
  # Query 0 is at the place of key 2, and query 1 at that of key 3. The value of
  # distance d is d.
  values = jnp.broadcast_to(jnp.arange(4.0), (1, 1, 2, 4))
  positions = self_attention.Positions(np.array([2, 3]), np.arange(4))
  found = relative_attention.by_distance(values, positions)[0, 0]
  np.testing.assert_array_equal(found[0, :3], [2, 1, 0])
  np.testing.assert_array_equal(found[1], [3, 2, 1, 0])
  # The queries may be anywhere, as in a cache that has room left.
  first = self_attention.Positions(jnp.array([1, 2]), jnp.arange(4))
  found = relative_attention.by_distance(values, first)[0, 0]
  np.testing.assert_array_equal(found[0, :2], [1, 0])
  np.testing.assert_array_equal(found[1, :3], [2, 1, 0])


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    ({'sparse_decoder_layers': (0,)}, 'must be given together'),
    ({'memory_length': -1}, 'must not be negative'),
    ({'prefix_lm': True, 'memory_length': 4}, 'leave prefix_lm out'),
    ({'prefix_lm': True, 'attention': 'relative'}, 'leave prefix_lm out'),
    ({'logits_bias': True, 'logits_via_embedding': True}, 'one of the two'),
    ({'dtype': 'float16'}, "Use 'bfloat16'"),
  ],
)
def test_parts_that_do_not_fit_are_refused(changes, text):
  with pytest.raises(ValueError, match=text):
    make_config(**changes)


@pytest.mark.parametrize(
  ('fields', 'text'),
  [
    ({'inner': inner_attention.NearestFirst()}, 'one query at a time'),
    ({'identity_memory': True, 'num_heads': 1}, 'model, 10, but is 4'),
    (
      {'routing': tokens_choose.TokensChoose(batch_prioritized=True)},
      'must not depend on later tokens',
    ),
    ({'num_experts': 1}, 'k must be at most the number of experts, 1'),
  ],
)
def test_modules_of_heads_that_do_not_fit_are_refused(fields, text):
  heads = mixture_of_heads.MixtureOfSelfAttentionHeads
  make = lambda **given: heads(**(given | fields))
  with pytest.raises(ValueError, match=text):
    dataclasses.replace(make_config(), attention=make)


def test_an_odd_head_cannot_be_rotated():
  with pytest.raises(ValueError, match='Make it 6'):
    self_attention.rotate(jnp.zeros((1, 2, 3, 5)), jnp.arange(2))


def test_recomputed_blocks_are_the_same():
  config = make_config('relative', memory_length=3)
  model, variables = make_model(config)
  again, _ = make_model(dataclasses.replace(config, remat=True))
  batch = make_batch()
  state = {decoder_only.MEMORY: config.initial_memory(BATCH)}
  found = [
    jax.jit(
      functools.partial(
        one.apply,
        enable_dropout=False,
        method='of_batch',
        mutable=[decoder_only.MEMORY],
      )
    )(variables | state, batch)
    for one in (model, again)
  ]
  close(found[1][0], found[0][0])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    found[0][1],
    found[1][1],
  )


@pytest.mark.parametrize('kind', WITH_MODULES)
def test_a_config_comes_back_from_json(kind):
  parts = {'sparse_feed_forward': functools.partial(moe.MoeLayer, 4, 5)}
  config = make_config(
    kind,
    norm=centered_norm.CenteredLayerNorm,
    sparse_decoder_layers=(1,),
    memory_length=6,
    **parts,
  )
  again = saved_config.from_json(saved_config.to_json(config))
  assert again.parts() == config.parts()
  made = dict.fromkeys(('attention', 'norm', 'sparse_feed_forward'), None)
  plain = {'sparse_decoder_layers': ()} | made
  plain |= {'attention': WITH_MODULES[kind]}
  assert dataclasses.replace(again, **plain) == (
    dataclasses.replace(config, **plain)
  )


def test_an_unknown_family_is_refused():
  tree = saved_config.to_json(make_config()) | {'family': 'state_space'}
  with pytest.raises(ValueError, match="must be one of .'decoder_only'"):
    saved_config.from_json(tree)
