"""Runs T5X's own commands on gin_configs/t5x/, each in a process of its own."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from mowe.interop.t5x import t5x_rules
from mowe.words import sentencepiece_vocabulary, vocabulary_builder

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec('t5x') is None,
    reason='needs T5X on PYTHONPATH; docs/t5x.md says how to install it',
  ),
]

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_QUESTIONS = [
  (f'Who met {other} in {town}?', name)
  for name, other in (('Zorblat', 'Quimby'), ('Anna', 'Karl'), ('Karl', 'Anna'))
  for town in ('Karlsburg', 'Norden', 'Delft')
]
_TASK = f"""
import pathlib, seqio, tensorflow as tf
from mowe.data import seqio_stream
from mowe.words import subword_vocabularies

path = pathlib.Path(__file__).with_name('vocabulary.model')
vocabulary = seqio_stream.seqio_vocabulary(subword_vocabularies.load_subwords(path))

def read(split, shuffle_files=False, seed=None):
  inputs, targets = zip(*{_QUESTIONS!r})
  return tf.data.Dataset.from_tensor_slices(
    {{'inputs': list(inputs), 'targets': list(targets)}}
  )

def exact_match(targets, predictions):
  right = [a == b for a, b in zip(targets, predictions)]
  return {{'exact_match': 100 * sum(right) / len(right)}}

seqio.TaskRegistry.add(
  'tiny_questions',
  source=seqio.FunctionDataSource(read, splits=('train', 'validation', 'test')),
  preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
  output_features={{n: seqio.Feature(vocabulary) for n in ('inputs', 'targets')}},
  metric_fns=[exact_match],
)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('t5x')
  texts = [f'{question} {answer}' for question, answer in _QUESTIONS]
  vocabulary = sentencepiece_vocabulary.train_sentencepiece(
    texts, folder / 'vocabulary.model', 30
  )
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    texts, vocabulary, num_words=30, num_experts=16, num_skipped=2
  )
  routing.save(folder / 'routing.npz')
  (folder / 'tiny_tasks.py').write_text(_TASK)
  return folder


def _run(folder, command, files, **macros):
  """Runs a command of T5X as a user would."""
  macros = {
    'VOCABULARY_PATH': str(folder / 'vocabulary.model'),
    'VOCAB_SIZE': 143,
    'MIXTURE_OR_TASK_NAME': 'tiny_questions',
    'MIXTURE_OR_TASK_MODULE': 'tiny_tasks',
    'TASK_FEATURE_LENGTHS': {'inputs': 36, 'targets': 11},
  } | macros
  if command == 'train':
    macros |= {'USE_CACHED_TASKS': False, 'BATCH_SIZE': 4, 'RANDOM_SEED': 0}
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      f't5x.{command}',
      f'--gin_search_paths={_ROOT}',
      *(f'--gin_file={file}' for file in files),
      *(f'--gin.{name}={value!r}' for name, value in macros.items()),
    ],
    env=os.environ
    | {
      'PYTHONPATH': os.pathsep.join([str(_ROOT), str(folder), *sys.path]),
      'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stderr


def _parameters(checkpoint):
  import orbax.checkpoint as ocp

  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
  state = ocp.Checkpointer(handler).restore(checkpoint / 'state')
  return {
    tuple(key.key for key in path): value
    for path, value in jax.tree.leaves_with_path(state['target'])
  }


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


# This test starts six processes, each of which imports TensorFlow and compiles.
@pytest.mark.timeout(1800)
def test_word_experts_go_through_all_commands(folder):
  """Trains, restarts, evaluates, decodes, scores and finetunes a model."""
  model = 'gin_configs/t5x/mowe_tiny.gin'
  experts = {
    'NUM_EXPERTS': 16,
    'ROUTING_VOCABULARY': str(folder / 'routing.npz'),
  }
  run = folder / 'run'
  pretrain = [model, 't5x/configs/runs/pretrain.gin']
  for steps in (30, 40):
    log = _run(
      folder,
      'train',
      pretrain,
      MODEL_DIR=str(run),
      TRAIN_STEPS=steps,
      **experts,
    )
  assert f'Restoring checkpoint from {run / "checkpoint_30"}' in log
  assert 'encoder_routed=' in log

  checkpoint = {'CHECKPOINT_PATH': str(run / 'checkpoint_40'), 'NUM_BEAMS': 3}
  _run(
    folder,
    'eval',
    [model, 't5x/configs/runs/eval.gin'],
    EVAL_OUTPUT_DIR=str(folder / 'eval'),
    **checkpoint,
    **experts,
  )
  (metrics,) = _lines(
    folder / 'eval' / 'inference_eval' / 'tiny_questions-metrics.jsonl'
  )
  assert metrics['step'] == 40
  for mode, key in (('predict', 'prediction'), ('score', 'score')):
    _run(
      folder,
      'infer',
      [model, 't5x/configs/runs/infer.gin'],
      INFER_OUTPUT_DIR=str(folder / mode),
      **{
        'infer.mode': mode,
        # The parameters are float32 as in evaluation; T5X's run file says
        # bfloat16.
        'utils.RestoreCheckpointConfig.dtype': 'float32',
      },
      **checkpoint,
      **experts,
    )
    name = f'tiny_questions-{mode}.jsonl-00000-of-00001'
    found = [line[key] for line in _lines(folder / mode / name)]
    if mode == 'predict':
      right = [a == b for a, (_, b) in zip(found, _QUESTIONS, strict=True)]
      assert metrics['exact_match'] == pytest.approx(100 * np.mean(right))
      assert any(right)
    else:
      assert len(found) == len(_QUESTIONS) and max(found) < 0

  frozen = 'gin_configs/t5x/frozen_experts.gin'
  _run(
    folder,
    'train',
    [model, frozen, 't5x/configs/runs/finetune.gin'],
    MODEL_DIR=str(folder / 'finetuned'),
    INITIAL_CHECKPOINT_PATH=str(run / 'checkpoint_40'),
    TRAIN_STEPS=43,
    **experts,
  )
  before = _parameters(run / 'checkpoint_40')
  after = _parameters(folder / 'finetuned' / 'checkpoint_43')
  assert before.keys() == after.keys()
  for path, value in before.items():
    is_same = np.array_equal(value, after[path])
    assert is_same == t5x_rules.is_expert(path), path


def test_switch_trains_in_the_trainer_of_contrib_moe(folder):
  log = _run(
    folder,
    'train',
    [
      'gin_configs/t5x/moe_switch_tiny.gin',
      't5x/contrib/moe/configs/runs/pretrain.gin',
    ],
    MODEL_DIR=str(folder / 'switch'),
    TRAIN_STEPS=3,
    NUM_MODEL_PARTITIONS=1,
  )
  assert 'moe_trainer.MoeTrainer' in log
  assert 'experts/auxiliary_loss=' in log
  assert (folder / 'switch' / 'checkpoint_3').is_dir()
