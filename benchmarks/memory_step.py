"""Times a step of T5 with a memory against dense T5 of equal FLOPs.

  python -m benchmarks.memory_step --memory engram
  python -m benchmarks.memory_step --memory stem

Engram stands before the attention of one block of encoder and decoder; STEM
takes the place of a projection in one of four blocks of both. The feed-forwards
of the dense model are as wide as makes a token cost the same. Both have the
same batches, of words by Zipf's law, and their tables on the device. The runs
take turns of several steps, the first of which is not timed. The last line has
the median of the model with the memory relative to that of the dense one.
"""

import argparse
import functools
import pathlib
import tempfile

from benchmarks import memory_rows, memory_runs
from mowe.layers.memory.payloads import diagonal
from mowe.models import token_memories
from mowe.models.families import costs
from mowe.models.t5 import t5_config
from mowe.stores import expert_stores
from mowe.training.performance import kept_memory
from mowe.words.addresses import piece_address


def _engram(arguments):
  return memory_rows.make_memory(arguments.vocab_size, arguments.rows, 64)


def _stem(arguments):
  # As many FLOPs as the feed-forward that it replaces: 4 * 3 = 6 * 2.
  blocks = tuple(range(2, arguments.num_layers, 4))
  return token_memories.Memory(
    'stem',
    piece_address.Pieces(arguments.vocab_size),
    functools.partial(diagonal.Diagonal, 3 * arguments.emb_dim),
    token_memories.InsteadOfFeedForward(blocks, blocks),
  )


_MEMORIES = {'engram': _engram, 'stem': _stem}


def _flops(arguments, config) -> int:
  return costs.model_costs(config).flops_per_example(
    arguments.inputs_length, arguments.targets_length
  )


def dense_twin(
  arguments: argparse.Namespace, config: t5_config.T5Config
) -> t5_config.T5Config:
  """Returns a dense T5 that costs as many FLOPs as a config with a memory."""
  narrow, wide = (
    memory_runs.make_config(arguments, (), mlp_dim) for mlp_dim in (256, 512)
  )
  # FLOPs grow by the same with each unit of the feed-forwards.
  least, more = _flops(arguments, narrow), _flops(arguments, wide)
  units = 256 * (_flops(arguments, config) - least) / (more - least)
  return memory_runs.make_config(arguments, (), 256 + round(units))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--memory', choices=_MEMORIES, default='engram')
  parser.add_argument('--rows', type=int, default=2**20)
  memory_runs.add_sizes(parser)
  parser.add_argument('--rounds', type=int, default=6)
  parser.add_argument('--steps_each', type=int, default=5)
  arguments = parser.parse_args()
  # As `mowe train` does.
  kept_memory.keep_on_cpu()
  memory = _MEMORIES[arguments.memory](arguments)
  with_memory = memory_runs.make_config(arguments, (memory,))
  dense = dense_twin(arguments, with_memory)
  print(
    f'FLOPs of an example: {_flops(arguments, dense):,} dense, '
    f'{_flops(arguments, with_memory):,} with a table of '
    f'{memory.num_rows:,} rows; feed-forwards {dense.mlp_dim:,} and '
    f'{with_memory.mlp_dim:,} wide'
  )
  with tempfile.TemporaryDirectory() as folder:
    runs = []
    for name, config in (('dense', dense), ('memory', with_memory)):
      path = pathlib.Path(folder) / name
      path.mkdir()
      runs.append(
        memory_runs.Run(
          config,
          memory_runs.Batches(arguments),
          expert_stores.DeviceStore(),
          path,
        )
      )
    memory_runs.take_turns(runs, arguments.rounds, arguments.steps_each)
    dense_median = runs[0].report('dense', arguments.steps_each)
    memory_median = runs[1].report(arguments.memory, arguments.steps_each)
    for run in runs:
      run.close()
  print(f'ratio={memory_median / dense_median:.3f}')


if __name__ == '__main__':
  main()
