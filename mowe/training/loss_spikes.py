"""Watches the losses of training for spikes, and says what is done about one.

A batch of damaged or unusual text can give a loss far above those before, and
its update may harm the model. PaLM (arXiv 2204.02311, section 5.1) went back to
a checkpoint and left such batches out; here the update can be left out at once.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

# Name of the metric that says whether the update of a step was left out.
SKIPPED = 'skipped_updates'

_ACTIONS = ('continue', 'stop', 'skip')
# With fewer losses than this nothing is known about how they vary.
_FEWEST = 32
# A deviation below this counts as this, as losses near zero vary by many times
# themselves, which harms nothing.
_LEAST_DEVIATION = 0.1
# The limit of a step follows from the losses up to so many steps before it:
# later ones are not known yet when the step is handed to the device.
LAG = 3


class LossSpikeError(FloatingPointError):
  """The loss of a batch is far above those before it, and the run must stop."""


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
  """What a spike of the loss is, and what is done about it.

  Attributes:
    on_spike: 'continue' prints a line; 'stop' ends the run without saving, so
      that it can go on from the checkpoint before; 'skip' prints a line and
      leaves the update of that batch out.
    window: number of losses with which a loss is compared. Losses of spikes are
      among them, so that after a few in a row the new level is the usual one.
    deviations: a loss is a spike if it is above their mean by this many
      standard deviations, of at least 0.1 each.

  Raises:
    ValueError: another action, or a window or a number of deviations that
      cannot work.
  """

  on_spike: str = 'continue'
  window: int = 128
  deviations: float = 6.0

  def __post_init__(self):
    if self.on_spike not in _ACTIONS:
      raise ValueError(
        f'on_spike must be one of {_ACTIONS}, but is {self.on_spike!r}. '
        'Choose one of them.'
      )
    if self.window < _FEWEST or not self.deviations > 0:
      raise ValueError(
        f'A spike needs a window of at least {_FEWEST} losses and a positive '
        f'number of deviations, but window is {self.window} and deviations is '
        f'{self.deviations}. Change them.'
      )

  @property
  def skips(self) -> bool:
    """Whether the updates of spikes are left out."""
    return self.on_spike == 'skip'


class SpikeWatch:
  """Compares the loss of each step with the losses before it.

  Attributes:
    config: what a spike is, and what is done.
    losses: the last losses by their steps, such as those that `recent` gave
      when a checkpoint was saved: a resumed run skips the same batches as one
      that was never interrupted.
  """

  def __init__(
    self, config: SpikeConfig, losses: Iterable[tuple[int, float]] = ()
  ):
    self.config = config
    self._losses = collections.deque(
      ((int(step), float(loss)) for step, loss in losses),
      maxlen=config.window + LAG,
    )

  def recent(self) -> list[list[float]]:
    """The last losses as [step, loss], in the order of steps."""
    return [list(one) for one in self._losses]

  def limit(self, step: int) -> float:
    """The loss above which that of a step is a spike; infinity at first."""
    mean, deviation = self._usual(step)
    return mean + self.config.deviations * deviation

  def see(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Takes the metrics of a step; waits until the device has done it.

    Args:
      step: the number of steps done with it. Steps must come in order.
      metrics: means by name, with that of 'loss' and, if updates are skipped,
        `SKIPPED`.

    Raises:
      LossSpikeError: the loss is a spike, at which the run must stop.
    """
    loss = metrics['loss'].compute()
    # A loss that is not finite ends the run in any case.
    if not math.isfinite(loss):
      return
    is_skipped = SKIPPED in metrics and metrics[SKIPPED].compute() > 0
    if is_skipped or loss > self.limit(step):
      mean, deviation = self._usual(step)
      text = (
        f'the loss of batch {step} is {loss:.4g}, which is '
        f'{(loss - mean) / deviation:.1f} deviations of {deviation:.2g} above '
        f'the mean {mean:.4g} before it'
      )
      if self.config.on_spike == 'stop':
        raise LossSpikeError(
          f'The loss must not rise suddenly, but {text}. Nothing was saved since '
          'the last checkpoint; run the same command with --on_spike skip to go '
          'on from there without the update of this batch.'
        )
      done = 'its update was left out' if is_skipped else 'the run goes on'
      print(f'Spike: {text}; {done}.', flush=True)
    self._losses.append((step, loss))

  def _usual(self, step: int) -> tuple[float, float]:
    """Mean and standard deviation of the losses that a step is compared with."""
    before = [
      loss
      for number, loss in self._losses
      if step - LAG - self.config.window < number <= step - LAG
    ]
    if len(before) < _FEWEST:
      return math.inf, _LEAST_DEVIATION
    # These sums are exact, and so the same on all hosts of a run.
    mean = math.fsum(before) / len(before)
    variance = math.fsum((loss - mean) ** 2 for loss in before) / len(before)
    return mean, max(math.sqrt(variance), _LEAST_DEVIATION)
