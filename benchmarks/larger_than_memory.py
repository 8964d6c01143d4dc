"""Trains experts on disk whose table is larger than the memory.

  python -m benchmarks.larger_than_memory --num_experts 131072

One process writes a fresh table, trains and saves a checkpoint; a second one
resumes it. Each prints its peak of resident memory, which must not depend on
the number of experts. The folder is deleted in the end; it needs the room of
the table and of what changes after a checkpoint.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence

from benchmarks import stores
from mowe.stores import expert_stores

# How many bytes of the disk must stay free.
_LEAST_FREE = 8 * 2**30


class ResidentMemory:
  """Samples the resident memory of this process (Linux)."""

  def __init__(self):
    self._samples: list[int] = []
    threading.Thread(target=self._sample, daemon=True).start()

  def _sample(self):
    while True:
      pages = pathlib.Path('/proc/self/statm').read_text().split()[1]
      self._samples.append(int(pages) * resource.getpagesize())
      time.sleep(0.2)

  def report(self) -> str:
    """Returns the median and the peak so far, in GB."""
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
      f'resident memory {statistics.median(self._samples) / 1e9:.2f} GB in the '
      f'median, {peak / 1e9:.2f} GB at its peak'
    )


def train(
  arguments: argparse.Namespace, folder: pathlib.Path, num_steps: int
) -> None:
  """Trains in a folder, and prints what it took."""
  memory = ResidentMemory()
  store = expert_stores.DiskStore(arguments.num_slots)
  run = stores.Run(arguments, store, folder)
  size = (folder / 'experts.0.rows').stat().st_size
  print(
    f'step {int(run.state.step)}: {size / 1e9:.1f} GB of experts are there '
    f'after {run.start_seconds:.1f} s; {memory.report()}',
    flush=True,
  )
  run.train(num_steps)
  # The first two steps compile.
  seconds, moves = run.seconds[2:], run.moves[2:]
  mean = lambda key: statistics.fmean(one[key] for one in moves)
  print(
    f'{num_steps} steps: {len(seconds) / sum(seconds):.3f} steps/s, median '
    f'{1e3 * statistics.median(seconds):.0f} ms; hit rate '
    f'{mean("experts/hit_rate"):.3f}, {mean("experts/moved_mb"):.0f} MB in and '
    f'out, waits {mean("experts/wait_ms"):.1f} ms, '
    f'{mean("experts/distinct"):.0f} experts in a batch; {memory.report()}',
    flush=True,
  )
  start = time.perf_counter()
  run.save()
  seconds = time.perf_counter() - start
  checkpoint = folder / f'checkpoint_{int(run.state.step)}'
  files = [path for path in checkpoint.rglob('*') if path.is_file()]
  print(
    f'checkpoint: {seconds:.1f} s, '
    f'{sum(path.stat().st_size for path in files) / 1e6:.1f} MB beside '
    f'{(folder / "experts.0.rows").stat().st_size / 1e9:.1f} GB of experts; '
    f'{memory.report()}',
    flush=True,
  )
  run.close()


def check_room(arguments: argparse.Namespace, folder: str) -> None:
  """Raises ValueError if the disk is too small."""
  numbers = 3 * arguments.emb_dim * arguments.expert_dim
  needed = 4 * numbers * arguments.num_experts * 5 // 4 + _LEAST_FREE
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise ValueError(
      f'{folder} must have {needed / 1e9:.0f} GB free, but has '
      f'{free / 1e9:.0f}. Give another --folder, or fewer experts.'
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Returns the settings."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], parents=[stores.make_parser()]
  )
  parser.add_argument('--num_experts', type=int, default=131_072)
  parser.add_argument('--steps', type=int, default=50)
  parser.add_argument('--resumed_steps', type=int, default=5)
  return parser.parse_args(argv)


def main() -> None:
  arguments = parse()
  check_room(arguments, arguments.folder)
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  numbers = 3 * arguments.emb_dim * arguments.expert_dim
  table = 4 * numbers * arguments.num_experts
  print(f'table {table / 1e9:.1f} GB, memory {memory / 1e9:.1f} GB', flush=True)
  spawn = multiprocessing.get_context('spawn')
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    for num_steps in (arguments.steps, arguments.resumed_steps):
      # Each part runs in a process of its own, so that it has its own peak.
      with concurrent.futures.ProcessPoolExecutor(1, spawn) as process:
        process.submit(
          train, arguments, pathlib.Path(folder), num_steps
        ).result()


if __name__ == '__main__':
  main()
