"""Training runs of T5 with a memory, for benchmarks that time their steps."""

import argparse
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mowe.model_folders import initial_state
from mowe.models import token_memories
from mowe.models.t5 import t5, t5_config
from mowe.stores import expert_stores
from mowe.training import checkpointing, partitioning, training_step
from mowe.training.optimization import optimizers, vector_row_optimizers
from mowe.words.plans import row_plans, step_plans


def add_sizes(parser: argparse.ArgumentParser) -> None:
  """Adds the sizes of the model and of its batches."""
  parser.add_argument('--vocab_size', type=int, default=32_128)
  parser.add_argument('--emb_dim', type=int, default=256)
  parser.add_argument('--num_layers', type=int, default=4)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--inputs_length', type=int, default=128)
  parser.add_argument('--targets_length', type=int, default=64)


def make_config(
  arguments: argparse.Namespace,
  memories: tuple[token_memories.Memory, ...],
  mlp_dim: int | None = None,
) -> t5_config.T5Config:
  """Returns a T5 of the sizes of `add_sizes` with these memories.

  Args:
    arguments: the sizes.
    memories: the memories, or none.
    mlp_dim: the width of feed-forwards; None for twice that of the stream.
  """
  return t5_config.T5Config(
    vocab_size=arguments.vocab_size,
    emb_dim=arguments.emb_dim,
    num_heads=arguments.emb_dim // 64,
    head_dim=64,
    mlp_dim=mlp_dim or 2 * arguments.emb_dim,
    num_encoder_layers=arguments.num_layers,
    num_decoder_layers=arguments.num_layers,
    dropout_rate=0.0,
    memories=memories,
  )


class Batches:
  """Draws batches of tokens by Zipf's law, each from its number alone."""

  def __init__(self, arguments: argparse.Namespace):
    self._arguments = arguments
    weights = 1.0 / np.arange(1, arguments.vocab_size - 2)
    self._bounds = np.cumsum(weights / weights.sum())

  @property
  def batch_size(self) -> int:
    """The number of examples of a batch."""
    return self._arguments.batch_size

  def __call__(self, number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)

    def draw(length):
      shape = self._arguments.batch_size, length
      found = np.searchsorted(self._bounds, rng.random(shape))
      return (3 + found).astype(np.int32)

    targets = draw(self._arguments.targets_length)
    return {
      'encoder_input_tokens': draw(self._arguments.inputs_length),
      'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
      'decoder_target_tokens': targets,
      'decoder_loss_weights': np.ones(targets.shape, np.float32),
    }


class Run:
  """Trains with memories in a store, as `mowe train` does.

  Args:
    config: the model; it may have no memory.
    make_batch: returns a batch by its number.
    store: where tables lie.
    folder: for the file of the rows.
  """

  def __init__(
    self,
    config: t5_config.T5Config,
    make_batch: Batches,
    store: expert_stores.Store,
    folder: pathlib.Path,
  ):
    self._make = make_batch
    self._planners = {
      memory.name: row_plans.RowPlanner(
        memory.address,
        streams=token_memories.streams_of(memory),
        num_rows=memory.num_rows,
        trial_batches=map(make_batch, range(8)),
      )
      for memory in config.memories
    }
    row_optimizer = vector_row_optimizers.RowScalarAdam(1e-3)
    setup = initial_state.Setup.make(
      t5.T5(config),
      optimizers.Adafactor(1e-3),
      row_optimizer,
      partitioning.make_mesh(),
      seed=0,
      batch_size=make_batch.batch_size,
    )
    start = time.perf_counter()
    self._checkpoints = checkpointing.Checkpoints(folder, keep_last=1)
    self.state, self._stores = setup.start(
      self._checkpoints,
      {},
      None,
      store,
      {name: planner.rows_at_once for name, planner in self._planners.items()},
    )
    jax.block_until_ready(self.state)
    self.start_seconds = time.perf_counter() - start
    self._step = setup.jit(
      training_step.make_train_step(
        t5.T5(config),
        optimizer=setup.optimizer,
        row_optimizer=row_optimizer,
        loss=training_step.LossConfig(),
        seed=0,
      )
    )
    self._planned: list[tuple[Any, step_plans.StepPlan | None]] = []
    self._number = 8
    self._fed = self._stores.feed(self._batches())
    self.seconds: list[float] = []

  def _batches(self) -> Iterator[tuple[dict[str, Any], step_plans.StepPlan]]:
    while True:
      yield self._planned.pop(0)

  def train(self, num_steps: int) -> None:
    """Takes so many steps, and notes how long each took."""
    # Threads make batches and plans in training.
    while len(self._planned) < num_steps + 2:
      batch = self._make(self._number)
      rows = {name: plan(batch) for name, plan in self._planners.items()}
      plan = step_plans.StepPlan(None, rows) if rows else None
      self._planned.append((batch, plan))
      self._number += 1
    for _ in range(num_steps):
      start = time.perf_counter()
      batch, fed = next(self._fed)
      self.state, frozen, plan = self._stores.ready(self.state, fed)
      self.state, _ = self._step(self.state, frozen, batch, plan)
      jax.block_until_ready(self.state)
      self.seconds.append(time.perf_counter() - start)

  def report(self, name: str, steps_each: int) -> float:
    """Prints what is known; returns the median seconds of a step."""
    timed = [
      seconds
      for i, seconds in enumerate(self.seconds)
      if i >= steps_each and i % steps_each
    ]
    values = {k: float(v.compute()) for k, v in self._stores.metrics().items()}
    in_batch = ', '.join(
      f'{key.partition("/")[2]} {value:.4g}' for key, value in values.items()
    )
    print(
      f'{name}: median {1e3 * statistics.median(timed):.1f} ms, shortest '
      f'{1e3 * min(timed):.1f}, longest {1e3 * max(timed):.1f} of '
      f'{len(timed)} steps; begun in {self.start_seconds:.1f} s'
      + (f'; in the last batch {in_batch}' if in_batch else ''),
      flush=True,
    )
    return statistics.median(timed)

  def save(self) -> None:
    """Saves a checkpoint, and waits until it is on the disk."""
    self._checkpoints.save(
      int(self.state.step),
      self.state.replace(tables={}, table_state={}),
      metadata={},
      attach=lambda path: self._stores.save(path, self.state),
    )
    self._checkpoints.wait()

  def close(self) -> None:
    """Ends threads and closes files."""
    self._stores.close()
    self._checkpoints.close()


def take_turns(runs: list[Run], rounds: int, steps_each: int) -> None:
  """Trains with each of the runs in turn, one round more than is timed."""
  for _ in range(rounds + 1):
    for run in runs:
      run.train(steps_each)
