"""Times a training step of dense T5 against T5X's minimal network.

  python -m benchmarks.dense_step --t5x_path=t5x:airio:jestimator

Both take the same batch, sizes and dropout rate, compute in float32 and have
the state donated. T5X's step is made of its own `network.Transformer`, the loss
of `EncoderDecoderModel`, and `Adafactor`. Steps of both take turns, so that
other work of the machine slows down both. The path names clones of t5x and of
the packages that it imports (airio, jestimator).
"""

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mowe.models.t5 import t5, t5_config
from mowe.training import train_state, training_step
from mowe.training.optimization import optimizers

_LEARNING_RATE = 1e-3
_Z_LOSS = 1e-4
# The name of a contender, its compiled step, and the arguments after the state.
Contender = tuple[str, Callable, object, tuple]


def make_batch(
  batch_size: int, inputs: int, targets: int, vocab_size: int
) -> dict[str, jax.Array]:
  """Returns a batch of random tokens without padding."""
  rng = np.random.default_rng(0)
  draw = lambda length: rng.integers(
    1, vocab_size, (batch_size, length), np.int32
  )
  shifted = draw(targets)
  return {
    'encoder_input_tokens': jnp.asarray(draw(inputs)),
    'decoder_input_tokens': jnp.asarray(np.roll(shifted, 1, axis=1)),
    'decoder_target_tokens': jnp.asarray(shifted),
    'decoder_loss_weights': jnp.ones((batch_size, targets), jnp.float32),
  }


def compile_step(name: str, function: Callable, *arguments: object) -> Callable:
  """Compiles with the first argument donated, and prints what is known."""
  start = time.perf_counter()
  lowered = jax.jit(function, donate_argnums=(0,)).lower(*arguments)
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  cost = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  print(
    f'{name}: compiled in {seconds:.1f} s, '
    f'{cost.get("flops", float("nan")) / 1e9:.1f} GFLOP, '
    f'{memory.temp_size_in_bytes / 2**20:.0f} MiB of temporaries'
  )
  return compiled


def take_turns(
  steps: dict[str, tuple[Callable, object, tuple]], repeats: int
) -> dict[str, list[float]]:
  """Returns the seconds of each repeat of each step, all steps in every round.

  Args:
    steps: name to (compiled step, state, further arguments); the step returns
      the next state first.
    repeats: rounds that are timed, after two that are not.
  """
  states = {name: state for name, (_, state, _) in steps.items()}
  times = {name: [] for name in steps}
  rng = np.random.default_rng(0)
  for round_number in range(repeats + 2):
    # The order is random, so that nobody always follows the same one.
    for name in rng.permutation(list(steps)).tolist():
      function, _, others = steps[name]
      start = time.perf_counter()
      states[name], metrics = function(states[name], *others)
      jax.block_until_ready((states[name], metrics))
      if round_number >= 2:
        times[name].append(time.perf_counter() - start)
    print(f'\rround {round_number + 1} of {repeats + 2}', end='', flush=True)
  print()
  return times


def report_times(times: dict[str, list[float]]) -> None:
  """Prints the median and the extremes of each name."""
  for name, values in times.items():
    print(
      f'{name}: median {1e3 * statistics.median(values):.1f} ms, '
      f'shortest {1e3 * min(values):.1f}, longest {1e3 * max(values):.1f}, '
      f'{len(values)} steps'
    )


def sizes(arguments: argparse.Namespace) -> dict:
  """Returns the settings that both configs share."""
  return {
    'vocab_size': arguments.vocab_size,
    'emb_dim': arguments.emb_dim,
    'num_heads': arguments.num_heads,
    'head_dim': arguments.head_dim,
    'mlp_dim': arguments.mlp_dim,
    'num_encoder_layers': arguments.num_layers,
    'num_decoder_layers': arguments.num_layers,
    'mlp_activations': ('gelu', 'linear'),
    'dropout_rate': arguments.dropout_rate,
  }


def our_step(arguments, batch):
  """Returns (compiled step, state, further arguments) of mowe."""
  model = t5.T5(t5_config.T5Config(**sizes(arguments)))
  optimizer = optimizers.Adafactor(_LEARNING_RATE).build(None)
  create = lambda key: train_state.create(
    model, key, optimizer=optimizer, row_optimizer=None
  )
  state = jax.jit(create)(jax.random.key(0))
  function = training_step.make_train_step(
    model,
    optimizer=optimizer,
    row_optimizer=None,
    loss=training_step.LossConfig(z_loss=_Z_LOSS),
    seed=0,
  )
  others = ({}, batch, None)
  return compile_step('ours', function, state, *others), state, others


def t5x_step(arguments, batch):
  """Returns (compiled step, state, further arguments) of T5X."""
  network = importlib.import_module('t5x.examples.t5.network')
  models = importlib.import_module('t5x.models')
  adafactor = importlib.import_module('t5x.adafactor')
  config = network.T5Config(dtype=jnp.float32, **sizes(arguments))
  optimizer = adafactor.Adafactor(
    learning_rate=_LEARNING_RATE,
    decay_rate=0.8,
    step_offset=0,
    logical_factor_rules=adafactor.standard_logical_factor_rules(),
  )
  model = models.EncoderDecoderModel(
    network.Transformer(config),
    input_vocabulary=None,
    output_vocabulary=None,
    optimizer_def=optimizer,
    z_loss=_Z_LOSS,
    loss_normalizing_factor='NUM_REAL_TARGET_TOKENS',
  )
  shapes = {name: array.shape for name, array in batch.items()}

  def initial_params(key):
    variables = model.get_initial_variables(key, shapes)
    return flax.core.unfreeze(variables['params'])

  params = jax.jit(initial_params)(jax.random.key(0))
  state = (params, optimizer.init_state(params))

  def function(state, batch):
    params, optimizer_state = state
    key = jax.random.fold_in(jax.random.key(0), optimizer_state.step)
    gradient = jax.grad(model.loss_fn, has_aux=True)
    grads, metrics = gradient(params, batch, key)
    state = optimizer.apply_gradient(
      optimizer.hyper_params, params, optimizer_state, grads
    )
    return state, metrics

  return compile_step('t5x', function, state, batch), state, (batch,)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--t5x_path', required=True)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--inputs_length', type=int, default=128)
  parser.add_argument('--targets_length', type=int, default=32)
  parser.add_argument('--vocab_size', type=int, default=32_128)
  parser.add_argument('--emb_dim', type=int, default=512)
  parser.add_argument('--num_heads', type=int, default=6)
  parser.add_argument('--head_dim', type=int, default=64)
  parser.add_argument('--mlp_dim', type=int, default=1024)
  parser.add_argument('--num_layers', type=int, default=8)
  parser.add_argument('--dropout_rate', type=float, default=0.1)
  parser.add_argument('--repeats', type=int, default=20)
  arguments = parser.parse_args(argv)
  sys.path[:0] = [
    os.path.abspath(path) for path in arguments.t5x_path.split(os.pathsep)
  ]
  batch = make_batch(
    arguments.batch_size,
    arguments.inputs_length,
    arguments.targets_length,
    arguments.vocab_size,
  )
  steps = {
    'ours': our_step(arguments, batch),
    't5x': t5x_step(arguments, batch),
  }
  times = take_turns(steps, arguments.repeats)
  report_times(times)
  median = {name: statistics.median(values) for name, values in times.items()}
  print(f'ratio={median["ours"] / median["t5x"]:.3f}')


if __name__ == '__main__':
  main()
