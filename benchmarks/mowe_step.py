"""Times a training step of MoWE against dense T5 of equal FLOPs.

  python -m benchmarks.mowe_step

Both models have the same sizes; in the dense one the layers that word experts
replace are as wide as one expert, so that a token costs the same. Words follow
Zipf's law; the most frequent ones are skipped. Plans are made beforehand, as
the prefetch thread does during training. Steps of both take turns, each on
several batches. The last lines are the memory of the compiled step: temporaries
must not grow with the number of experts; only the tables may.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import dense_step
from mowe.layers import feed_forward
from mowe.layers.memory import word_experts
from mowe.models.t5 import t5, t5_config
from mowe.training import train_state, training_step
from mowe.training.optimization import optimizers, row_optimizers
from mowe.words.plans import batch_plans, step_plans

_LEARNING_RATE = 1e-3
_NUM_WORDS = 1_000_000
_NUM_BATCHES = 8


class WordIds:
  """Draws words by Zipf's law and gives them to experts by hash.

  Args:
    num_experts: experts; many words share one.
    num_skipped: the most frequent words, which have no expert.
  """

  def __init__(self, num_experts: int, num_skipped: int):
    weights = 1.0 / np.arange(1, _NUM_WORDS + 1)
    self._cumulative = np.cumsum(weights) / weights.sum()
    self._experts = np.random.default_rng(1).integers(
      0, num_experts, _NUM_WORDS, np.int32
    )
    self._experts[:num_skipped] = num_experts

  def draw(self, rng: np.random.Generator, shape: tuple) -> np.ndarray:
    """Returns routing ids <int32>[shape]."""
    return self._experts[np.searchsorted(self._cumulative, rng.random(shape))]


def make_model(arguments: argparse.Namespace, num_experts: int) -> t5.T5:
  """Returns MoWE with so many experts, or the dense model for 0."""

  def make_layer(**given):
    width = arguments.expert_dim
    if not num_experts:
      return feed_forward.DenseFeedForward(mlp_dim=width, **given)
    return word_experts.MoweLayer(num_experts, width, **given)

  config = t5_config.T5Config(
    sparse_feed_forward=make_layer,
    sparse_encoder_layers=tuple(arguments.sparse_encoder_layers),
    sparse_decoder_layers=tuple(arguments.sparse_decoder_layers),
    **dense_step.sizes(arguments),
  )
  return t5.T5(config)


def make_steps(
  arguments: argparse.Namespace, num_experts: int
) -> tuple[Callable, Callable]:
  """Returns (function from a key to a fresh state, train step)."""
  model = make_model(arguments, num_experts)
  optimizer = optimizers.Adafactor(_LEARNING_RATE).build(None)
  row_optimizer = None
  if num_experts:
    row_optimizer = row_optimizers.RowAdafactor(_LEARNING_RATE)
  create = lambda key: train_state.create(
    model, key, optimizer=optimizer, row_optimizer=row_optimizer
  )
  function = training_step.make_train_step(
    model,
    optimizer=optimizer,
    row_optimizer=row_optimizer,
    loss=training_step.LossConfig(),
    seed=0,
  )
  return create, function


def make_plans(
  arguments: argparse.Namespace, num_experts: int
) -> list[step_plans.StepPlan]:
  """Returns plans of several batches in the sizes of the first profile."""
  rng = np.random.default_rng(0)
  words = WordIds(num_experts, arguments.num_skipped)

  def draw():
    shape = lambda length: (arguments.batch_size, length)
    return {
      'encoder': words.draw(rng, shape(arguments.inputs_length)),
      'decoder': words.draw(rng, shape(arguments.targets_length)),
    }

  trial = [draw() for _ in range(16)]
  ladder = batch_plans.profile_ladder(trial, num_experts)
  planner = batch_plans.Planner(ladder, num_experts)
  made = [planner(draw()) for _ in range(_NUM_BATCHES)]
  size = lambda made: [a.shape for a in jax.tree.leaves(made)]
  same = [one for one in made if size(one) == size(made[0])]
  return [step_plans.StepPlan(one, {}) for one in same]


class Turns:
  """A compiled step that takes another plan each time it is called."""

  def __init__(self, compiled: Callable, made: list):
    self._compiled, self._made, self._number = compiled, made, 0

  def __call__(self, state, frozen, batch):
    self._number += 1
    plan = self._made[self._number % len(self._made)]
    return self._compiled(state, frozen, batch, plan)


def steps_for(arguments: argparse.Namespace) -> dict[str, tuple]:
  """Returns the step, state and further arguments of both models by name."""
  batch = dense_step.make_batch(
    arguments.batch_size,
    arguments.inputs_length,
    arguments.targets_length,
    arguments.vocab_size,
  )
  start = time.perf_counter()
  made = make_plans(arguments, arguments.num_experts)
  num_present = lambda plan: sum(
    (experts < arguments.num_experts).sum()
    for experts in plan.experts.updates.experts
  )
  sources = made[0].encoder.classes.sources
  slots = sum(source.size for source in sources)
  print(
    f'plans: {np.mean([num_present(p) for p in made]):.0f} experts present, '
    f'{len(sources)} size classes and {slots} slots for '
    f'{made[0].encoder.slots.size} tokens of the encoder; '
    f'{time.perf_counter() - start:.1f} s for trial batches and plans'
  )
  steps = {}
  for name, num_experts in (('mowe', arguments.num_experts), ('dense', 0)):
    create, function = make_steps(arguments, num_experts)
    state = jax.jit(create)(jax.random.key(0))
    ours = jax.tree.map(jnp.asarray, made) if num_experts else [None]
    if not num_experts:  # Dense layers ignore the ids of tokens.
      batch = batch | {
        f'{stream}_routing_ids': batch[f'{stream}_input_tokens']
        for stream in ('encoder', 'decoder')
      }
    compiled = dense_step.compile_step(
      name, function, state, {}, batch, ours[0]
    )
    steps[name] = (Turns(compiled, ours), state, ({}, batch))
  return steps


def report_memory(arguments: argparse.Namespace) -> None:
  """Prints what compiled steps need at several numbers of experts.

  All are given the plan of the fewest experts, so that only the tables grow.
  """
  numbers = [arguments.num_experts * factor for factor in (1, 4, 16)]
  made = make_plans(arguments, numbers[0])[0]
  batch = dense_step.make_batch(
    arguments.batch_size,
    arguments.inputs_length,
    arguments.targets_length,
    arguments.vocab_size,
  )
  for num_experts in numbers:
    create, function = make_steps(arguments, num_experts)
    state = jax.eval_shape(create, jax.random.key(0))
    tables = sum(x.size * 4 for x in jax.tree.leaves(state.tables))
    lowered = jax.jit(function, donate_argnums=(0,)).lower(
      state, {}, batch, made
    )
    memory = lowered.compile().memory_analysis()
    print(
      f'{num_experts} experts: tables {tables / 2**20:.0f} MiB, '
      f'temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB, '
      'not aliased '
      f'{(memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**20:.1f}'
      ' MiB'
    )


def make_parser() -> argparse.ArgumentParser:
  """Returns a parser of the settings of all models but the number of experts."""
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument('--num_skipped', type=int, default=16)
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--inputs_length', type=int, default=256)
  parser.add_argument('--targets_length', type=int, default=64)
  parser.add_argument('--vocab_size', type=int, default=32_128)
  parser.add_argument('--emb_dim', type=int, default=256)
  parser.add_argument('--num_heads', type=int, default=4)
  parser.add_argument('--head_dim', type=int, default=64)
  parser.add_argument('--mlp_dim', type=int, default=512)
  parser.add_argument('--expert_dim', type=int, default=64)
  parser.add_argument('--num_layers', type=int, default=4)
  parser.add_argument(
    '--sparse_encoder_layers', type=int, nargs='*', default=[1]
  )
  parser.add_argument(
    '--sparse_decoder_layers', type=int, nargs='*', default=[1]
  )
  parser.add_argument('--dropout_rate', type=float, default=0.1)
  parser.add_argument('--repeats', type=int, default=20)
  return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Returns the settings."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], parents=[make_parser()]
  )
  parser.add_argument('--num_experts', type=int, default=8192)
  parser.add_argument('--no_memory', action='store_true')
  return parser.parse_args(argv)


def main() -> None:
  arguments = parse()
  times = dense_step.take_turns(steps_for(arguments), arguments.repeats)
  dense_step.report_times(times)
  if not arguments.no_memory:
    report_memory(arguments)
  median = {name: statistics.median(values) for name, values in times.items()}
  print(f'ratio={median["mowe"] / median["dense"]:.3f}')


if __name__ == '__main__':
  main()
