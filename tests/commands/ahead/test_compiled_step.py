"""Tests that a step takes the memory that `--dry_run` says it will."""

import pathlib
import subprocess
import sys

import pytest

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not pathlib.Path('/proc/self/clear_refs').exists(),
    reason='only Linux tells the peak memory of a part of a process',
  ),
]

# A process of its own: another test may have left memory that a step would use.
_SCRIPT = """
import ctypes, pathlib, re, sys, tempfile
import jax
from mowe.commands import data_config, train
from mowe.commands.ahead import compiled_step
from mowe.models.t5 import t5_config
from mowe.training import checkpointing, partitioning
from mowe.training.compiling import program_facts
from mowe.training.optimization import optimizers
from mowe.words import subword_vocabularies

vocabulary, cache, folder = sys.argv[1:]


def memory(name):
  text = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(name + r':\\s+(\\d+) kB', text)[1]) * 1024


def now():
  # What was freed goes back to the system, and the peak starts anew.
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  return memory('VmRSS')


training = train.Training(
  model=t5_config.T5Config(
    vocab_size=256, emb_dim=96, num_heads=6, head_dim=16, mlp_dim=224,
    num_encoder_layers=1, num_decoder_layers=1,
  ),
  vocabulary=subword_vocabularies.load_subwords(vocabulary),
  data=data_config.DataConfig(
    mixture_or_task_name='text',
    task_feature_lengths={'inputs': 256, 'targets': 192},
    batch_size=112, cache_dir=cache,
  ),
  optimizer=optimizers.AdamW(1e-2), model_dir=folder, total_steps=3, boards=(),
)
prepared = train.Prepared.make(training, training.make_mesh())
program = compiled_step.compile_step(training, prepared).program
setup, router = prepared.setup, prepared.router
before = now()
checkpoints = checkpointing.Checkpoints(folder)
state, experts = setup.start(
  checkpoints, {}, None, training.store, router.at_once
)
source = iter([router(prepared.batches.first_batch)])
(batch, fed), = experts.feed(source)
batch = partitioning.put_batch(batch, partitioning.batch_sharding(setup.mesh))
now()
state, frozen, plan = experts.ready(state, fed)
jax.block_until_ready(program(state, frozen, batch, plan, None))
print(memory('VmHWM') - before, program_facts.memory(program).peak)
"""


def test_a_step_takes_what_was_said(world, tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, '-c', _SCRIPT),
      *(world.vocabulary_path, world.cache_dir, str(tmp_path / 'run')),
    ],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  taken, said = map(int, done.stdout.split())
  assert said > 1e9
  # What the compiled code itself and its threads need is not in the program.
  assert taken == pytest.approx(said, rel=0.15)
