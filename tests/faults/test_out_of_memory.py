"""Too little memory ends a run with a sentence, and its folder is free then.

Also tests `out_of_memory`.
"""

import subprocess
import sys

import pytest
from jax import numpy as jnp

from mowe.commands import out_of_memory
from mowe.words import writer_locks


@pytest.mark.parametrize(
  'error, size',
  [
    (
      RuntimeError(
        'RESOURCE_EXHAUSTED: Out of memory allocating 12800000000 bytes.'
      ),
      '12.80 GB',
    ),
    (
      RuntimeError('RESOURCE_EXHAUSTED: Failed to allocate 3.5GiB on device 0'),
      '3.5 GiB',
    ),
    (MemoryError('std::bad_alloc'), 'more of it'),
  ],
)
def test_the_sentence_has_the_size_and_what_to_do(error, size):
  text = out_of_memory.explanation(error)
  assert f'but allocating {size} failed ({error}). ' in text
  assert ' In training, take a smaller BATCH_SIZE' in text


def test_the_sentence_has_the_largest_arrays():
  arrays = [jnp.zeros((13, 1_000_000)) for _ in range(2)]
  arrays.append(jnp.zeros((14, 1_000_001), jnp.int32))
  text = out_of_memory.explanation(MemoryError('std::bad_alloc'))
  assert (
    'The largest arrays there were 1 of int32[14, 1000001] with 0.06 GB on '
    'each device, 2 of float32[13, 1000000] with 0.05 GB on each device. In '
  ) in text
  del arrays


def test_other_errors_are_not_explained():
  assert out_of_memory.explanation(RuntimeError('INTERNAL: x')) is None


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from mowe.cli import main
sys.exit(main.main())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='needs limits of memory')
def test_a_run_without_memory_says_so(world, tmp_path):
  folder = tmp_path / 'run'
  bindings = {
    'VOCABULARY_PATH': world.vocabulary_path,
    'VOCAB_SIZE': 50_000_000,
    'CACHE_DIR': world.cache_dir,
    'MIXTURE_OR_TASK_NAME': 'text',
    'MODEL_DIR': str(folder),
    'TASK_FEATURE_LENGTHS': {'inputs': 64, 'targets': 32},
    'BATCH_SIZE': 8,
    'TRAIN_STEPS': 3,
  }
  done = subprocess.run(
    [sys.executable, '-c', _LIMITED, 'train']
    + ['--gin_file=gin_configs/models/t5_tiny.gin']
    + ['--gin_file=gin_configs/optimizers/adafactor.gin']
    + ['--gin_file=gin_configs/runs/pretrain.gin']
    + [f'--gin.{name}={value!r}' for name, value in bindings.items()],
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 1, done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith('mowe: The memory must hold'), done.stderr
  assert 'Traceback' not in done.stderr
  with writer_locks.of_folder(folder):
    pass
