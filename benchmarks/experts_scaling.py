"""Times a training step of MoWE with few and with very many experts.

  python -m benchmarks.experts_scaling
  python -m benchmarks.experts_scaling --dense_twin --experts 8192 65536 262144

The batches have the same words for every number of experts; with more experts,
fewer words share one, so that a batch meets more of them. Steps take turns. The
last line is the time with the most experts over that with the fewest. A million
experts of the default width have a table of 6 GiB, which is why they are
narrow.

With --dense_twin, each number of experts is compared with the same model whose
tables are ordinary parameters: gradients as large as the tables, updated by
optax. The last line is then the time of optax.adafactor with the most experts
over ours.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import dense_step, mowe_step
from mowe.models import parameters
from mowe.training import train_state, training_step

_LEARNING_RATE = 1e-3


def compile_for(
  arguments: argparse.Namespace,
  name: str,
  create: Callable,
  function: Callable,
  made: list,
) -> tuple:
  """Returns (step, state, further arguments) for plans on the device."""
  state = jax.jit(create)(jax.random.key(0))
  batch = dense_step.make_batch(
    arguments.batch_size,
    arguments.inputs_length,
    arguments.targets_length,
    arguments.vocab_size,
  )
  compiled = dense_step.compile_step(name, function, state, {}, batch, made[0])
  return mowe_step.Turns(compiled, made), state, ({}, batch)


def make_step(arguments: argparse.Namespace, num_experts: int) -> tuple:
  """Returns (step, state, further arguments); prints the sizes."""
  made = jax.tree.map(jnp.asarray, mowe_step.make_plans(arguments, num_experts))
  name = f'{num_experts} experts'
  made_step = compile_for(
    arguments, name, *mowe_step.make_steps(arguments, num_experts), made
  )
  tables = sum(leaf.nbytes for leaf in jax.tree.leaves(made_step[1].tables))
  present = sum(
    int((experts < num_experts).sum())
    for experts in made[0].experts.updates.experts
  )
  print(f'{name}: {tables / 2**20:.0f} MiB of tables, {present} in a batch')
  return made_step


def make_dense_twin(
  arguments: argparse.Namespace,
  num_experts: int,
  name: str,
  optimizer: optax.GradientTransformation,
) -> tuple:
  """Returns what `make_step` does, for tables that are ordinary parameters."""
  model = mowe_step.make_model(arguments, num_experts)

  def create(key: jax.Array) -> Any:
    drawn = train_state.create(
      model, key, optimizer=optax.identity(), row_optimizer=None
    )
    return train_state.begin(
      parameters.merge_tables(drawn.params, drawn.tables),
      {},
      optimizer=optimizer,
      row_optimizer=None,
    )

  function = training_step.make_train_step(
    model,
    optimizer=optimizer,
    row_optimizer=None,
    loss=training_step.LossConfig(),
    seed=0,
  )
  made = jax.tree.map(jnp.asarray, mowe_step.make_plans(arguments, num_experts))
  return compile_for(
    arguments, f'{num_experts} experts, {name}', create, function, made
  )


def compare_with_dense(
  arguments: argparse.Namespace, num_experts: int
) -> float:
  """Prints the times of all; returns that of optax.adafactor over ours."""
  twins = {
    'optax.adafactor': optax.adafactor(_LEARNING_RATE),
    'optax.adam': optax.adam(_LEARNING_RATE),
  }
  steps = {'rows': make_step(arguments, num_experts)}
  for name, optimizer in twins.items():
    steps[name] = make_dense_twin(arguments, num_experts, name, optimizer)
  times = dense_step.take_turns(steps, arguments.repeats)
  dense_step.report_times(times)
  median = {name: statistics.median(values) for name, values in times.items()}
  return median['optax.adafactor'] / median['rows']


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Returns the settings: those of mowe_step, but narrow."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], parents=[mowe_step.make_parser()]
  )
  parser.add_argument(
    '--experts', type=int, nargs='+', default=[8192, 131_072, 1_048_576]
  )
  parser.add_argument('--dense_twin', action='store_true')
  parser.set_defaults(
    vocab_size=8192, emb_dim=64, head_dim=16, mlp_dim=128, expert_dim=8
  )
  return parser.parse_args(argv)


def main() -> None:
  arguments = parse()
  if arguments.dense_twin:
    # They run one after the other, as their tables do not fit memory together.
    ratios = [compare_with_dense(arguments, n) for n in arguments.experts]
    print(f'ratio={ratios[-1]:.3f}')
    return
  steps = {number: make_step(arguments, number) for number in arguments.experts}
  times = dense_step.take_turns(steps, arguments.repeats)
  dense_step.report_times(times)
  median = {name: statistics.median(values) for name, values in times.items()}
  fewest, most = min(median), max(median)
  print(f'ratio={median[most] / median[fewest]:.3f}')


if __name__ == '__main__':
  main()
