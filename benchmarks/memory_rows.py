"""Times a step with a large memory outside of the device against a small one.

  python -m benchmarks.memory_rows
  python -m benchmarks.memory_rows --rows 67108864 --store disk

The model is a T5 with an Engram memory before the attention of one block of
encoder and decoder. One run has a table of 64K rows on the device, the other
one of many more rows in host memory or on disk; both have the same batches, of
words by Zipf's law. The runs take turns of several steps, the first of which is
not timed. The last line has the median of the large table relative to that of
the small one.
"""

import argparse
import functools
import pathlib
import tempfile

from benchmarks import memory_runs
from mowe.layers.memory.payloads import gated_vector
from mowe.models import token_memories
from mowe.stores import expert_stores
from mowe.training.performance import kept_memory
from mowe.words.addresses import hashed_ngrams, ngram_hashes

_SMALL = 2**16
_HEADS = 4
_STORES = {
  'host': expert_stores.HostStore(),
  'disk': expert_stores.DiskStore(),
}


def make_memory(
  vocab_size: int, rows: int, row_dim: int
) -> token_memories.Memory:
  """Returns an Engram memory of so many rows of these numbers."""
  # 2-grams and 3-grams have as many slots each.
  of_slot = rows // (2 * _HEADS) - 128
  (hash_,) = ngram_hashes.engram_hashes(vocab_size, [of_slot] * 2, _HEADS)
  return token_memories.Memory(
    'engram',
    hashed_ngrams.HashedNGrams(hash_),
    functools.partial(
      gated_vector.GatedVector,
      2 * _HEADS * row_dim,
      starts_as_identity=False,
    ),
    token_memories.BeforeAttention((1,), (1,)),
    shares_rows=True,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rows', type=int, default=2**24)
  parser.add_argument('--store', choices=_STORES, default='host')
  parser.add_argument('--row_dim', type=int, default=64)
  memory_runs.add_sizes(parser)
  parser.add_argument('--rounds', type=int, default=6)
  parser.add_argument('--steps_each', type=int, default=5)
  parser.add_argument('--folder', type=pathlib.Path)
  arguments = parser.parse_args()
  # As `mowe train` does.
  kept_memory.keep_on_cpu()
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    runs = {
      f'{_SMALL:,} rows on the device': (_SMALL, expert_stores.DeviceStore()),
      f'{arguments.rows:,} rows, {arguments.store}': (
        arguments.rows,
        _STORES[arguments.store],
      ),
    }
    opened = {}
    for number, (name, (rows, store)) in enumerate(runs.items()):
      path = pathlib.Path(folder) / str(number)
      path.mkdir()
      memory = make_memory(arguments.vocab_size, rows, arguments.row_dim)
      opened[name] = memory_runs.Run(
        memory_runs.make_config(arguments, (memory,)),
        memory_runs.Batches(arguments),
        store,
        path,
      )
    memory_runs.take_turns(
      list(opened.values()), arguments.rounds, arguments.steps_each
    )
    small, large = (
      run.report(name, arguments.steps_each) for name, run in opened.items()
    )
    for run in opened.values():
      run.close()
  print(f'ratio={large / small:.3f}')


if __name__ == '__main__':
  main()
