"""Times the start of a training run against T5X: `mowe train`, `t5x.train`.

  python -m benchmarks.startup --t5x_path=t5x:airio:jestimator

The time is taken from outside, from the start of a fresh Python process until
it prints that its first training step is done. Ours prints the metrics of step
1, and T5X 'END Train loop.' of a loop of one step. Both train a T5 of T5X's
tiny sizes with its Adafactor in float32 on the same examples and batch size;
ours reads a token cache, T5X the same text as a seqio task. Processes of both
take turns. One more of each goes first and is not counted.

Evaluation is off in both, and checkpoints are off in T5X. Ours always saves
after its last step, as T5X would: that comes after what is timed, but is in the
time to the end of the process, which is printed besides. What cannot be turned
off is each one's writing of its config and TensorBoard events.

With --compilation_cache both use JAX's compilation cache, filled by the round
that is not counted: the start of a run that was compiled here before. CPU
seconds of the whole process are printed too; on a busy machine they say more.

The path names clones of t5x and of what it imports (airio, jestimator), and a
folder, if need be, with the packages that it needs besides ours:
  pip install --no-deps --target=extra cached_property cloudpickle fiddle \\
    grain graphviz libcst portpicker tensorboard
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_LENGTHS = {'inputs': 64, 'targets': 16}
_BATCH_SIZE = 8
_VOCAB_SIZE = 384  # The 359 ids of a byte vocabulary, and padding.
_NUM_EXAMPLES = 256

# The module of a seqio task over lines of inputs, a tab, and targets.
_TASK_MODULE = """
import seqio
import tensorflow as tf


@seqio.map_over_dataset
def split_line(line):
  inputs, targets = tf.unstack(tf.strings.split(line, '\\t'), num=2)
  return {{'inputs': inputs, 'targets': targets}}


feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=100), add_eos=True)
seqio.TaskRegistry.add(
  'startup',
  source=seqio.TextLineDataSource({{'train': {path!r}}}),
  preprocessors=[
    split_line,
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos_after_trim,
  ],
  output_features={{'inputs': feature, 'targets': feature}},
)
"""
_T5X_GIN = """
from __gin__ import dynamic_registration
import __main__ as train_script
import seqio
import startup_task
from t5x import utils
from t5x.examples.t5 import network
include 't5x/examples/t5/t5_1_1/tiny.gin'
include 't5x/configs/runs/pretrain.gin'

MIXTURE_OR_TASK_NAME = 'startup'
TASK_FEATURE_LENGTHS = {lengths}
TRAIN_STEPS = 1
BATCH_SIZE = {batch_size}
DROPOUT_RATE = 0.0
RANDOM_SEED = 0
USE_CACHED_TASKS = False
VOCABULARY = @seqio.ByteVocabulary()
seqio.ByteVocabulary.extra_ids = 100
network.T5Config.vocab_size = {vocab_size}
network.T5Config.dtype = 'float32'
train/utils.DatasetConfig.pack = False
train_script.train.train_eval_dataset_cfg = None
utils.CheckpointConfig.save = None
"""
# The sizes are those of t5_1_1/tiny.gin of T5X.
_OUR_GIN = """
from __gin__ import dynamic_registration
from mowe.models.t5 import t5_config
include 'gin_configs/models/t5_base.gin'
include 'gin_configs/optimizers/adafactor.gin'
include 'gin_configs/runs/pretrain.gin'

VOCABULARY_PATH = 'bytes'
VOCAB_SIZE = {vocab_size}
DTYPE = 'float32'
t5_config.T5Config:
  emb_dim = 8
  num_heads = 4
  num_encoder_layers = 2
  num_decoder_layers = 2
  head_dim = 3
  mlp_dim = 16
CACHE_DIR = '.'
MIXTURE_OR_TASK_NAME = 'startup'
TASK_FEATURE_LENGTHS = {lengths}
TRAIN_STEPS = 1
LOG_PERIOD = 1
BATCH_SIZE = {batch_size}
"""


def prepare(folder: pathlib.Path) -> None:
  """Writes the examples, the token cache, the seqio task and the gin files."""
  pairs = [
    (f'What is {number} plus {number}?', str(2 * number))
    for number in range(_NUM_EXAMPLES)
  ]
  questions = folder / 'questions.jsonl'
  questions.write_text(
    ''.join(
      json.dumps({'question': question, 'answers': [answer]}) + '\n'
      for question, answer in pairs
    )
  )
  lines = folder / 'lines.tsv'
  lines.write_text(''.join('\t'.join(pair) + '\n' for pair in pairs))
  (folder / 'startup_task.py').write_text(_TASK_MODULE.format(path=str(lines)))
  values = {
    'lengths': _LENGTHS,
    'batch_size': _BATCH_SIZE,
    'vocab_size': _VOCAB_SIZE,
  }
  (folder / 't5x.gin').write_text(_T5X_GIN.format(**values))
  (folder / 'ours.gin').write_text(_OUR_GIN.format(**values))
  mowe = [sys.executable, '-m', 'mowe.cli.main', 'cache-task']
  subprocess.run(
    [*mowe, str(folder / 'startup'), str(questions), '--kind=questions']
    + ['--vocabulary=bytes', '--prompt={question}'],
    check=True,
  )


def our_command(model_dir: str) -> list[str]:
  return [sys.executable, '-m', 'mowe.cli.main', 'train'] + [
    '--gin_file=ours.gin',
    f'--gin.MODEL_DIR={model_dir!r}',
  ]


def t5x_command(model_dir: str) -> list[str]:
  return [sys.executable, '-m', 't5x.train'] + [
    '--gin_file=t5x.gin',
    f'--gin.MODEL_DIR={model_dir!r}',
  ]


class Times(NamedTuple):
  """The seconds of one process."""

  first_step: float
  end: float
  cpu: float


def time_process(
  command: Sequence[str],
  until: str,
  folder: pathlib.Path,
  environment: Mapping[str, str],
) -> Times:
  """Times a process: until a line contains `until`, until its end, and on CPU.

  Raises:
    RuntimeError: the process fails, or never says so.
  """
  start = time.perf_counter()
  process = subprocess.Popen(
    command,
    cwd=folder,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  said, lines = None, []
  for line in process.stdout:
    lines.append(line)
    if said is None and until in line:
      said = time.perf_counter() - start
  _, status, usage = os.wait4(process.pid, 0)
  ended = time.perf_counter() - start
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode or said is None:
    raise RuntimeError(
      f'{" ".join(command)} must succeed and say {until!r}, but ended with '
      f'{process.returncode}:\n{"".join(lines[-15:])}\n'
      'If a package is missing, see the head of this file.'
    )
  return Times(said, ended, usage.ru_utime + usage.ru_stime)


def take_turns(
  folder: pathlib.Path, t5x_path: str, repeats: int, compilation_cache: bool
) -> dict[str, list[Times]]:
  """Runs the processes of both in turn."""
  shared = dict(os.environ, TF_CPP_MIN_LOG_LEVEL='3', PYTHONUNBUFFERED='1')
  if compilation_cache:
    shared['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'compiled')
    shared['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  else:
    shared['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
  paths = [os.path.abspath(path) for path in t5x_path.split(os.pathsep)]
  paths.append(str(folder))
  of_t5x = shared | {'PYTHONPATH': os.pathsep.join(paths)}
  contenders = {
    'ours': (our_command, 'step 1', shared),
    't5x': (t5x_command, 'END Train loop.', of_t5x),
  }
  times = {name: [] for name in contenders}
  for round_number in range(repeats + 1):
    names = list(contenders)
    # Every other round is reversed, so that nobody always follows the same one.
    for name in names if round_number % 2 else reversed(names):
      command, until, environment = contenders[name]
      model_dir = str(folder / f'{name}_{round_number}')
      found = time_process(command(model_dir), until, folder, environment)
      # The first round brings the files of both into memory.
      if round_number:
        times[name].append(found)
  return times


def report_times(times: Mapping[str, list[Times]]) -> None:
  """Prints medians, extremes and the ratio."""
  medians = {}
  for name, processes in times.items():
    said = {}
    for field in Times._fields:
      values = [getattr(one, field) for one in processes]
      medians[name, field] = statistics.median(values)
      said[field] = (
        f'{medians[name, field]:.2f} ({min(values):.2f} to {max(values):.2f})'
      )
    print(
      f'{name}, {len(processes)} processes: first step done after '
      f'{said["first_step"]} s, ended after {said["end"]} s, '
      f'CPU {said["cpu"]} s'
    )
  ratios = {
    field: medians['ours', field] / medians['t5x', field]
    for field in Times._fields
  }
  print(f'cpu_ratio={ratios["cpu"]:.3f}')
  print(f'ratio={ratios["first_step"]:.3f}')


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--t5x_path', required=True)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--compilation_cache', action='store_true')
  arguments = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    prepare(folder)
    times = take_turns(
      folder,
      arguments.t5x_path,
      arguments.repeats,
      arguments.compilation_cache,
    )
  report_times(times)


if __name__ == '__main__':
  main()
