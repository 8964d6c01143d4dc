"""Two processes train as one, stop together, and name one that is lost."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from started_commands import finish, wait_until

from mowe.training import checkpointing, train_metrics

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore:Sharding info not provided'),
]

# Every step waits for both processes, so the runs are short.
_TOTAL = 24
_ADAFACTOR = ('--gin_file=gin_configs/optimizers/adafactor.gin',)
_LONG = '--gin.TRAIN_STEPS=100000'
_SPARSE_T5 = (
  '--gin.mowe.models.t5.t5_config.T5Config.sparse_encoder_layers=(0,)',
  '--gin.mowe.models.t5.t5_config.T5Config.sparse_decoder_layers=(0,)',
)


def _mowe(world):
  return (
    '--gin_file=gin_configs/models/mowe_tiny.gin',
    *_ADAFACTOR,
    '--gin_file=gin_configs/runs/pretrain.gin',
    f'--gin.ROUTING_VOCABULARY={world.routing_path}',
    '--gin.EXPERT_DIM=4',
    *_SPARSE_T5,
  )


def _switch(world):
  del world
  return (
    '--gin_file=gin_configs/models/moe_switch_tiny.gin',
    *_ADAFACTOR,
    '--gin_file=gin_configs/runs/pretrain.gin',
    '--gin.NUM_EXPERTS=4',
    '--gin.token_groups.TokenGroups.multiple=2',
    *_SPARSE_T5,
  )


def _dense(world):
  del world
  return (
    '--gin_file=gin_configs/models/t5_tiny.gin',
    *_ADAFACTOR,
    '--gin_file=gin_configs/runs/finetune_and_evaluate.gin',
    '--gin.INITIAL_CHECKPOINT_PATH=None',
    '--gin.EVAL_TASK_NAME=questions',
    '--gin.EVAL_PERIOD=4',
  )


def _start(world, model, folder, *options, **environment):
  sizes = 'mowe.models.t5.t5_config.T5Config'
  bindings = {
    'VOCABULARY_PATH': world.vocabulary_path,
    'MODEL_DIR': str(folder),
    'CACHE_DIR': world.cache_dir,
    'MIXTURE_OR_TASK_NAME': 'text',
    'TASK_FEATURE_LENGTHS': {'inputs': 18, 'targets': 11},
    'TRAIN_STEPS': _TOTAL,
    'BATCH_SIZE': 4,
    'DROPOUT_RATE': 0.1,
    'SAVE_PERIOD': 4,
    'LOG_PERIOD': 2,
    f'{sizes}.num_encoder_layers': 1,
    f'{sizes}.num_decoder_layers': 1,
  }
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'mowe.cli.main', 'train', *model(world)),
      *(f'--gin.{name}={value!r}' for name, value in bindings.items()),
      *options,
    ],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _start_two(world, model, folder, *options, of_second=()):
  port = _free_port()
  return [
    _start(
      world,
      model,
      folder,
      f'--coordinator_address=localhost:{port}',
      '--process_count=2',
      f'--process_index={index}',
      *options,
      *(of_second if index else ()),
    )
    for index in range(2)
  ]


def _free_port():
  with socket.socket() as one:
    one.bind(('localhost', 0))
    return one.getsockname()[1]


def _finish_both(processes, code):
  outputs = [finish(process) for process in processes]
  assert [p.returncode for p in processes] == [code, code], outputs
  return outputs


def _has_lines(path):
  return lambda: path.exists() and path.stat().st_size > 0


def _latest_step(folder):
  with checkpointing.Checkpoints(folder) as saved:
    return saved.latest_step()


def _losses(folder):
  """The losses of the first steps.

  Two processes add up in another order than one device, and training amplifies
  the difference, so that only these can be compared.
  """
  lines = train_metrics.read_json_lines(folder / 'train_metrics.jsonl')
  return [line['loss'] for line in lines[:2]]


def _of_one_process(world, model, folder):
  # It does the steps that are compared, and no more.
  process = _start(world, model, folder, '--gin.TRAIN_STEPS=8')
  output = finish(process)
  assert process.returncode == 0, output
  return pytest.approx(_losses(folder), rel=1e-5)


def test_word_experts_stop_together_and_train_as_one(world, tmp_path):
  folder = tmp_path / 'run'
  split = '--gin.partitioning.make_mesh.expert=2'
  processes = _start_two(world, _mowe, folder, split)
  wait_until(_has_lines(folder / 'train_metrics.jsonl'), processes[0])
  # Only one process gets the signal, and it is not the one that writes.
  processes[1].terminate()
  outputs = _finish_both(processes, 130)
  step = _latest_step(folder)
  assert 0 < step < _TOTAL
  assert all(f'Stopped after step {step} of' in output for output in outputs)

  # The run goes on with another number of processes.
  process = _start(world, _mowe, folder)
  output = finish(process)
  assert process.returncode == 0, output
  assert f'at step {step}.' in output
  assert _latest_step(folder) == _TOTAL
  assert _losses(folder) == _of_one_process(world, _mowe, tmp_path / 'one')


def test_a_lost_process_is_named(world, tmp_path):
  folder = tmp_path / 'run'
  split = '--gin.partitioning.make_mesh.expert=2'
  processes = _start_two(world, _switch, folder, split, _LONG)
  wait_until(lambda: _latest_step(folder), processes[0])
  processes[1].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  output = finish(processes[0])
  assert time.monotonic() - killed < 60
  assert processes[0].returncode == 1
  assert 'but process 1 of 2 did not answer within 10 seconds' in output, output
  finish(processes[1])
  assert _losses(folder) == _of_one_process(world, _switch, tmp_path / 'one')


def test_processes_of_slurm_find_each_other_and_evaluate(world, tmp_path):
  folder = tmp_path / 'run'
  processes = [
    _start(
      world,
      _dense,
      folder,
      '--gin.TRAIN_STEPS=8',
      SLURM_JOB_ID='1',
      SLURM_STEP_NODELIST='localhost',
      SLURM_NTASKS='2',
      SLURM_PROCID=str(index),
      SLURM_LOCALID=str(index),
      JAX_COORDINATOR_PORT=str(port),
    )
    for port in [_free_port()]
    for index in range(2)
  ]
  _finish_both(processes, 0)
  assert _losses(folder) == _of_one_process(world, _dense, tmp_path / 'one')
  evaluated = [
    train_metrics.read_json_lines(path / 'eval_metrics.jsonl')
    for path in (folder, tmp_path / 'one')
  ]
  assert evaluated[0] == evaluated[1]
  assert [line['step'] for line in evaluated[0]] == [4, 8]


def test_processes_with_other_settings_do_not_train(world, tmp_path):
  folder = tmp_path / 'run'
  processes = _start_two(
    world, _mowe, folder, of_second=['--gin.LEARNING_RATE=0.5']
  )
  outputs = _finish_both(processes, 1)
  assert all('the settings of process 1 differ' in one for one in outputs)
  assert not folder.exists()
