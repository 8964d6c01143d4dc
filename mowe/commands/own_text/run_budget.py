"""How long a run trains: so many steps, epochs, or minutes."""

import dataclasses
import json
import math
import pathlib
from typing import Protocol

from mowe.commands import train
from mowe.commands.ahead import step_time
from mowe.words import atomic_files, json_files

_FILE = 'budget.json'


class Budget(Protocol):
  """How long a run trains."""

  def steps(self, training: train.Training) -> int:
    """Returns the number of updates of a run; at least 1.

    Args:
      training: the run; its `total_steps` mean nothing yet.
    """


@dataclasses.dataclass(frozen=True)
class Steps:
  """So many updates."""

  number: int

  def __post_init__(self):
    _check_positive('steps', self.number)

  def steps(self, training: train.Training) -> int:
    """See `Budget.steps`."""
    del training
    return self.number


@dataclasses.dataclass(frozen=True)
class Epochs:
  """So many times over the training examples."""

  number: float

  def __post_init__(self):
    _check_positive('epochs', self.number)

  def steps(self, training: train.Training) -> int:
    """See `Budget.steps`."""
    batches = training.data.open(training.vocabulary, training.model)
    # Of one step they are so few that they might be rounded.
    many = 1_000_000
    epochs = batches.epochs(many)
    if len(epochs) != 1:
      raise ValueError(
        'Epochs are counted in one token cache, but the run reads '
        f'{", ".join(epochs) or "a stream"}. Give steps or minutes.'
      )
    (of_many,) = epochs.values()
    return max(1, math.ceil(self.number * many / of_many))


@dataclasses.dataclass(frozen=True)
class Minutes:
  """So much time for the steps of training on this machine.

  A few steps are made and timed first, and thrown away. Their program is
  compiled only once, so the time that this takes is not counted.
  """

  number: float

  def __post_init__(self):
    _check_positive('minutes', self.number)

  def steps(self, training: train.Training) -> int:
    """See `Budget.steps`."""
    mesh = training.make_mesh()
    training.check(mesh)
    print('Timing a few steps, which are thrown away ...', flush=True)
    taken = step_time.measure(training, train.Prepared.make(training, mesh))
    steps = taken.steps_in(60 * self.number)
    print(f'A step takes {taken.seconds:.3g} s: {steps:,} steps.')
    return steps


def fixed_steps(
  budget: Budget,
  training: train.Training,
  folder: pathlib.Path,
  *,
  has_begun: bool,
) -> int:
  """Returns the steps of a budget, which a resumed run finds unchanged.

  A machine is never equally fast twice, and the learning rate depends on the
  number of steps. So the number is kept in a file of the folder.

  Args:
    budget: how long the run trains.
    training: the run; its `total_steps` mean nothing yet.
    folder: an existing folder, where the number is kept.
    has_begun: whether the run has a checkpoint. Until then the number is counted
      anew, as settings may have changed.
  """
  path = folder / _FILE
  asked = f'{budget.number} {type(budget).__name__.lower()}'
  if has_begun and path.exists():
    kept = json_files.read_object(path, 'Remove it, and start again.')
    if kept.get('budget') == asked:
      return kept['steps']
  steps = budget.steps(training)
  content = json.dumps({'budget': asked, 'steps': steps}) + '\n'
  atomic_files.write_atomically(path, content.encode())
  return steps


def _check_positive(name: str, number: float) -> None:
  if not 0 < number < math.inf:
    raise ValueError(
      f'The {name} of a run must be more than 0, but are {number}. Give '
      'another number.'
    )
