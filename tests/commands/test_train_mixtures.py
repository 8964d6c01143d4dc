"""Trains and resumes every kind of mixture of experts from its gin files."""

import jax
import numpy as np
import pytest
import small_runs

from mowe.cli import main
from mowe.model_folders import model_folder
from mowe.training import train_metrics

# The learning rate is constant, because a decaying one depends on TRAIN_STEPS.
_SMALL = """
from __gin__ import dynamic_registration
from mowe.models.t5 import t5_config
include 'gin_configs/models/moe_{kind}_tiny.gin'
include 'gin_configs/optimizers/adafactor_constant.gin'
include 'gin_configs/runs/pretrain.gin'

t5_config.T5Config.num_encoder_layers = 1
t5_config.T5Config.num_decoder_layers = 1
t5_config.T5Config.sparse_encoder_layers = (0,)
t5_config.T5Config.sparse_decoder_layers = (0,)
"""


# The experts are split in two parts over the eight devices of these tests.
_PARTS = [
  '--gin.partitioning.make_mesh.expert=2',
  '--gin.token_groups.TokenGroups.multiple=8',
]


def _train(world, file, folder, steps, *options):
  macros = {
    'VOCABULARY_PATH': world.vocabulary_path,
    'VOCAB_SIZE': 256,
    'MODEL_DIR': str(folder),
    'CACHE_DIR': world.cache_dir,
    'MIXTURE_OR_TASK_NAME': 'text',
    'TASK_FEATURE_LENGTHS': small_runs.LENGTHS,
    'BATCH_SIZE': 8,
    'DROPOUT_RATE': 0.1,
    'EVAL_PERIOD': 0,
    'LOG_PERIOD': 2,
    'TRAIN_STEPS': steps,
    'LEARNING_RATE': 1e-3,
  }
  bindings = [f'--gin.{name}={value!r}' for name, value in macros.items()]
  return main.main(['train', f'--gin_file={file}', *bindings, *options])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['switch', 'top2', 'expert_choice', 'hash'])
def test_an_interrupted_run_ends_with_the_same_bits(
  world, tmp_path, kind, monkeypatch
):
  file = tmp_path / 'small.gin'
  file.write_text(_SMALL.format(kind=kind))
  options = _PARTS
  if kind in ('top2', 'expert_choice'):
    # One device is enough for these, and compiled sooner.
    here = jax.devices()[:1]
    monkeypatch.setattr(jax, 'devices', lambda: here)
    options = []
  assert _train(world, file, tmp_path / 'straight', 4, *options) == 0
  for steps in (3, 4):
    assert _train(world, file, tmp_path / 'stopped', steps, *options) == 0
  straight, stopped = (
    jax.device_get(model_folder.load(str(tmp_path / name)).params)
    for name in ('straight', 'stopped')
  )
  jax.tree.map(np.testing.assert_array_equal, stopped, straight)
  kernel = straight['decoder']['layers_0']['mlp']['expert']['wo']['kernel']
  assert kernel.shape[0] == 8
  last = train_metrics.read_json_lines(
    tmp_path / 'straight' / 'train_metrics.jsonl'
  )[-1]
  assert last['step'] == 4 and np.isfinite(last['loss'])
  loads = [value for name, value in last.items() if '/mlp/load' in name]
  assert loads


def test_groups_that_do_not_fit_the_mesh_are_refused_at_once(
  world, tmp_path, capsys
):
  file = tmp_path / 'small.gin'
  file.write_text(_SMALL.format(kind='hash'))
  assert _train(world, file, tmp_path / 'run', 2, _PARTS[0]) != 0
  assert 'Set multiple of TokenGroups to 8' in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()
