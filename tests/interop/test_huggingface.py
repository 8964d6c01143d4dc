"""Rules by hand, and what a checkpoint must be to be read."""

import json
import re

import numpy as np
import pytest
from safetensors import numpy as safetensors

from mowe.interop import huggingface, rules

Rule = rules.Rule

_RULES = (
  Rule(r'emb', 'embedding'),
  Rule(r'emb_again', 'embedding'),
  Rule(r'block(\d+)\.(in|out)', r'layers_\1/\2/kernel', np.transpose),
  Rule(r'block(\d+)\.expert_(?P<expert>\d+)', r'layers_\1/expert'),
  Rule(r'position_ids', None),
)


def test_a_table_by_hand():
  kernel = np.arange(6).reshape(2, 3)
  actual = rules.translate(
    {
      'emb': np.asarray([3, 4]),
      'emb_again': np.asarray([3, 4]),
      'block7.out': kernel,
      # Ten experts: in order of their numbers, and not of their names.
      **{f'block7.expert_{e}': np.asarray([e, -e]) for e in range(11)},
      'position_ids': np.asarray([0, 1]),
    },
    _RULES,
  )
  expected = {
    ('embedding',): [3, 4],
    ('layers_7', 'out', 'kernel'): kernel.T,
    ('layers_7', 'expert'): [[e, -e] for e in range(11)],
  }
  assert set(actual) == set(expected)
  for path, value in expected.items():
    np.testing.assert_array_equal(actual[path], value)


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (['emb', 'block7.bias'], 'block7.bias matches none. Take'),
    (['block7.out', 'block7.out.'], 'block7.out. matches none'),
  ],
)
def test_a_name_without_a_rule_is_refused(names, message):
  with pytest.raises(ValueError, match=message):
    rules.places(names, _RULES)


def test_a_name_with_two_rules_is_refused():
  two = (*_RULES, Rule(r'e.*', 'other'))
  with pytest.raises(ValueError, match=re.escape("emb matches ['emb', 'e.*']")):
    rules.places(['emb'], two)


def test_tensors_that_contradict_each_other_are_refused():
  with pytest.raises(ValueError, match='embedding is one parameter here, but'):
    rules.translate(
      {'emb': np.asarray([3]), 'emb_again': np.asarray([4])}, _RULES
    )


def test_a_missing_expert_is_refused():
  tensors = {f'block0.expert_{e}': np.zeros(2) for e in (0, 2)}
  with pytest.raises(ValueError, match=r'without a gap, but has \[0, 2\]'):
    rules.translate(tensors, _RULES)


_SWITCH = {
  'model_type': 'switch_transformers',
  'vocab_size': 9,
  'd_model': 6,
  'num_heads': 2,
  'd_kv': 5,
  'd_ff': 7,
  'num_layers': 5,
  'num_decoder_layers': 3,
  'dense_act_fn': 'relu',
  'num_experts': 4,
  'expert_capacity': 3,
  'encoder_sparse_step': 2,
  'decoder_sparse_step': 3,
  'tie_word_embeddings': False,
}


def test_a_config_of_switch():
  config = huggingface.make_config(_SWITCH)
  assert config.sparse_encoder_layers == (1, 3)
  assert config.sparse_decoder_layers == (1,)
  assert not config.logits_via_embedding
  layer, _ = config.make_sparse_layers()
  assert layer.activations == config.mlp_activations == ('relu',)
  assert (layer.num_experts, layer.expert_dim) == (4, 7)
  # transformers' default.
  assert layer.routing.jitter == 0.01


@pytest.mark.parametrize(
  ('depth', 'step', 'expected'),
  [(12, 4, (1, 5, 9)), (3, 1, (0, 1, 2)), (4, 2, (1, 3)), (4, 0, ())],
)
def test_sparse_blocks(depth, step, expected):
  assert huggingface.sparse_blocks(depth, step) == expected


def test_a_switch_without_experts_is_dense():
  steps = {'encoder_sparse_step': 0, 'decoder_sparse_step': 0}
  config = huggingface.make_config(_SWITCH | steps)
  assert config.sparse_feed_forward is None


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'llama'}, "but is 'llama'. Other architectures"),
    ({'relative_attention_num_buckets': 16}, 'must be 32, but is 16'),
    ({'dense_act_fn': 'gelu'}, "but is 'gelu'. A checkpoint"),
  ],
)
def test_other_settings_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    huggingface.make_config(_SWITCH | change)


@pytest.fixture
def t5_folder(golden_dir):
  return golden_dir / 'hf_t5_tiny'


def _copy(source, target, change=None, drop=None):
  described = json.loads((source / 'config.json').read_text())
  target.mkdir()
  (target / 'config.json').write_text(json.dumps(described | (change or {})))
  tensors = safetensors.load_file(source / 'model.safetensors')
  tensors.pop(drop, None)
  # In two files, as large models are.
  names = sorted(tensors)
  for number, part in enumerate((names[:9], names[9:])):
    safetensors.save_file(
      {name: tensors[name] for name in part},
      target / f'model-{number}.safetensors',
    )
  return target


def test_a_model_in_two_files(t5_folder, tmp_path):
  _, expected = huggingface.load(t5_folder)
  _, actual = huggingface.load(_copy(t5_folder, tmp_path / 'a'))
  kernel = lambda p: p['encoder']['layers_1']['mlp']['wi_1']['kernel']
  np.testing.assert_array_equal(kernel(actual), kernel(expected))
  assert kernel(actual).dtype == np.float32


def test_incomplete_and_contradicting_checkpoints_are_refused(
  t5_folder, tmp_path
):
  norm = 'encoder.final_layer_norm.weight'
  with pytest.raises(ValueError, match='encoder_norm/scale: absent there'):
    huggingface.load(_copy(t5_folder, tmp_path / 'a', drop=norm))
  deeper = {'num_layers': 4}
  with pytest.raises(ValueError, match='absent there, .* here'):
    huggingface.load(_copy(t5_folder, tmp_path / 'b', deeper))
  tied = {'scale_decoder_outputs': True}
  with pytest.raises(ValueError, match='lm_head.weight must equal'):
    huggingface.load(_copy(t5_folder, tmp_path / 'c', tied))
  config, params = huggingface.load(
    _copy(t5_folder, tmp_path / 'd', tied, drop='lm_head.weight')
  )
  assert config.logits_via_embedding
  assert 'logits_dense' not in params['decoder']


def test_a_folder_without_weights_is_refused(t5_folder, tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(FileNotFoundError, match=r"has \['config.json'\]. Save"):
    huggingface.load(tmp_path)
