"""Tests generation for many inputs: order, shapes, trimming, compilations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.evaluation import inference
from mowe.models import decoding
from mowe.models.t5 import t5, t5_config
from mowe.words import byte_vocabulary

VOCAB, TARGETS = 19, 5


@functools.cache
def make_model():
  model = t5.T5(
    t5_config.T5Config(
      vocab_size=VOCAB,
      emb_dim=8,
      num_heads=2,
      head_dim=3,
      mlp_dim=11,
      num_encoder_layers=1,
      num_decoder_layers=1,
    )
  )
  ids = jnp.ones((1, 2), jnp.int32)
  init = functools.partial(model.init, enable_dropout=False)
  shapes = jax.eval_shape(init, jax.random.key(0), ids, ids, ids)['params']

  def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
    )

  return model, [draw(0), draw(1)]


def make_generator(**settings):
  model, params = make_model()
  defaults = {
    'params': params[0],
    'batch_size': 3,
    'max_target_length': TARGETS,
    'input_lengths': (4, 9),
  }
  return inference.Generator(model, **{**defaults, **settings})


def make_inputs(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [[*rng.integers(3, VOCAB, n - 1).tolist(), 1] for n in lengths]


@pytest.mark.slow
def test_outputs_come_in_the_order_of_the_inputs():
  generator = make_generator()
  inputs = make_inputs([2, 9, 4, 5, 3, 7, 2, 8])
  seen = []
  generations = generator(inputs, seen.append)
  # Sorted by length, the batches are 9 8 7, 5 4 3 and 2 2; one row of the last
  # batch is filled up.
  assert seen == [3, 6, 8]
  assert len(generations.tokens) == 8 and generations.scores.shape == (8,)
  for i, tokens in enumerate(inputs):
    alone = np.zeros((3, 9), np.int32)
    alone[:, : len(tokens)] = tokens
    expected, scores = decoding.generate(
      generator.model,
      {'params': generator.params},
      alone,
      TARGETS,
      generator.strategy,
      key=jax.random.key(0),
    )
    expected = expected[0].tolist()
    if 1 in expected:
      expected = expected[: expected.index(1) + 1]
    assert generations.tokens[i].tolist() == expected
    np.testing.assert_allclose(generations.scores[i], scores[0], rtol=1e-4)
  unfinished = sum(1 not in tokens for tokens in generations.tokens)
  assert generations.num_unfinished == unfinished


@pytest.mark.slow
def test_at_most_one_program_for_each_length_and_none_for_new_parameters():
  before = decoding.generate._cache_size()
  settings = {'batch_size': 2, 'input_lengths': (3, 6)}
  inputs = make_inputs([2, 3, 4, 5, 6, 2, 3, 4, 5, 6])
  first = make_generator(**settings)(inputs)
  assert decoding.generate._cache_size() == before + 2
  other = make_generator(params=make_model()[1][1], **settings)(inputs)
  assert decoding.generate._cache_size() == before + 2
  assert any(
    a.tolist() != b.tolist()
    for a, b in zip(first.tokens, other.tokens, strict=True)
  )


def test_long_inputs_are_trimmed_keep_their_eos_and_are_counted(caplog):
  generator = make_generator()
  (long,) = make_inputs([12])
  trimmed = [*long[:8], 1]
  generations = generator([long, trimmed])
  assert generations.num_trimmed == 1
  assert '1 of 2 inputs are longer than 9' in caplog.text
  np.testing.assert_array_equal(*generations.tokens)
  assert generator([trimmed]).num_trimmed == 0


def test_sampling_is_deterministic_and_depends_on_the_seed():
  inputs = make_inputs([9] * 7)
  strategy = decoding.Sample()
  runs = [
    make_generator(strategy=strategy, seed=seed)(inputs) for seed in (0, 0, 1)
  ]
  lists = [[row.tolist() for row in run.tokens] for run in runs]
  assert lists[0] == lists[1] != lists[2]
  # Equal inputs in different batches draw from different keys.
  equal = make_generator(strategy=strategy)([inputs[0]] * 6)
  rows = [row.tolist() for row in equal.tokens]
  assert rows[:3] != rows[3:]


def test_no_inputs_give_no_outputs():
  generations = make_generator()([])
  assert generations.tokens == [] and generations.scores.shape == (0,)


def test_texts_in_texts_out():
  # The model has only the first ids of the byte vocabulary, so these texts use
  # the first bytes.
  vocabulary = byte_vocabulary.ByteVocabulary(extra_ids=0)
  texts = ['\x01\x02', '\x05', '\x07\x08\x09']
  generator = make_generator()
  outputs = inference.generate_texts(generator, texts, vocabulary)
  inputs = [[4, 5, 1], [8, 1], [10, 11, 12, 1]]
  expected = [vocabulary.decode(row) for row in generator(inputs).tokens]
  assert outputs == expected


def test_bad_settings_and_inputs_are_named():
  with pytest.raises(ValueError, match='rising input_lengths'):
    make_generator(input_lengths=(9, 4))
  with pytest.raises(ValueError, match='batch_size and max_target_length'):
    make_generator(batch_size=0)
  with pytest.raises(ValueError, match='Append EOS'):
    make_generator()([[4, 1], []])
