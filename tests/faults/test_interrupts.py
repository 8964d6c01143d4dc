"""Runs in processes of their own are stopped or killed, and then run again."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from started_commands import finish, wait_until

from mowe.model_folders import model_folder
from mowe.models.families import families
from mowe.stores import expert_sources
from mowe.training import checkpointing, train_metrics

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore:Sharding info not provided'),
]

_TOTAL = 120
# Kills at random moments need a run that is long enough for all of them.
_TOTAL_OF_KILLS = 120


def _command(world, folder):
  sizes = 'mowe.models.t5.t5_config.T5Config'
  bindings = {
    'VOCABULARY_PATH': world.vocabulary_path,
    'VOCAB_SIZE': 256,
    'ROUTING_VOCABULARY': world.routing_path,
    'NUM_EXPERTS': world.routing.num_experts,
    'EXPERT_DIM': 4,
    'MODEL_DIR': str(folder),
    'CACHE_DIR': world.cache_dir,
    'MIXTURE_OR_TASK_NAME': 'text',
    'TASK_FEATURE_LENGTHS': {'inputs': 18, 'targets': 11},
    'TRAIN_STEPS': _TOTAL,
    'BATCH_SIZE': 4,
    'DROPOUT_RATE': 0.1,
    'SAVE_PERIOD': 20,
    'LOG_PERIOD': 5,
    f'{sizes}.num_encoder_layers': 1,
    f'{sizes}.num_decoder_layers': 1,
    f'{sizes}.sparse_encoder_layers': (0,),
    f'{sizes}.sparse_decoder_layers': (0,),
  }
  return [
    sys.executable,
    '-m',
    'mowe.cli.main',
    'train',
    '--gin_file=gin_configs/examples/text_pretrain_mowe.gin',
    *(f'--gin.{name}={value!r}' for name, value in bindings.items()),
  ]


def _start(world, folder, *options):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  return subprocess.Popen(
    [*_command(world, folder), *options],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _final(folder, total):
  with checkpointing.Checkpoints(folder) as saved:
    assert saved.latest_step() == total
  state = folder / f'checkpoint_{total}' / 'state'
  # Arrays are restored as numpy arrays, on whichever devices they were.
  checkpointer = ocp.PyTreeCheckpointer()
  tree = checkpointer.metadata(state).item_metadata.tree
  as_numpy = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
  tree = checkpointer.restore(state, restore_args=jax.tree.map(as_numpy, tree))
  model = families.build(model_folder.load_config(folder)[0])
  source = expert_sources.SavedExperts(state.parent, model=model)
  records = source.read(np.arange(source.index.num_rows))
  return tree | {'experts': records.view(np.uint8)}


@pytest.fixture(scope='module')
def straight(world, tmp_path_factory):
  folder = tmp_path_factory.mktemp('uninterrupted') / 'run'
  process = _start(world, folder)
  output = finish(process)
  assert process.returncode == 0, output
  return folder


def _rerun_and_compare(
  world, folder, straight, resumed_at, *options, total=_TOTAL
):
  expected = _final(straight, total)
  process = _start(world, folder, *options)
  output = finish(process)
  assert process.returncode == 0, output
  if resumed_at is not None:
    assert f'at step {resumed_at}.' in output
  actual = _final(folder, total)
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  assert {'params', 'opt_state', 'experts'} < {
    name for name, tree in actual.items() if jax.tree.leaves(tree)
  }
  for (path, want), got in zip(
    jax.tree_util.tree_leaves_with_path(expected),
    jax.tree.leaves(actual),
    strict=True,
  ):
    same = np.asarray(got).tobytes() == np.asarray(want).tobytes()
    assert same, jax.tree_util.keystr(path)
  lines = train_metrics.read_json_lines(folder / 'train_metrics.jsonl')
  steps = [line['step'] for line in lines]
  assert steps == sorted(set(steps)) and steps[-1] == total


def _phase_has_come(phase, folder, saved):
  log = folder / 'train_metrics.jsonl'
  return {
    # The folder is locked before programs are compiled.
    'starting': lambda: (folder / 'model.json').exists(),
    'training': lambda: log.exists() and log.stat().st_size > 0,
    'saved': lambda: saved.latest_step() is not None,
  }[phase]


@pytest.mark.parametrize(
  'number, phase',
  [
    (signal.SIGINT, 'starting'),
    (signal.SIGTERM, 'training'),
    (signal.SIGKILL, 'saved'),
  ],
)
def test_an_interrupted_run_goes_on(number, phase, world, straight, tmp_path):
  if signal.getsignal(number) == signal.SIG_IGN:
    pytest.skip('the signal is ignored here, and so in all processes started')
  folder = tmp_path / 'run'
  process = _start(world, folder)
  with checkpointing.Checkpoints(folder) as saved:
    wait_until(_phase_has_come(phase, folder, saved), process)
    process.send_signal(number)
    output = finish(process)
    step = saved.latest_step()
  if number == signal.SIGKILL:
    assert process.returncode == -number
  else:
    assert process.returncode == 130, output
    assert output.splitlines()[-1].startswith('mowe: ')
  if phase != 'starting':
    assert 0 < step < _TOTAL
  if phase == 'training':
    assert f'Stopped after step {step} of {_TOTAL}; saved' in output
  _rerun_and_compare(world, folder, straight, step)


def test_experts_on_disk_survive_kills(world, tmp_path):
  """The kills come at random moments, also while experts are being written.

  test_power_cut.py has every moment at which something is forced to the disk.
  """
  # With one row in a batch, few experts are in slots.
  small = ('--gin.BATCH_SIZE=1', f'--gin.TRAIN_STEPS={_TOTAL_OF_KILLS}')
  straight = tmp_path / 'straight'
  process = _start(world, straight, *small)
  output = finish(process)
  assert process.returncode == 0, output
  folder = tmp_path / 'run'
  rng = np.random.default_rng(0)
  on_disk = (
    *small,
    '--gin_file=gin_configs/stores/disk.gin',
    f'--gin.NUM_SLOTS={world.routing.num_experts - 2}',
    '--gin.SAVE_PERIOD=8',
  )
  log = folder / 'train_metrics.jsonl'
  size = lambda: log.stat().st_size if log.exists() else 0
  saved = checkpointing.Checkpoints(folder)
  newest = lambda: saved.latest_step() or 0
  killed_at = [0]
  for index in range(4):
    process = _start(world, folder, *on_disk)
    # Most of the time goes into starting up. Every other kill waits for a new
    # checkpoint, so that the run makes progress on any machine. The others come
    # soon after a run has logged its first steps.
    seen = newest if index % 2 else size
    before = seen()
    wait_until(lambda seen=seen, before=before: seen() != before, process)
    time.sleep(rng.uniform(0, 0.3))
    process.kill()
    finish(process)
    killed_at.append(newest())
  saved.close()
  assert killed_at == sorted(killed_at)
  assert len(set(killed_at)) > 2 and killed_at[-1] < _TOTAL_OF_KILLS
  _rerun_and_compare(
    world, folder, straight, killed_at[-1], *on_disk, total=_TOTAL_OF_KILLS
  )
