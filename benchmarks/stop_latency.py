"""Measures how many steps late a stop is, and what the limit behind it costs.

  python -m benchmarks.stop_latency

The host may hand two steps to the device beyond the one being done (see
`training/loop.py`). Each trial trains a small T5, sends this process SIGTERM at
a random moment, and counts the steps that are made after the one that was being
done. A stretch of steps is timed with the limit and without it, in turns. The
last line has the most steps of any trial, and the median ratio of both times.
"""

import argparse
import itertools
import os
import random
import signal
import statistics
import threading
import time

import jax
import numpy as np

from benchmarks import dense_step
from mowe.models.t5 import t5, t5_config
from mowe.training import loop, progress_lines, train_state, training_step
from mowe.training.optimization import optimizers

_MOST_AHEAD = 2


class _Trainer:
  """Trains a small T5, and knows how many steps the device has done."""

  def __init__(self, arguments: argparse.Namespace):
    self._losses = []
    self._model = t5.T5(
      t5_config.T5Config(
        vocab_size=1024,
        emb_dim=arguments.emb_dim,
        num_heads=4,
        head_dim=16,
        mlp_dim=2 * arguments.emb_dim,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.0,
      )
    )
    batch = dense_step.make_batch(arguments.batch_size, 64, 32, 1024)
    self._batch = {name: np.asarray(value) for name, value in batch.items()}
    self._optimizer = optimizers.AdamW(1e-3).build()
    train_step = training_step.make_train_step(
      self._model,
      optimizer=self._optimizer,
      row_optimizer=None,
      loss=training_step.LossConfig(),
      seed=0,
    )
    self._step = jax.jit(
      lambda state, batch: train_step(state, {}, batch, None),
      donate_argnums=0,
    )

  def run(self, total_steps: int, most_ahead: int | None) -> int:
    """Trains from fresh parameters; returns the steps that were made."""
    self._losses = []
    state = train_state.create(
      self._model,
      jax.random.key(0),
      optimizer=self._optimizer,
      row_optimizer=None,
    )
    with open(os.devnull, 'w') as nowhere:
      state = loop.run(
        state,
        train_step=self._one_step,
        batches=itertools.repeat((self._batch, None)),
        total_steps=total_steps,
        progress=progress_lines.Progress(total_steps, stream=nowhere),
        # This is the only other time at which the host waits.
        log_period=total_steps,
        most_ahead=most_ahead,
      )
    return int(jax.block_until_ready(state.step))

  def num_done(self) -> int:
    """Returns the steps of this run that the device has done."""
    return sum(loss.is_ready() for loss in list(self._losses))

  def _one_step(self, state, batch, plan):
    del plan
    state, metrics = self._step(state, batch)
    self._losses.append(metrics['loss'].total)
    return state, metrics


def _steps_late(trainer: _Trainer, seconds: float) -> int:
  being_done = []

  def stop():
    time.sleep(seconds)
    being_done.append(trainer.num_done() + 1)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=stop)
  thread.start()
  made = trainer.run(1000, _MOST_AHEAD)
  thread.join()
  return made - being_done[0]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--emb_dim', type=int, default=128)
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--trials', type=int, default=10)
  arguments = parser.parse_args()
  trainer = _Trainer(arguments)
  trainer.run(2, None)  # This compiles the step.

  ratios = []
  for number in range(arguments.rounds):
    seconds = {}
    order = [_MOST_AHEAD, None]
    for most_ahead in order if number % 2 else reversed(order):
      start = time.perf_counter()
      trainer.run(arguments.steps, most_ahead)
      seconds[most_ahead] = time.perf_counter() - start
    ratios.append(seconds[_MOST_AHEAD] / seconds[None])
    print(
      f'{arguments.steps} steps: {seconds[_MOST_AHEAD]:.2f} s with the limit, '
      f'{seconds[None]:.2f} s without'
    )
  step_time = seconds[None] / arguments.steps
  rng = random.Random(0)
  late = []
  for _ in range(arguments.trials):
    # The signal comes after the first steps, at any moment of a step.
    late.append(_steps_late(trainer, (5 + 10 * rng.random()) * step_time))
    print(f'the stop came {late[-1]} steps late')
  print(f'steps_late={max(late)} ratio={statistics.median(ratios):.3f}')


if __name__ == '__main__':
  main()
