"""Measures how long a step takes, by making a few and keeping nothing."""

import contextlib
import statistics
import tempfile
import time
from typing import NamedTuple

import jax

from mowe.commands import train
from mowe.commands.ahead import run_plan
from mowe.training import checkpointing, loss_spikes

# Steps after the one that compiles the program; fewer if they take long.
_MOST_STEPS = 10
_LEAST_STEPS = 2
_MOST_SECONDS = 20.0


class StepTime(NamedTuple):
  """How long a run takes on this machine.

  Attributes:
    first_seconds: time of the first step, which compiles the program.
    seconds: the median time of a step after it, with making its batch.
    num_steps: how many steps that is the median of.
  """

  first_seconds: float
  seconds: float
  num_steps: int

  def of_steps(self, number: int) -> float:
    """Seconds that a run of so many steps takes, but for saving and the like."""
    return self.first_seconds + self.seconds * max(0, number - 1)

  def steps_in(self, seconds: float) -> int:
    """How many steps fit into so many seconds without compiling; at least 1."""
    return max(1, int(seconds / self.seconds))


def measure(training: train.Training, prepared: train.Prepared) -> StepTime:
  """Trains fresh parameters for a few steps, and times them.

  What the stores of experts write goes to a temporary folder on the disk of
  the run.

  Args:
    training: all parts and settings of the run.
    prepared: the run, prepared on the devices of this machine.

  Raises:
    RuntimeError: the step needs more memory than there is.
  """
  setup, router = prepared.setup, prepared.router
  place = run_plan.nearest_folder(training.model_dir)
  with (
    tempfile.TemporaryDirectory(dir=place) as folder,
    contextlib.ExitStack() as closing,
  ):
    checkpoints = closing.enter_context(checkpointing.Checkpoints(folder))
    state, experts = setup.start(
      checkpoints, {}, None, training.store, router.at_once
    )
    closing.callback(experts.close)
    spikes = loss_spikes.SpikeWatch(training.spikes)
    step = train.TrainStep(training, setup, experts, spikes, 0)
    batches = closing.enter_context(
      train.prefetcher(prepared, 0, _MOST_STEPS + 1)
    )
    times = [time.monotonic()]
    for batch, fed in experts.feed(batches):
      state, metrics = step(state, batch, fed)
      jax.block_until_ready(metrics)
      times.append(time.monotonic())
      is_enough = len(times) > _LEAST_STEPS + 1
      if is_enough and times[-1] - times[1] > _MOST_SECONDS:
        break
    first, *others = (b - a for a, b in zip(times, times[1:], strict=False))
    return StepTime(first, statistics.median(others), len(others))
