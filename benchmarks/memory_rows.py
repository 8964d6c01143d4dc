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
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mowe.layers.memory.payloads import gated_vector
from mowe.model_folders import initial_state
from mowe.models import token_memories
from mowe.models.t5 import t5, t5_config
from mowe.stores import expert_stores
from mowe.training import checkpointing, partitioning, training_step
from mowe.training.optimization import optimizers, vector_row_optimizers
from mowe.words.addresses import hashed_ngrams, ngram_hashes
from mowe.words.plans import row_plans, step_plans

_SMALL = 2**16
_HEADS = 4
_STORES = {
  'host': expert_stores.HostStore(),
  'disk': expert_stores.DiskStore(),
}


def make_config(arguments: argparse.Namespace, rows: int) -> t5_config.T5Config:
  """Returns a T5 with a memory of so many rows."""
  # 2-grams and 3-grams have as many slots each.
  of_slot = rows // (2 * _HEADS) - 128
  (hash_,) = ngram_hashes.engram_hashes(
    arguments.vocab_size, [of_slot] * 2, _HEADS
  )
  memory = token_memories.Memory(
    'engram',
    hashed_ngrams.HashedNGrams(hash_),
    functools.partial(
      gated_vector.GatedVector,
      2 * _HEADS * arguments.row_dim,
      starts_as_identity=False,
    ),
    token_memories.BeforeAttention((1,), (1,)),
    shares_rows=True,
  )
  return t5_config.T5Config(
    vocab_size=arguments.vocab_size,
    emb_dim=arguments.emb_dim,
    num_heads=arguments.emb_dim // 64,
    head_dim=64,
    mlp_dim=2 * arguments.emb_dim,
    num_encoder_layers=arguments.num_layers,
    num_decoder_layers=arguments.num_layers,
    dropout_rate=0.0,
    memories=(memory,),
  )


class Batches:
  """Draws batches of tokens by Zipf's law, each from its number alone."""

  def __init__(self, arguments: argparse.Namespace):
    self._arguments = arguments
    weights = 1.0 / np.arange(1, arguments.vocab_size - 2)
    self._bounds = np.cumsum(weights / weights.sum())

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
  """Trains with a table of some size in a store, as `mowe train` does."""

  def __init__(
    self,
    arguments: argparse.Namespace,
    rows: int,
    store: expert_stores.Store,
    folder: pathlib.Path,
  ):
    config = make_config(arguments, rows)
    (memory,) = config.memories
    self._make = Batches(arguments)
    self._planner = row_plans.RowPlanner(
      memory.address,
      streams=token_memories.streams_of(memory),
      num_rows=memory.num_rows,
      trial_batches=map(self._make, range(8)),
    )
    row_optimizer = vector_row_optimizers.RowScalarAdam(1e-3)
    setup = initial_state.Setup.make(
      t5.T5(config),
      optimizers.Adafactor(1e-3),
      row_optimizer,
      partitioning.make_mesh(),
      seed=0,
      batch_size=arguments.batch_size,
    )
    start = time.perf_counter()
    self._checkpoints = checkpointing.Checkpoints(folder, keep_last=1)
    self.state, self._stores = setup.start(
      self._checkpoints,
      {},
      None,
      store,
      {memory.name: self._planner.rows_at_once},
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
    self._name = memory.name
    self._planned: list[tuple[Any, step_plans.StepPlan]] = []
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
      rows = {self._name: self._planner(batch)}
      self._planned.append((batch, step_plans.StepPlan(None, rows)))
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
    print(
      f'{name}: median {1e3 * statistics.median(timed):.1f} ms, shortest '
      f'{1e3 * min(timed):.1f}, longest {1e3 * max(timed):.1f} of '
      f'{len(timed)} steps; begun in {self.start_seconds:.1f} s; in the last '
      'batch '
      + ', '.join(
        f'{key.partition("/")[2]} {value:.4g}' for key, value in values.items()
      ),
      flush=True,
    )
    return statistics.median(timed)

  def close(self) -> None:
    """Ends threads and closes files."""
    self._stores.close()
    self._checkpoints.close()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rows', type=int, default=2**24)
  parser.add_argument('--store', choices=_STORES, default='host')
  parser.add_argument('--row_dim', type=int, default=64)
  parser.add_argument('--vocab_size', type=int, default=32_128)
  parser.add_argument('--emb_dim', type=int, default=256)
  parser.add_argument('--num_layers', type=int, default=4)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--inputs_length', type=int, default=128)
  parser.add_argument('--targets_length', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=6)
  parser.add_argument('--steps_each', type=int, default=5)
  parser.add_argument('--folder', type=pathlib.Path)
  arguments = parser.parse_args()
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
      opened[name] = Run(arguments, rows, store, path)
    for _ in range(arguments.rounds + 1):
      for run in opened.values():
        run.train(arguments.steps_each)
    small, large = (
      run.report(name, arguments.steps_each) for name, run in opened.items()
    )
    for run in opened.values():
      run.close()
  print(f'ratio={large / small:.3f}')


if __name__ == '__main__':
  main()
