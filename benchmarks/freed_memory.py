"""Times `mowe train` on a CPU with and without the memory that it keeps.

  python -m benchmarks.freed_memory

Both train the same T5 on the same generated examples, in processes that take
turns. One of them has an environment in which a setting of the C library, here
its default, is the user's own, so that it is left alone. The time of a step is
that of the last log period, as the run itself measures it. The last line is the
median with kept memory relative to that without.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

_GIN = """
from __gin__ import dynamic_registration
from mowe.models.t5 import t5_config
include 'gin_configs/models/t5_base.gin'
include 'gin_configs/optimizers/adafactor.gin'
include 'gin_configs/runs/pretrain.gin'

VOCABULARY_PATH = 'bytes'
VOCAB_SIZE = 384
t5_config.T5Config:
  emb_dim = {width}
  num_heads = {heads}
  head_dim = 32
  num_encoder_layers = 2
  num_decoder_layers = 2
  mlp_dim = {mlp}
CACHE_DIR = '.'
MIXTURE_OR_TASK_NAME = 'sums'
TASK_FEATURE_LENGTHS = {{'inputs': 64, 'targets': 32}}
BATCH_SIZE = {batch_size}
"""
# The default of glibc. Others, such as MALLOC_MMAP_MAX_, would also turn off that
# it learns how large the pieces are that a process frees.
_AS_IT_IS = {'MALLOC_PERTURB_': '0'}


def prepare(folder: pathlib.Path, width: int, batch_size: int) -> None:
  """Writes the token cache and the gin file."""
  questions = folder / 'questions.jsonl'
  questions.write_text(
    ''.join(
      json.dumps(
        {'question': f'How much is {n} plus {n}?', 'answers': [str(2 * n)]}
      )
      + '\n'
      for n in range(512)
    )
  )
  sizes = {
    'width': width,
    'heads': width // 32,
    'mlp': 2 * width,
    'batch_size': batch_size,
  }
  (folder / 'run.gin').write_text(_GIN.format(**sizes))
  subprocess.run(
    [sys.executable, '-m', 'mowe.cli.main', 'cache-task', str(folder / 'sums')]
    + [str(questions), '--kind=questions', '--vocabulary=bytes']
    + ['--prompt={question}'],
    check=True,
  )


def measure(
  folder: pathlib.Path, name: str, steps: int, environment: dict[str, str]
) -> dict[str, float]:
  """Trains in a process of its own; returns the last line of its speed."""
  subprocess.run(
    [sys.executable, '-m', 'mowe.cli.main', 'train', '--gin_file=run.gin']
    + [f'--gin.MODEL_DIR={name!r}', f'--gin.TRAIN_STEPS={steps}']
    + [f'--gin.LOG_PERIOD={steps // 2}'],
    cwd=folder,
    env={k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
    | {'JAX_PLATFORMS': 'cpu'}
    | environment,
    stdout=subprocess.DEVNULL,
    check=True,
  )
  lines = (folder / name / 'speed_metrics.jsonl').read_text().splitlines()
  return json.loads(lines[-1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--width', type=int, default=128)
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--steps', type=int, default=40)
  parser.add_argument('--repeats', type=int, default=3)
  arguments = parser.parse_args()
  seconds = {'kept': [], 'as it is': []}
  peaks = {name: [] for name in seconds}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    prepare(folder, arguments.width, arguments.batch_size)
    for number in range(arguments.repeats):
      for kind, environment in (('kept', {}), ('as it is', _AS_IT_IS)):
        found = measure(
          folder, f'{kind}_{number}', arguments.steps, environment
        )
        seconds[kind].append(found['speed/step_seconds'])
        peaks[kind].append(found['memory/process_peak_gib'])
  for kind, values in seconds.items():
    print(
      f'{kind}: step {statistics.median(values) * 1000:.1f} ms '
      f'({min(values) * 1000:.1f} to {max(values) * 1000:.1f}), '
      f'peak {statistics.median(peaks[kind]):.2f} GiB'
    )
  medians = {k: statistics.median(v) for k, v in seconds.items()}
  print(f'ratio={medians["kept"] / medians["as it is"]:.3f}')


if __name__ == '__main__':
  main()
