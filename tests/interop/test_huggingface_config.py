"""Tests config.json to T5Config and back, and what cannot be represented."""

import dataclasses
import functools
import json

import pytest

from mowe.interop import huggingface_config
from mowe.layers.dispatch import capacity_dispatch
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import moe
from mowe.layers.routers import tokens_choose
from mowe.models.families import saved_config
from mowe.models.t5 import t5_config

_T5 = {
  'model_type': 't5',
  'vocab_size': 9,
  'd_model': 6,
  'num_heads': 2,
  'd_kv': 5,
  'd_ff': 7,
  'num_layers': 4,
}
_SWITCH = _T5 | {
  'model_type': 'switch_transformers',
  'num_layers': 5,
  'num_decoder_layers': 3,
  'dense_act_fn': 'relu',
  'num_experts': 4,
  'expert_capacity': 3,
  'encoder_sparse_step': 2,
  'decoder_sparse_step': 3,
  'tie_word_embeddings': False,
}


def test_sizes():
  config = huggingface_config.make_config(
    _T5 | {'num_decoder_layers': 3, 'dropout_rate': 0.25}
  )
  assert config == t5_config.T5Config(
    vocab_size=9,
    emb_dim=6,
    num_heads=2,
    head_dim=5,
    mlp_dim=7,
    num_encoder_layers=4,
    num_decoder_layers=3,
    mlp_activations=('relu',),
    logits_via_embedding=True,
    dropout_rate=0.25,
  )
  assert huggingface_config.make_config(_T5).num_decoder_layers == 4


# For each released model, the content of its config.json and what follows.
@pytest.mark.parametrize(
  ('described', 'activations', 'is_tied'),
  [
    # T5 1.0 and 1.1 were released without the fields that transformers 5 adds.
    ({'vocab_size': 32128}, ('relu',), True),
    (
      {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
      ('gelu', 'linear'),
      False,
    ),
    # These are T5 1.1 and a T5 1.0 as transformers 5 writes them.
    (
      {
        'feed_forward_proj': 'gated-gelu',
        'dense_act_fn': 'gelu_new',
        'is_gated_act': True,
        'tie_word_embeddings': True,
        'scale_decoder_outputs': False,
      },
      ('gelu', 'linear'),
      False,
    ),
    (
      {'tie_word_embeddings': True, 'scale_decoder_outputs': True},
      ('relu',),
      True,
    ),
    # For mT5, transformers 5 says that it is tied, but it never scales logits.
    ({'model_type': 'mt5', 'vocab_size': 250112}, ('gelu', 'linear'), False),
    (
      {'model_type': 'mt5', 'tie_word_embeddings': True},
      ('gelu', 'linear'),
      False,
    ),
    # In ByT5 the decoder has a third of the encoder's depth.
    (
      {
        'vocab_size': 384,
        'num_layers': 12,
        'num_decoder_layers': 4,
        'feed_forward_proj': 'gated-gelu',
        'tie_word_embeddings': False,
      },
      ('gelu', 'linear'),
      False,
    ),
  ],
)
def test_versions_of_t5(described, activations, is_tied):
  config = huggingface_config.make_config(_T5 | described)
  assert config.mlp_activations == activations
  assert config.logits_via_embedding == is_tied
  assert config.vocab_size == described.get('vocab_size', 9)


@pytest.mark.parametrize('rows', [32100, 32128])
def test_rows_of_the_embedding_stay_as_they_are(rows):
  config = huggingface_config.make_config(_T5 | {'vocab_size': rows})
  assert config.vocab_size == rows
  assert huggingface_config.describe(config, 'float32')['vocab_size'] == rows


def test_a_config_of_switch():
  config = huggingface_config.make_config(_SWITCH)
  assert config.sparse_encoder_layers == (1, 3)
  assert config.sparse_decoder_layers == (1,)
  assert not config.logits_via_embedding
  layer, _ = config.make_sparse_layers()
  assert layer.activations == config.mlp_activations == ('relu',)
  assert (layer.num_experts, layer.expert_dim) == (4, 7)
  # This is the default of transformers.
  assert layer.routing.jitter == 0.01


@pytest.mark.parametrize(
  ('depth', 'step', 'expected'),
  [(12, 4, (1, 5, 9)), (3, 1, (0, 1, 2)), (4, 2, (1, 3)), (4, 0, ())],
)
def test_sparse_blocks(depth, step, expected):
  assert huggingface_config.sparse_blocks(depth, step) == expected


@pytest.mark.parametrize(
  ('number', 'expected'),
  # 2 sparse layers of 5 blocks have a step of 5 // 2 = 2. For 0 the step is the
  # whole depth, which makes the second block sparse.
  [(5, (0, 1, 2, 3, 4)), (2, (1, 3)), (0, (1,)), (None, (0, 1, 2, 3, 4))],
)
def test_a_step_that_is_not_saved_follows_from_the_number(number, expected):
  described = {
    name: value
    for name, value in (_SWITCH | {'num_sparse_encoder_layers': number}).items()
    if value is not None and name != 'encoder_sparse_step'
  }
  config = huggingface_config.make_config(described)
  assert config.sparse_encoder_layers == expected


def test_a_switch_without_experts_is_dense():
  steps = {'encoder_sparse_step': 0, 'decoder_sparse_step': 0}
  config = huggingface_config.make_config(_SWITCH | steps)
  assert config.sparse_feed_forward is None


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'llama'}, "but is 'llama'. Other architectures"),
    ({'model_type': ['t5']}, r"but is \['t5'\]. Other architectures"),
    ({'model_type': None}, 'but is None. Other architectures'),
    ({'relative_attention_num_buckets': 16}, 'must be 32, but is 16'),
    ({'is_encoder_decoder': False}, 'must be True, but is False'),
    ({'router_dtype': 'bfloat16'}, 'must be float32, but is bfloat16'),
    ({'dense_act_fn': 'gelu'}, "but is 'gelu'. A checkpoint"),
    # transformers does not build a gated Switch either.
    ({'dense_act_fn': 'gated-gelu'}, "but is 'gated-gelu'. A checkpoint"),
    ({'d_model': None}, 'd_model of .* from 1 to 16777216, but is None. Take'),
    ({'d_ff': '7'}, "d_ff of .* but is '7'. Take"),
    ({'num_heads': 0}, 'num_heads of .* but is 0. Take'),
    ({'num_layers': 10**30}, f'num_layers of .* but is {10**30}. Take'),
    ({'dropout_rate': '0.1'}, "dropout_rate of .* below 1, but is '0.1'. Take"),
    ({'dropout_rate': float('nan')}, 'dropout_rate of .* but is nan. Take'),
    ({'router_jitter_noise': 2}, 'router_jitter_noise of .* but is 2. Take'),
    ({'num_decoder_layers': -1}, 'num_decoder_layers of .* but is -1. Take'),
    ({'num_experts': 2.5}, 'num_experts of .* but is 2.5. Take'),
    ({'encoder_sparse_step': -1}, 'must be 0 or more, but one is -1. Take'),
  ],
)
def test_other_settings_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    huggingface_config.make_config(_SWITCH | change)


@pytest.mark.parametrize(
  ('name', 'value'),
  [('pad_token_id', 0), ('eos_token_id', 1), ('decoder_start_token_id', 0)],
)
def test_ids_that_are_built_in(name, value):
  expected = huggingface_config.make_config(_T5)
  for same in (value, None):
    assert huggingface_config.make_config(_T5 | {name: same}) == expected
  with pytest.raises(
    ValueError, match=f'{name} must be {value}, but is 2. Our T5 has that'
  ):
    huggingface_config.make_config(_T5 | {name: 2})


def test_activations_that_contradict_each_other_are_refused():
  gated = _T5 | {'feed_forward_proj': 'gated-gelu'}
  for change, message in (
    (
      {'is_gated_act': False},
      'is_gated_act must be True, as feed_forward_proj',
    ),
    ({'dense_act_fn': 'gelu'}, "must be 'gelu_new', .* but is 'gelu'. Correct"),
  ):
    with pytest.raises(ValueError, match=message):
      huggingface_config.make_config(gated | change)


@pytest.mark.parametrize('name', ['t5', 'switch'])
def test_the_description_is_that_of_transformers(name, golden_dir):
  file = golden_dir / f'hf_{name}_tiny' / 'config.json'
  expected = json.loads(file.read_text())
  actual = huggingface_config.describe(
    huggingface_config.make_config(expected), 'bfloat16'
  )
  # This field names the version that wrote the file.
  del expected['transformers_version']
  assert actual == expected | {'dtype': 'bfloat16'}


@pytest.mark.parametrize(
  'change',
  [
    {},
    # Here the encoder is much deeper than the decoder, and in the next case the
    # decoder has no sparse layers.
    {'num_layers': 12, 'encoder_sparse_step': 4},
    {'decoder_sparse_step': 0},
    {'encoder_sparse_step': 1, 'router_bias': True, 'router_jitter_noise': 0.5},
    {'tie_word_embeddings': True, 'expert_capacity': 64},
  ],
)
def test_a_switch_that_is_described_is_read_again(change):
  config = huggingface_config.make_config(_SWITCH | change)
  again = huggingface_config.make_config(
    huggingface_config.describe(config, 'float32')
  )
  assert saved_config.to_json(again) == saved_config.to_json(config)


def _switch(**changes):
  config = huggingface_config.make_config(_SWITCH)
  return dataclasses.replace(config, **changes)


def _layer(**changes):
  layer, _ = huggingface_config.make_config(_SWITCH).make_sparse_layers()
  fields = {
    name: getattr(layer, name)
    for name in ('num_experts', 'expert_dim', 'activations', 'groups')
  } | {'routing': layer.routing, 'dispatch': layer.dispatch}
  return _switch(
    sparse_feed_forward=functools.partial(moe.MoeLayer, **(fields | changes))
  )


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (
      lambda: _switch(
        sparse_feed_forward=functools.partial(word_experts.MoweLayer, 4, 7)
      ),
      'but sparse_feed_forward is MoweLayer. Save',
    ),
    (
      lambda: _switch(
        sparse_feed_forward=functools.partial(moe.MoeLayer, 4, 7)
      ),
      'MoeLayer with TokensChoose with DroplessDispatch. Save',
    ),
    (
      lambda: _layer(dispatch=capacity_dispatch.SequenceCapacity()),
      "'factor': 1.25",
    ),
    (
      lambda: _layer(routing=tokens_choose.TokensChoose(k=2, jitter=0.01)),
      "'k': 2",
    ),
    (lambda: _layer(shared_expert_dim=8), "'shared_expert_dim': 8"),
    (lambda: _layer(expert_dim=8), "'expert_dim': 8"),
    (lambda: _switch(sparse_encoder_layers=(0, 3)), r'are \(0, 3\) of 5. Save'),
    (
      lambda: _switch(mlp_activations=('gelu', 'linear')),
      r"are \('gelu', 'linear'\). transformers has no such model",
    ),
    (
      lambda: dataclasses.replace(
        huggingface_config.make_config(_T5), mlp_activations=('relu', 'relu')
      ),
      r"are \('relu', 'relu'\). transformers has no such model",
    ),
  ],
)
def test_models_that_transformers_lacks_are_refused(config, message):
  with pytest.raises(ValueError, match=message):
    huggingface_config.describe(config(), 'float32')
