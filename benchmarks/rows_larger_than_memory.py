"""Trains a memory on disk of which the rows that are met exceed the memory.

  python -m benchmarks.rows_larger_than_memory

The rows of the table, 128 million of 1,024 numbers, would be 550 GB; only those
that training meets are written. It prints steps, resident memory and the bytes
of the file from time to time, and saves a checkpoint in the end. The resident
memory must not grow with the file. The folder is deleted in the end.
"""

import argparse
import pathlib
import tempfile
import time

from benchmarks import larger_than_memory, memory_rows, memory_runs
from mowe.stores import expert_stores
from mowe.training.performance import kept_memory


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rows', type=int, default=2**27)
  parser.add_argument('--row_dim', type=int, default=1024)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--steps_each', type=int, default=20)
  memory_runs.add_sizes(parser)
  parser.add_argument('--folder', type=pathlib.Path)
  arguments = parser.parse_args()
  # As `mowe train` does.
  kept_memory.keep_on_cpu()
  memory = memory_rows.make_memory(
    arguments.vocab_size, arguments.rows, arguments.row_dim
  )
  row_bytes = 4 * arguments.row_dim
  print(f'A table of {memory.num_rows * row_bytes / 1e9:.1f} GB', flush=True)
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    run = memory_runs.Run(
      memory_runs.make_config(arguments, (memory,)),
      memory_runs.Batches(arguments),
      expert_stores.DiskStore(),
      pathlib.Path(folder),
    )
    resident = larger_than_memory.ResidentMemory()
    (file,) = pathlib.Path(folder).glob('*.rows')
    for first in range(0, arguments.steps, arguments.steps_each):
      run.train(min(arguments.steps_each, arguments.steps - first))
      print(
        f'{len(run.seconds)} steps: {file.stat().st_size / 1e9:.2f} GB of '
        f'rows, {resident.report()}',
        flush=True,
      )
    run.report('all steps', arguments.steps_each)
    start = time.perf_counter()
    run.save()
    print(f'saved in {time.perf_counter() - start:.1f} s, {resident.report()}')
    run.close()


if __name__ == '__main__':
  main()
