"""Times a training step of MoWE with few and with very many experts.

  python -m benchmarks.experts_scaling

The batches have the same words for every number of experts; with more experts,
fewer words share one, so that a batch meets more of them. Steps take turns. The
last line is the time with the most experts over that with the fewest. A million
experts of the default width have a table of 6 GiB, which is why they are narrow.
"""

import argparse
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks import dense_step, mowe_step


def make_step(arguments: argparse.Namespace, num_experts: int) -> tuple:
  """Returns (step, state, further arguments); prints the sizes."""
  made = mowe_step.make_plans(arguments, num_experts)
  create, function = mowe_step.make_steps(arguments, num_experts)
  state = jax.jit(create)(jax.random.key(0))
  batch = dense_step.make_batch(
    arguments.batch_size,
    arguments.inputs_length,
    arguments.targets_length,
    arguments.vocab_size,
  )
  made = jax.tree.map(jnp.asarray, made)
  name = f'{num_experts} experts'
  compiled = dense_step.compile_step(name, function, state, {}, batch, made[0])
  tables = sum(leaf.nbytes for leaf in jax.tree.leaves(state.tables))
  present = sum(
    int((experts < num_experts).sum()) for experts in made[0].updates.experts
  )
  print(f'{name}: {tables / 2**20:.0f} MiB of tables, {present} in a batch')
  return mowe_step.Turns(compiled, made), state, ({}, batch)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Returns the settings: those of mowe_step, but narrow."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], parents=[mowe_step.make_parser()]
  )
  parser.add_argument(
    '--experts', type=int, nargs='+', default=[8192, 131_072, 1_048_576]
  )
  parser.set_defaults(
    vocab_size=8192, emb_dim=64, head_dim=16, mlp_dim=128, expert_dim=8
  )
  return parser.parse_args(argv)


def main() -> None:
  arguments = parse()
  steps = {number: make_step(arguments, number) for number in arguments.experts}
  times = dense_step.take_turns(steps, arguments.repeats)
  dense_step.report_times(times)
  median = {name: statistics.median(values) for name, values in times.items()}
  fewest, most = min(median), max(median)
  print(f'ratio={median[most] / median[fewest]:.3f}')


if __name__ == '__main__':
  main()
