"""Tests that values of gin files are compared with the types of fields."""

import pytest

from mowe.commands.gin_files import gin_config, gin_types

# Every shipped file is parsed, and so checked, by tests/test_gin_files.py.
_RUN = 'gin_configs/examples/text_pretrain_t5.gin'


@pytest.mark.parametrize(
  'binding, said',
  [
    ('TRAIN_STEPS = 2.0', r'^TRAIN_STEPS, which is \w+.total_steps, must be a '
     r'whole number, but is 2.0. Correct it .* --gin.TRAIN_STEPS=VALUE.$'),
    ("BATCH_SIZE = '8'", "^BATCH_SIZE, which is DataConfig.batch_size, must be a "
     "whole number, but is '8'"),
    ('MODEL_DIR = 2024', 'must be a text, but is 2024.* in quotes of its own.$'),
    ("MIXTURE_OR_TASK_NAME = ['a']", r"but is \['a'\].*=VALUE.$"),
    ('BATCH_SIZE = %BATCH_SIZE', '%BATCH_SIZE goes round. Give a value'),
    ("OPTIMIZER = 'adafactor'", "of the type Optimizer, but is 'adafactor'"),
    ("TASK_FEATURE_LENGTHS = {'inputs': '64'}", r'Mapping\[str, int\]'),
    ("t5_config.T5Config.mlp_activations = 'gelu'",
     r'^T5Config.mlp_activations must be of the type tuple\[str, ...\]'),
  ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(binding, said):
  with pytest.raises(gin_types.UnfitValueError, match=said):
    gin_config.parse([_RUN], [binding])


@pytest.mark.parametrize(
  'binding',
  [
    # A whole number is a number, and a list may stand for a tuple.
    'DROPOUT_RATE = 0',
    "t5_config.T5Config.mlp_activations = ['gelu', 'linear']",
    't5_config.T5Config.sparse_encoder_layers = []',
    # What a call makes is not known before it is called.
    'BATCH_SIZE = @t5_config.default_dtype()',
    "MODEL_DIR = 'runs/a'",
    # Nothing is known of parts that are not used.
    'TRAIN_STEPS = None',
  ],
)
def test_values_that_fit(binding):
  gin_config.parse([_RUN], [binding])
