"""Times a training step with experts on the device, in memory and on disk.

  python -m benchmarks.stores
  python -m benchmarks.stores --num_experts 32768 --stores device disk

The model is that of `benchmarks.mowe_step`. Every batch keeps a share of the
words of the one before, as texts on one subject do, and draws the others anew
by Zipf's law; `--kept 0` is the worst case. Stores take turns of several steps,
the first of which is not timed: what it needs was read while another store had
its turn. Rows for the second and later ones are read and written beside the
steps that are timed. The last line has the medians relative to the first store.
"""

import argparse
import collections
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import dense_step, mowe_step
from mowe.model_folders import initial_state
from mowe.models.t5 import t5
from mowe.stores import expert_stores
from mowe.training import checkpointing, partitioning, training_step
from mowe.training.optimization import optimizers, row_optimizers
from mowe.words.plans import batch_plans, step_plans

_LEARNING_RATE = 1e-3


class Words:
  """Draws routing ids of batches, of which neighbours share words.

  Args:
    arguments: sizes of a batch, and the share that is kept.
  """

  def __init__(self, arguments: argparse.Namespace):
    self._words = mowe_step.WordIds(
      arguments.num_experts, arguments.num_skipped
    )
    self._kept = arguments.kept
    self._rng = np.random.default_rng(0)
    self._shapes = {
      'encoder': (arguments.batch_size, arguments.inputs_length),
      'decoder': (arguments.batch_size, arguments.targets_length),
    }
    self._ids = {
      name: self._words.draw(self._rng, shape)
      for name, shape in self._shapes.items()
    }

  def __call__(self) -> dict[str, np.ndarray]:
    """Returns the routing ids of the next batch by stream, <int32>[b, l]."""
    for name, shape in self._shapes.items():
      drawn = self._words.draw(self._rng, shape)
      is_kept = self._rng.random(shape) < self._kept
      self._ids[name] = np.where(is_kept, self._ids[name], drawn)
    return dict(self._ids)


class Run:
  """Trains with a store, as `mowe train` does.

  Args:
    arguments: of the benchmark.
    store: where experts lie.
    folder: of the model; an earlier run in it is continued.

  Attributes:
    state: the present train state.
    experts: of the store.
    seconds: that each step took.
    moves: metrics of the experts of each step.
    start_seconds: until the experts were there.
  """

  def __init__(
    self,
    arguments: argparse.Namespace,
    store: expert_stores.Store,
    folder: pathlib.Path,
  ):
    model = mowe_step.make_model(arguments, arguments.num_experts)
    row_optimizer = row_optimizers.RowAdafactor(_LEARNING_RATE)
    setup = initial_state.Setup.make(
      model,
      optimizers.Adafactor(_LEARNING_RATE),
      row_optimizer,
      partitioning.make_mesh(),
      seed=0,
      batch_size=arguments.batch_size,
    )
    self._words = Words(arguments)
    ladder = batch_plans.profile_ladder(
      [self._words() for _ in range(16)], arguments.num_experts
    )
    self._planner = batch_plans.Planner(ladder, arguments.num_experts)
    self._checkpoints = checkpointing.Checkpoints(folder, keep_last=1)
    start = time.perf_counter()
    self.state, self.experts = setup.start(
      self._checkpoints,
      {},
      None,
      store,
      {step_plans.EXPERTS: ladder[0].updates.num_experts},
    )
    jax.block_until_ready(self.state)
    self.start_seconds = time.perf_counter() - start
    self._batch = dense_step.make_batch(
      arguments.batch_size,
      arguments.inputs_length,
      arguments.targets_length,
      arguments.vocab_size,
    )
    if self.experts.num_slots is not None:
      changed = model.config.with_layer_changes(
        num_slots=self.experts.num_slots
      )
      model = t5.T5(changed)
    function = training_step.make_train_step(
      model,
      optimizer=setup.optimizer,
      row_optimizer=row_optimizer,
      loss=training_step.LossConfig(),
      seed=0,
    )
    self._function = setup.jit(function)
    self._planned: collections.deque[batch_plans.ExpertPlan] = (
      collections.deque()
    )
    self._fed = self.experts.feed(self._batches())
    self.seconds: list[float] = []
    self.moves: list[dict[str, float]] = []

  def _batches(self) -> Iterator[tuple[dict[str, Any], step_plans.StepPlan]]:
    while True:
      yield self._batch, step_plans.StepPlan(self._planned.popleft(), {})

  def train(self, num_steps: int) -> None:
    """Takes so many steps, and notes how long each took."""
    # Stores may look at so many plans, which threads make in training.
    while len(self._planned) < num_steps + 2:
      self._planned.append(self._planner(self._words()))
    for _ in range(num_steps):
      start = time.perf_counter()
      batch, fed = next(self._fed)
      self.state, frozen, plan = self.experts.ready(self.state, fed)
      self.state, _ = self._function(self.state, frozen, batch, plan)
      jax.block_until_ready(self.state)
      self.seconds.append(time.perf_counter() - start)
      values = self.experts.metrics()
      self.moves.append({k: float(v.compute()) for k, v in values.items()})

  def save(self) -> None:
    """Writes a checkpoint of the present step, and waits for it."""
    self._checkpoints.save(
      int(self.state.step),
      self.state.replace(tables={}, table_state={}),
      None,
      {},
      attach=lambda path: self.experts.save(path, self.state),
    )
    self._checkpoints.wait()

  def close(self) -> None:
    """Ends threads and closes files."""
    self.experts.close()
    self._checkpoints.close()


def is_timed(number: int, steps_each: int) -> bool:
  """Returns whether a step counts: no first turn, nor the first of a turn."""
  return number >= steps_each and number % steps_each > 0


def report(name: str, run: Run, steps_each: int) -> float:
  """Prints what is known of a run; returns the median seconds of a step."""
  of = lambda values: [
    v for i, v in enumerate(values) if is_timed(i, steps_each)
  ]
  seconds, moves = of(run.seconds), of(run.moves)
  mean = lambda key: statistics.fmean(one.get(key, 0.0) for one in moves)
  print(
    f'{name}: median {1e3 * statistics.median(seconds):.1f} ms, mean '
    f'{1e3 * statistics.fmean(seconds):.1f}, shortest '
    f'{1e3 * min(seconds):.1f}, longest {1e3 * max(seconds):.1f}, '
    f'{len(seconds)} steps; hit rate {mean("experts/hit_rate"):.3f}, '
    f'{mean("experts/moved_mb"):.0f} MB in and out, waits '
    f'{mean("experts/wait_ms"):.1f} ms, '
    f'{mean("experts/distinct"):.0f} experts in a batch',
    flush=True,
  )
  return statistics.median(seconds)


def make_parser() -> argparse.ArgumentParser:
  """Returns a parser of the settings that all benchmarks of stores share."""
  parser = argparse.ArgumentParser(
    add_help=False, parents=[mowe_step.make_parser()]
  )
  parser.add_argument('--kept', type=float, default=0.8)
  parser.add_argument('--num_slots', type=int, default=4096)
  parser.add_argument('--folder', default=tempfile.gettempdir())
  return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Returns the settings."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], parents=[make_parser()]
  )
  parser.add_argument('--num_experts', type=int, default=8192)
  parser.add_argument('--steps_each', type=int, default=6)
  parser.add_argument('--stores', nargs='+', default=['device', 'host', 'disk'])
  parser.set_defaults(repeats=4)
  return parser.parse_args(argv)


def main() -> None:
  arguments = parse()
  slots = {'num_slots': arguments.num_slots}
  stores = {
    'device': expert_stores.DeviceStore(),
    'host': expert_stores.HostStore(**slots),
    'disk': expert_stores.DiskStore(**slots),
  }
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    runs = {}
    for name in arguments.stores:
      path = pathlib.Path(folder, name)
      path.mkdir()
      runs[name] = Run(arguments, stores[name], path)
      print(f'{name}: ready after {runs[name].start_seconds:.1f} s', flush=True)
    # The timed steps must not wait for what was written just now.
    os.sync()
    for number in range(arguments.repeats + 1):
      # Every other round is reversed: nobody always follows the same one.
      for name in list(runs)[:: 1 if number % 2 else -1]:
        runs[name].train(arguments.steps_each)
    median = {
      name: report(name, run, arguments.steps_each)
      for name, run in runs.items()
    }
    for run in runs.values():
      run.close()
  first = next(iter(median))
  print(
    ' '.join(
      f'ratio_{name}={value / median[first]:.3f}'
      for name, value in reversed(median.items())
      if name != first
    )
  )


if __name__ == '__main__':
  main()
