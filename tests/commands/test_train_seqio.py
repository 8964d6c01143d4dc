"""Tests runs on seqio tasks without a token cache, and caches of TFDS tasks.

Also tests `data_config`.
"""

import json

import pytest

tfds = pytest.importorskip('tensorflow_datasets')
seqio = pytest.importorskip('seqio')

import tensorflow as tf

from mowe.cli import main
from mowe.commands import cache_task
from mowe.data.caches import token_cache
from mowe.words import byte_vocabulary

_BYTES = byte_vocabulary.ByteVocabulary()
_TASK = """
from __gin__ import dynamic_registration
from mowe.commands import data_config
from mowe.models.t5 import t5_config
from mowe.tasks import pretraining
include 'gin_configs/models/{model}.gin'
include 'gin_configs/optimizers/adafactor_constant.gin'
include 'gin_configs/runs/pretrain.gin'

VOCABULARY_PATH = 'bytes'
VOCAB_SIZE = 384
pretraining.register_text_task:
  name = 'local_text'
  files = '{files}'
  vocabulary = %VOCABULARY
data_config.DataConfig.registered_tasks = (@pretraining.register_text_task(),)
data_config.DataConfig.trial_steps = 2
USE_CACHED_TASKS = False
MIXTURE_OR_TASK_NAME = 'local_text'
TASK_FEATURE_LENGTHS = {{'inputs': 24, 'targets': 12}}
BATCH_SIZE = 8
LOG_PERIOD = 1
EVAL_PERIOD = 0
t5_config.T5Config:
  emb_dim = 8
  num_heads = 2
  head_dim = 4
  mlp_dim = 16
  num_encoder_layers = {depth}
  num_decoder_layers = {depth}
"""
# A larger model, rows or tokens would change nothing that depends on the task.
_SMALL = [
  *(
    f'--gin.mowe.models.t5.t5_config.T5Config.{name}={size}'
    for name, size in (
      ('emb_dim', 8),
      ('num_heads', 2),
      ('head_dim', 4),
      ('mlp_dim', 16),
      ('num_encoder_layers', 1),
      ('num_decoder_layers', 1),
    )
  ),
  '--gin.VOCAB_SIZE=384',
  '--gin.BATCH_SIZE=8',
  "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 12}",
]
_TRIVIA = {
  'question': 'who?',
  'answer': {'value': 'Ada', 'aliases': ['Ada', 'Ada L.']},
}


@pytest.fixture(autouse=True)
def registry():
  """Each test gets an empty registry, as tasks remember where TFDS data lie."""
  kinds = (seqio.MixtureRegistry, seqio.TaskRegistry)
  before = {
    kind: {name: kind.get(name) for name in kind.names()} for kind in kinds
  }

  def clear():
    for kind in kinds:
      for name in list(kind.names()):
        kind.remove(name)

  clear()
  yield
  seqio.set_tfds_data_dir_override(None)
  clear()
  for kind, providers in before.items():
    for name, provider in providers.items():
      kind.add_provider(name, provider)


@pytest.fixture
def text(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text(
    ''.join(f'Line {n} tells of number {n * n}.\n' for n in range(80))
  )
  return path


def _train(folder, text, steps, model='t5_tiny', *options):
  # As in a new process, the task must not be registered yet.
  if 'local_text' in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove('local_text')
  gin_file = text.parent / f'{model}.gin'
  # Word experts are in every other block.
  depth = 2 if model == 'mowe_tiny' else 1
  gin_file.write_text(_TASK.format(model=model, files=text, depth=depth))
  status = main.main(
    [
      'train',
      f'--gin_file={gin_file}',
      f"--gin.MODEL_DIR='{folder}'",
      f'--gin.TRAIN_STEPS={steps}',
      *options,
    ]
  )
  assert status == 0
  lines = (folder / 'train_metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['loss'] for line in lines]


@pytest.mark.slow
def test_a_resumed_stream_goes_on_at_the_right_batch(tmp_path, text):
  whole = _train(tmp_path / 'a', text, 4)
  assert len(set(whole)) == 4
  assert _train(tmp_path / 'b', text, 2) == whole[:2]
  assert _train(tmp_path / 'b', text, 4) == whole


@pytest.mark.slow
def test_word_experts_learn_from_a_stream(tmp_path, text):
  words = tmp_path / 'words.npz'
  built = ['build-routing-vocabulary', str(words), str(text)]
  built += ['--vocabulary=bytes', '--num_experts=16', '--num_skipped=2']
  assert main.main(built) == 0
  losses = _train(
    tmp_path / 'm',
    text,
    2,
    'mowe_tiny',
    f"--gin.ROUTING_VOCABULARY='{words}'",
    '--gin.NUM_EXPERTS=16',
    '--gin.EXPERT_DIM=4',
  )
  assert losses[0] != losses[1]


def _mocked(example):
  def give(self, *args, **kwargs):
    del self, args, kwargs
    return tf.data.Dataset.from_tensors(example)

  return tfds.testing.mock_data(num_examples=1, as_dataset_fn=give)


def _data_dir(task):
  return seqio.TaskRegistry.get(task).source.tfds_dataset.data_dir


@pytest.mark.parametrize(
  'options', [{}, {'task_modules': ('mowe.tasks.closed_book_qa',)}]
)
def test_a_tfds_task_is_cached(tmp_path, options):
  with _mocked(_TRIVIA):
    cache = cache_task.cache_task(
      tmp_path / 'c',
      'bytes',
      cache_task.SeqioTask('trivia_qa_open', **options),
    )
  inputs = _BYTES.decode(cache.tokens('inputs', 0))
  assert inputs == 'trivia_qa question: who?'
  assert _BYTES.decode(cache.tokens('targets', 0)) == 'Ada'
  assert cache.record(0)['answers'] == ['Ada', 'Ada L.']


def test_the_command_says_where_tfds_data_lie(tmp_path, capsys):
  command = ['cache-task', str(tmp_path / 'c'), '--seqio_task=trivia_qa_open']
  command += ['--vocabulary=bytes', f'--tfds_data_dir={tmp_path / "tfds"}']
  with _mocked(_TRIVIA):
    assert main.main(command) == 0
  assert _data_dir('trivia_qa_open') == str(tmp_path / 'tfds')
  assert '1 examples' in capsys.readouterr().out
  cache = token_cache.TokenCache.open(tmp_path / 'c', _BYTES)
  assert cache.num_examples == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ('example', 'name'),
  [
    ('c4_pretrain', 'c4_span_corruption'),
    ('trivia_qa_finetune', 'trivia_qa_open'),
    ('glue_finetune', 'glue_v002_proportional'),
  ],
)
def test_examples_register_their_tasks(
  tmp_path, capsys, monkeypatch, example, name
):
  # TFDS mocks the data but not the number of examples.
  loader = seqio.utils.LazyTfdsLoader
  monkeypatch.setattr(loader, 'size', lambda self, split: 10**9)
  with tfds.testing.mock_data(num_examples=4):
    status = main.main(
      [
        'train',
        '--dry_run',
        f'--gin_file=gin_configs/examples/{example}_t5.gin',
        "--gin.VOCABULARY_PATH='bytes'",
        f"--gin.MODEL_DIR='{tmp_path / 'm'}'",
        f'--tfds_data_dir={tmp_path}',
        *_SMALL,
      ]
      + ['--gin.INITIAL_CHECKPOINT_PATH=None'] * (example != 'c4_pretrain')
    )
  assert status == 0, capsys.readouterr().err
  task = name if name in seqio.TaskRegistry.names() else 'glue_mnli_v002'
  assert _data_dir(task) == str(tmp_path)
  assert name in capsys.readouterr().out
