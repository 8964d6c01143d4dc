"""Times training steps of language models that gin files name, taking turns.

  python -m benchmarks.language_models gin_configs/models/xl_mini.gin \
    gin_configs/models/xl_sigma_moe_mini.gin

All models get the same rows of random tokens and AdamW; the vocabulary is that
of bytes, as the files' own is not needed for random tokens. Ratios are those of
the first model's time to the others'.
"""

import argparse
import copy
import dataclasses
import pathlib
import statistics

import jax
import numpy as np

from benchmarks import dense_step
from mowe.commands.gin_files import gin_config
from mowe.models import initialization
from mowe.models.families import costs, families
from mowe.training import router_training, train_state, training_step
from mowe.training.optimization import optimizers


def make_step(file: str, batch_size: int, length: int) -> tuple:
  """Returns (compiled step, state, further arguments) of a file's model."""
  gin_config.parse([file], ["VOCABULARY_PATH = 'bytes'"])
  config = copy.deepcopy(gin_config.macro('MODEL'))
  loss = gin_config.call(training_step.LossConfig)
  if gin_config.configures(router_training.RouterLossConfig):
    router = gin_config.call(router_training.RouterLossConfig)
    loss = dataclasses.replace(loss, router=router)
  model = families.build(config)
  optimizer = optimizers.ClipByGlobalNorm(optimizers.AdamW(1e-3), 1.0).build(
    None
  )
  params = initialization.initial_parameters(model, jax.random.key(0))
  memory = lambda: config.initial_memory(batch_size)
  state = train_state.begin(
    params,
    {},
    optimizer=optimizer,
    row_optimizer=None,
    make_memory=memory if config.memory_length else None,
  )
  function = training_step.make_train_step(
    model, optimizer=optimizer, row_optimizer=None, loss=loss, seed=0
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, config.vocab_size, (batch_size, length), np.int32)
  batch = {
    'decoder_input_tokens': np.roll(tokens, 1, axis=1),
    'decoder_target_tokens': tokens,
    'decoder_loss_weights': np.ones(tokens.shape, np.float32),
  }
  others = ({}, jax.device_put(batch), None)
  flops = costs.model_costs(config).flops_per_target_token
  name = pathlib.Path(file).stem
  print(f'{name}: {flops / 1e6:.2f} MFLOP per token forward, by the formula')
  return dense_step.compile_step(name, function, state, *others), state, others


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('files', nargs='+')
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--length', type=int, default=128)
  parser.add_argument('--repeats', type=int, default=10)
  arguments = parser.parse_args()
  steps = {
    pathlib.Path(file).stem: make_step(
      file, arguments.batch_size, arguments.length
    )
    for file in arguments.files
  }
  times = dense_step.take_turns(steps, arguments.repeats)
  dense_step.report_times(times)
  tokens = arguments.batch_size * arguments.length
  medians = {name: statistics.median(values) for name, values in times.items()}
  first = next(iter(medians.values()))
  for name, seconds in medians.items():
    print(f'{name}: {tokens / seconds:,.0f} tokens/s')
  ratios = (f'{name}={s / first:.3f}' for name, s in medians.items())
  print(' '.join(ratios))


if __name__ == '__main__':
  main()
