"""Measures how fast a run trains, and how much memory that takes.

These numbers differ each time a run is repeated. Those of training are the same
to the last bit, but for how long stores wait. So these have a file of their own.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from mowe.models import model_config, parameters
from mowe.models.families import costs
from mowe.training import train_metrics, train_state
from mowe.training.compiling import chips
from mowe.training.performance import peak_memory

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Work:
  """What the devices of a run are asked to do, and could do at most.

  Attributes:
    flops_per_step: floating-point operations of the model in a step, forward
      and backward, for every position of the batch.
    peak_flops: what all devices together can do per second.
  """

  flops_per_step: float
  peak_flops: float

  @classmethod
  def of_model(
    cls,
    config: model_config.ModelConfig,
    state: train_state.TrainState,
    batch: Mapping[str, np.ndarray],
    mesh: jax.sharding.Mesh,
  ) -> 'Work | None':
    """Returns the work of a step; None if the peak of the devices is not known.

    Args:
      config: the config of the model; see `costs.ModelCosts` for what counts.
      state: the state of the run, or its shapes.
      batch: a batch of the run, for its shapes.
      mesh: the devices.
    """
    chip = chips.of_device(mesh.devices.flat[0])
    if chip is None:
      return None
    params = parameters.merge_tables(state.params, state.tables)
    lengths = [
      batch[name].shape[1] if name in batch else 0
      for name in ('encoder_input_tokens', 'decoder_target_tokens')
    ]
    forward = costs.model_costs(config, params).flops_per_example(*lengths)
    # The backward pass costs twice as much as the forward pass.
    num_rows = len(batch['decoder_target_tokens'])
    return cls(3 * forward * num_rows, chip.flops * mesh.size)


class SpeedMeter:
  """Times the steps of a run, and writes a line for each log period.

  The first step after the start is left out, because its program is compiled
  before it. What is done between steps, such as saving, is left out as well.

  The names of the metrics are `speed/step_seconds`, `speed/tokens_per_second`
  (tokens that are not padding), `speed/mfu` (model FLOPs utilization: the share
  of the peak that the FLOPs of the model are; with known devices only),
  `memory/device_peak_gib` (of the fullest device that says so), and
  `memory/process_peak_gib`.

  Args:
    writers: get the numbers.
    work: what the share of the peak is computed from; None leaves it out.
    clock: returns the time in seconds; another one is for tests.
  """

  def __init__(
    self,
    writers: Sequence[train_metrics.Writer] = (),
    work: Work | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._writers = writers
    self._work = work
    self._clock = clock
    self._start: float | None = None
    self._num_steps = 0
    self._num_tokens = 0

  def step_done(self, num_tokens: int) -> None:
    """Counts a step; call it for the first one when the device is done."""
    if self._start is None:
      self._begin_period()
      return
    self._num_steps += 1
    self._num_tokens += num_tokens

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out the time that the context lasts."""
    begin = self._clock()
    yield
    if self._start is not None:
      self._start += self._clock() - begin

  def write(self, step: int) -> None:
    """Writes the numbers since the last time; the devices must be done."""
    values = self._values()
    self._begin_period()
    if values:
      for writer in self._writers:
        writer.write(step, values)

  def _begin_period(self):
    self._start = self._clock()
    self._num_steps = self._num_tokens = 0

  def _values(self) -> dict[str, float]:
    if not self._num_steps:
      return {}
    seconds = (self._clock() - self._start) / self._num_steps
    values = {'speed/step_seconds': seconds}
    if seconds > 0:
      of_step = self._num_tokens / self._num_steps
      values['speed/tokens_per_second'] = of_step / seconds
      if self._work is not None:
        done = self._work.flops_per_step / seconds
        values['speed/mfu'] = done / self._work.peak_flops
    of_device = peak_memory.device_peak()
    if of_device is not None:
      values['memory/device_peak_gib'] = of_device / _GIB
    values['memory/process_peak_gib'] = peak_memory.process_peak() / _GIB
    return values
