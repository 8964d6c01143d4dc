"""Tests runs from C4 through masked entities to GLUE, and on local claims."""

import json

import pytest
import small_runs

tfds = pytest.importorskip('tensorflow_datasets')
seqio = pytest.importorskip('seqio')

import tensorflow as tf

from mowe.cli import main

_SMALL = """
from __gin__ import dynamic_registration
from mowe.commands import data_config
from mowe.models.t5 import t5_config
VOCABULARY_PATH = 'bytes'
VOCAB_SIZE = 384
LOG_PERIOD = 1
data_config.DataConfig.trial_steps = 2
t5_config.T5Config:
  emb_dim = 8
  num_heads = 2
  head_dim = 4
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
"""
_TEXTS = [f'In {1900 + n} Ada Byron saw Oslo.' for n in range(40)]
_SPAN = {'start': [8], 'limit': [17], 'type': ['PER']}
_RAW = {
  'c4': {'text': _TEXTS},
  'salient_span_wikipedia': {'text': _TEXTS, 'title': ['t'] * 40},
  'glue': {
    'sentence': [f'It is {n}.' for n in range(9)],
    'label': [n % 2 for n in range(9)],
    'idx': list(range(9)),
  },
}


@pytest.fixture
def mocked(monkeypatch):
  def give(self, *args, **kwargs):
    del args, kwargs
    dataset = tf.data.Dataset.from_tensor_slices(_RAW[self.name])
    if self.name == 'salient_span_wikipedia':
      dataset = dataset.map(lambda example: example | {'spans': _SPAN})
    return dataset

  # TFDS mocks the data but not the number of examples.
  loader = seqio.utils.LazyTfdsLoader
  monkeypatch.setattr(loader, 'size', lambda self, split: 10**9)
  kinds = (seqio.MixtureRegistry, seqio.TaskRegistry)
  before = {kind: set(kind.names()) for kind in kinds}
  with tfds.testing.mock_data(num_examples=1, as_dataset_fn=give):
    yield
  for kind in kinds:
    for name in set(kind.names()) - before[kind]:
      kind.remove(name)


@pytest.fixture
def small(tmp_path):
  path = tmp_path / 'small.gin'
  path.write_text(_SMALL)
  return path


def _run(verb, files, **macros):
  command = [verb, *(f'--gin_file={file}' for file in files)]
  command += [f'--gin.{name}={value!r}' for name, value in macros.items()]
  assert main.main(command) == 0


def _train(small, files, **macros):
  macros = {'TRAIN_STEPS': 2, 'BATCH_SIZE': 8, 'EVAL_PERIOD': 0} | macros
  parts = [f'gin_configs/{file}.gin' for file in ('models/t5_tiny', *files)]
  _run('train', [*parts, small], **macros)


@pytest.mark.slow
def test_c4_then_masked_entities_then_glue(tmp_path, mocked, small, capsys):
  folder = lambda name: str(tmp_path / name)
  _train(
    small,
    ['examples/c4_pretrain'],
    MODEL_DIR=folder('a'),
    TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16},
  )
  # The second stage masks the entity that the tagger found.
  _train(
    small,
    ['examples/wikipedia_salient'],
    MODEL_DIR=folder('b'),
    INITIAL_CHECKPOINT_PATH=folder('a'),
    TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16},
  )
  assert 'wikipedia_salient_spans' in (tmp_path / 'b/config.gin').read_text()
  for split in ('train', 'validation'):
    command = ['cache-task', folder(f'c/{split}'), '--vocabulary=bytes']
    command += ['--seqio_task=glue_cola_v002', f'--split={split}']
    assert main.main(command) == 0
  caches = {
    'CACHE_DIR': folder('c'),
    'TASK_FEATURE_LENGTHS': {'inputs': 32, 'targets': 16},
  }
  _train(
    small,
    ['optimizers/adafactor_constant', 'runs/finetune_and_evaluate'],
    MODEL_DIR=folder('d'),
    INITIAL_CHECKPOINT_PATH=folder('b'),
    MIXTURE_OR_TASK_NAME='train',
    EVAL_TASK_NAME='validation',
    **caches | {'EVAL_PERIOD': 2},
  )
  (line,) = (tmp_path / 'd/eval_metrics.jsonl').read_text().splitlines()
  assert json.loads(line)['validation/matthews_corrcoef'] == 0.0
  capsys.readouterr()
  _run(
    'evaluate',
    ['gin_configs/runs/evaluate.gin'],
    CHECKPOINT_PATH=folder('d'),
    EVAL_OUTPUT_DIR=folder('e'),
    MIXTURE_OR_TASK_NAME='validation',
    **caches,
  )
  # After two steps no prediction is a label, so the correlation is 0.
  results = json.loads((tmp_path / 'e/results.json').read_text())
  assert results['scores'] == {'matthews_corrcoef': 0.0}
  assert 'matthews_corrcoef 0.0  (9 questions' in capsys.readouterr().out


def test_claims_are_cached_by_the_command(tmp_path, capsys):
  path = tmp_path / 'claims.jsonl'
  small_runs.write_lines(path, [{'claim': 'It is.', 'label': 'REFUTES'}])
  command = ['cache-task', str(tmp_path / 'c'), str(path), '--kind=claims']
  assert main.main([*command, '--vocabulary=bytes']) == 0
  assert '1 examples' in capsys.readouterr().out
