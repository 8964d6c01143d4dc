"""Tests memories in blocks of models: causality, packing, generation."""

import dataclasses
import functools
import json

import drawn_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_memories
import tiny_training

from mowe.interop import huggingface_config
from mowe.layers.attention import relative_attention
from mowe.layers.memory import memory_plus, word_experts
from mowe.layers.memory.payloads import (
  bank,
  diagonal,
  gated_vector,
  ngram_embedding,
  payload_base,
  per_layer_embedding,
)
from mowe.models import initialization, parameters, token_memories
from mowe.models.decoder_only import decoder_only, decoder_only_config
from mowe.models.families import costs, families, saved_config
from mowe.models.t5 import t5
from mowe.training import partitioning
from mowe.training.optimization import factoring_rules
from mowe.words import byte_vocabulary, vocabulary_builder
from mowe.words.addresses import piece_address, word_address

_BATCH, _LENGTH, _VOCAB = 3, 7, tiny_training.VOCAB
_PIECES = piece_address.Pieces(_VOCAB)


def _decoder_only_config(**changes):
  memories = tuple(map(tiny_memories.in_decoder, tiny_memories.make_memories()))
  settings = {'memories': memories, 'dropout_rate': 0.0} | changes
  return decoder_only_config.DecoderOnlyConfig(
    _VOCAB, 24, 4, 2, 20, 2, **settings
  )


@functools.cache
def _t5():
  model = t5.T5(tiny_memories.make_config())
  return model, drawn_models.parameters(model)


@functools.cache
def _language_model():
  model = decoder_only.DecoderOnly(_decoder_only_config())
  return model, drawn_models.parameters(model)


def _tokens(seed, length=_LENGTH):
  rng = np.random.default_rng(seed)
  return rng.integers(3, _VOCAB, (_BATCH, length)).astype(np.int32)


def _shifted(targets):
  return np.pad(targets, ((0, 0), (1, 0)))[:, :-1]


def _t5_logits(inputs, targets, **more):
  model, params = _t5()
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': _shifted(targets),
    'decoder_target_tokens': targets,
    **more,
  }
  return _apply(model)(params, batch)


@functools.cache
def _apply(model):
  return jax.jit(
    lambda params, batch: model.apply(
      {'params': params}, batch, enable_dropout=False, method='of_batch'
    )
  )


def _step_by_step(model, params, inputs, targets):
  @jax.jit
  def generate(params, inputs, given):
    step, cache = model.start_generation(
      {'params': params}, inputs, targets.shape[1], 1
    )

    def one(cache, tokens):
      logits, cache, _ = step(tokens[:, None], cache)
      return cache, logits

    _, logits = jax.lax.scan(one, cache, given.T)
    return logits.swapaxes(0, 1)

  return generate(params, inputs, _shifted(targets))


@pytest.mark.slow
def test_t5_generates_as_with_teacher_forcing():
  inputs, targets = _tokens(0), _tokens(1, 6)
  found = _step_by_step(*_t5(), inputs, targets)
  tiny_training.assert_close(found, _t5_logits(inputs, targets), 1e-5)


@pytest.mark.slow
def test_a_language_model_generates_as_with_teacher_forcing():
  model, params = _language_model()
  inputs, targets = _tokens(0), _tokens(1, 6)
  # One input is shorter, and so has padding before it.
  inputs[1, 4:] = 0
  rows = [
    np.concatenate([one[one > 0], other])
    for one, other in zip(inputs, targets, strict=True)
  ]
  length = max(map(len, rows))
  whole = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
  logits = _apply(model)(
    params,
    {
      'decoder_input_tokens': _shifted(whole),
      'decoder_target_tokens': whole,
    },
  )
  found = _step_by_step(model, params, inputs, targets)
  for row, number in enumerate((inputs > 0).sum(axis=1)):
    tiny_training.assert_close(
      found[row], logits[row, number : number + targets.shape[1]], 1e-5
    )


@pytest.mark.slow
def test_the_convolution_does_not_see_padding_before_a_prompt():
  (engram, *_) = map(tiny_memories.in_decoder, tiny_memories.make_memories())
  payload = functools.partial(
    gated_vector.GatedVector,
    16,
    convolution_size=3,
    use_bias=True,
    starts_as_identity=False,
  )
  address = dataclasses.replace(engram.address, start_id=5)
  memory = dataclasses.replace(engram, payload=payload, address=address)
  model = decoder_only.DecoderOnly(_decoder_only_config(memories=(memory,)))
  params = drawn_models.parameters(model)
  inputs, targets = _tokens(0), _tokens(1, 4)
  alone = _step_by_step(model, params, inputs[:, :3], targets)
  inputs[:, 3:] = 0
  found = _step_by_step(model, params, inputs, targets)
  tiny_training.assert_close(found, alone, 1e-5)


@pytest.mark.slow
def test_decoders_are_causal():
  inputs, targets = _tokens(0), _tokens(1)
  logits = _t5_logits(inputs, targets)
  for place in range(1, _LENGTH):
    changed = targets.copy()
    changed[:, place:] = _tokens(2)[:, place:]
    found = _t5_logits(inputs, changed)
    # The input at a position is the target before it.
    tiny_training.assert_close(
      found[:, : place + 1], logits[:, : place + 1], 1e-6
    )


@pytest.mark.slow
def test_examples_of_a_packed_row_do_not_meet():
  inputs, targets = _tokens(0), _tokens(1)
  segments = np.where(np.arange(_LENGTH) < 3, 1, 2)[None]
  segments = np.repeat(segments, _BATCH, axis=0).astype(np.int32)
  # The decoder's inputs begin anew with each example.
  decoder_inputs = _shifted(targets)
  decoder_inputs[:, 3] = 0
  packed = {
    'encoder_segment_ids': segments,
    'decoder_segment_ids': segments,
    'decoder_input_tokens': decoder_inputs,
  }
  logits = _t5_logits(inputs, targets, **packed)
  other = inputs.copy()
  other[:, :3] = _tokens(5)[:, :3]
  changed = targets.copy()
  changed[:, :3] = _tokens(6)[:, :3]
  packed['decoder_input_tokens'] = np.where(
    segments == 1, _shifted(changed), decoder_inputs
  )
  found = _t5_logits(other, changed, **packed)
  tiny_training.assert_close(found[:, 3:], logits[:, 3:], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('payload', 'place'),
  [
    (gated_vector.GatedVector, token_memories.BeforeAttention((0,), (0,))),
    (
      per_layer_embedding.PerLayerEmbedding,
      token_memories.AfterFeedForward((0,), (0,)),
    ),
    (bank.Bank, token_memories.BesideFeedForward((0,), (0,))),
    (bank.MixedBank, token_memories.BesideFeedForward((0,), (0,))),
  ],
)
def test_a_fresh_memory_changes_nothing(payload, place):
  sizes = {} if issubclass(payload, bank.Bank) else {'memory_dim': 16}
  memory = token_memories.Memory(
    'memory', _PIECES, functools.partial(payload, **sizes), place
  )
  batch = tiny_training.make_batch()
  logits = []
  for memories in ((), (memory,)):
    model = t5.T5(tiny_training.make_config(sparse=False, memories=memories))
    params = initialization.initial_parameters(model, jax.random.key(0))
    logits.append(_apply(model)(params, batch))
  np.testing.assert_array_equal(*logits)


@pytest.mark.slow
def test_a_fresh_diagonal_has_the_variance_of_a_feed_forward():
  tokens = jax.random.normal(jax.random.key(0), (64, 8, 64))
  layers = {
    'dense': tiny_training.make_config(
      sparse=False, emb_dim=64, mlp_dim=512
    ).make_dense_feed_forward(),
    'diagonal': diagonal.Diagonal(512),
  }
  rows = payload_base.MemoryRows(
    jax.random.normal(jax.random.key(1), (64, 8, 1, 512)),
    jnp.ones((64, 8, 1), bool),
  )
  spread = {}
  for name, layer in layers.items():
    inputs = (tokens, rows) if name == 'diagonal' else (tokens,)
    outputs, _ = layer.init_with_output(jax.random.key(2), *inputs)
    spread[name] = float(outputs.std())
  assert spread['diagonal'] == pytest.approx(spread['dense'], rel=0.05)


def test_a_config_is_saved_and_read_again():
  for config in (tiny_memories.make_config(), _decoder_only_config()):
    tree = saved_config.to_json(config)
    again = saved_config.from_json(json.loads(json.dumps(tree)))
    assert saved_config.to_json(again) == tree
    for one, other in zip(config.memories, again.memories, strict=True):
      assert one.address.fingerprint == other.address.fingerprint
      assert (one.place, one.shares_rows) == (other.place, other.shares_rows)


def test_costs_count_what_a_token_reads():
  (memory,) = (
    one for one in tiny_memories.make_memories() if one.name == 'engram'
  )
  plain = tiny_training.make_config(
    sparse=False, num_encoder_layers=2, num_decoder_layers=2
  )
  before = costs.model_costs(plain)
  after = costs.model_costs(dataclasses.replace(plain, memories=(memory,)))
  # Two blocks read 4 slots of 4 numbers from rows of 2 parts.
  assert after.expert_parameters == memory.num_rows * 2 * 4
  assert after.active_expert_parameters == 2 * 4 * 4
  # Each of them has two kernels of 16 x 24, and a convolution of 3 taps.
  kernels = 2 * 16 * 24 + 3 * 24
  assert after.flops_per_input_token - before.flops_per_input_token == (
    2 * kernels
  )


def test_banks_cost_products_with_their_rows():
  memory = token_memories.Memory(
    'bank',
    _PIECES,
    functools.partial(bank.Bank, read_dim=10),
    token_memories.BesideFeedForward(decoder=(0,)),
  )
  plain = tiny_training.make_config(sparse=False)
  before = costs.model_costs(plain).flops_per_target_token
  after = costs.model_costs(dataclasses.replace(plain, memories=(memory,)))
  # Scores of 24 numbers, a mean of 10, and a kernel of 10 x 24.
  expected = 2 * (24 + 10) + 2 * 10 * 24
  assert after.flops_per_target_token - before == expected


def _memory(name='memory', place=None, **changes):
  place = place or token_memories.BeforeAttention(decoder=(0,))
  payload = functools.partial(gated_vector.GatedVector, 16)
  return dataclasses.replace(
    token_memories.Memory(name, _PIECES, payload, place), **changes
  )


def _sparse(**changes):
  return tiny_training.make_config(**changes)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: _memory('Engram'), 'small letters, digits and underscores'),
    (lambda: _memory('experts'), 'no name of another part of a model'),
    (lambda: _memory('apply'), 'no name of another part of a model'),
    (lambda: _memory('parent'), 'no name of another part of a model'),
    (
      lambda: _memory(place=token_memories.BeforeAttention((0, 0))),
      'Name each block once',
    ),
    (
      lambda: _decoder_only_config(
        memory_length=4,
        attention=relative_attention.RelativeAttention,
        memories=(tiny_memories.in_decoder(tiny_memories.make_memories()[0]),),
      ),
      'must not depend on tokens before it',
    ),
    (
      lambda: gated_vector.GatedVector(8, convolution_size=10**9),
      'convolution_size from 0 to 64',
    ),
    (lambda: piece_address.Pieces(2**40), r'from 1 to 2\^31 - 1'),
    (lambda: _memory(table_dtype='float16'), 'table_dtype must be one of'),
    (
      lambda: _memory(place=token_memories.BeforeAttention()),
      'must stand in at least one block',
    ),
    (
      lambda: _sparse(memories=(_memory(), _memory())),
      'must have a name of its own',
    ),
    (
      lambda: _sparse(
        memories=(_memory(place=token_memories.BeforeAttention((1,))),)
      ),
      'has 1 in its encoder, but stands in 1',
    ),
    (
      lambda: _decoder_only_config(
        memories=(_memory(place=token_memories.BeforeAttention((0,))),)
      ),
      'has 0 in its encoder',
    ),
    (
      lambda: _sparse(
        memories=(_memory(place=token_memories.InsteadOfFeedForward((0,))),)
      ),
      'must have one feed-forward',
    ),
    (
      lambda: _sparse(
        sparse=False,
        memories=tuple(
          _memory(name, place=token_memories.InsteadOfFeedForward((0,)))
          for name in ('a', 'b')
        ),
      ),
      r"One memory at most .* \['a', 'b'\]",
    ),
    (
      lambda: _sparse(
        memories=(
          _memory(payload=functools.partial(ngram_embedding.NGramEmbedding, 8)),
        )
      ),
      'must stand at the input',
    ),
    (
      lambda: _sparse(
        memories=(
          dataclasses.replace(
            tiny_memories.make_memories()[0],
            payload=functools.partial(gated_vector.GatedVector, 15),
            place=token_memories.BeforeAttention((0,)),
          ),
        )
      ),
      'memory_dim must be a multiple of the 4 slots .* Make it 16',
    ),
    (
      lambda: _sparse(
        memories=(
          _memory(
            payload=functools.partial(bank.Bank, read_dim=7, is_tied=True)
          ),
        )
      ),
      'keys and values at once must have the width of the model, 24',
    ),
  ],
)
def test_what_does_not_fit_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_adafactor_has_a_rule_for_each_axis():
  for config in (tiny_memories.make_config(), _decoder_only_config()):
    variables = initialization.abstract_variables(families.build(config))
    axes = partitioning.parameter_axes(variables['params_axes'])
    names = {name for of_one in axes.values() for name in of_one}
    assert {'tap', 'memory_row'} <= names <= {*factoring_rules.FACTOR_RULES}


def test_a_model_and_its_addresses_read_one_routing_vocabulary():
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    ['a few words and a few more'],
    byte_vocabulary.ByteVocabulary(),
    num_words=5,
    num_experts=7,
    num_skipped=1,
  )
  memory = _memory(address=word_address.Words(routing))
  make = functools.partial(
    tiny_training.make_config, sparse=False, memories=(memory,)
  )
  assert make(routing=routing).memories == (memory,)
  with pytest.raises(ValueError, match='and the model none. Set `routing`'):
    make()
  with pytest.raises(ValueError, match='must read the routing vocabulary'):
    make(routing=routing.with_experts(5))


def test_values_of_memory_plus_are_counted():
  def cost(**changes):
    layer = functools.partial(memory_plus.MemoryPlus, 8, 2, 6, 3, **changes)
    return costs.model_costs(
      tiny_training.make_config(
        routing=None,
        sparse_feed_forward=layer,
      )
    )

  shared, own = cost(), cost(share_values=False)
  assert shared.expert_parameters == 64 * 24
  assert own.expert_parameters == 2 * 64 * 24
  # Each of two heads reads three of the values.
  assert shared.active_expert_parameters == 6 * 24
  assert own.flops_per_input_token == shared.flops_per_input_token


def test_tables_are_told_from_parameters():
  config = tiny_training.make_config(memories=(_memory('engram'),))
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, t5.T5(config)),
    jax.random.key(0),
  )
  ordinary, tables = parameters.split_tables(variables['params'])
  assert {*parameters.in_groups(tables)} == {'experts', 'engram'}
  assert parameters.is_memory(tables['engram'])
  assert not parameters.is_memory(tables['experts'])
  assert 'engram' not in ordinary
  assert isinstance(config.sparse_layers()['decoder'], word_experts.MoweLayer)


def test_transformers_has_no_memories():
  config = tiny_training.make_config(sparse=False, memories=(_memory(),))
  with pytest.raises(ValueError, match=r"memories: \['memory'\] here, none"):
    huggingface_config.describe(config, 'float32')
