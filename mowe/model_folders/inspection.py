"""Says what a model folder holds, and whether its files are whole."""

import dataclasses
import pathlib
from typing import Any

from mowe.model_folders import model_folder
from mowe.models import model_config
from mowe.models.families import costs
from mowe.training import checkpointing, manifests, run_history


@dataclasses.dataclass(frozen=True)
class InspectedStep:
  """One checkpoint of a folder.

  Attributes:
    step: its number.
    num_bytes: size of its files, without rows, which all checkpoints share.
    problem: what is wrong with its files; None if all are as they were written.
    origin: what wrote it, as `run_history.origin` says; {} if it is not known.
    metrics: metrics that were saved with it.
  """

  step: int
  num_bytes: int
  problem: str | None
  origin: dict[str, Any]
  metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Inspected:
  """What a model folder holds.

  Attributes:
    config: the config of the model.
    cost: its parameters and FLOPs.
    steps: its finished checkpoints, in order.
    row_bytes: size of the files of rows that all checkpoints share.
    set_aside: names of checkpoints that were set aside.
    history: a line for each start of the run.
  """

  config: model_config.ModelConfig
  cost: costs.ModelCosts
  steps: list[InspectedStep]
  row_bytes: int
  set_aside: list[str]
  history: list[dict[str, Any]]

  @property
  def last_good(self) -> int | None:
    """The newest step whose files are whole, from which a run can go on."""
    good = [one.step for one in self.steps if one.problem is None]
    return max(good, default=None)


def inspect(path: str) -> Inspected:
  """Reads a model folder, and compares the files of all its checkpoints.

  Args:
    path: the model folder; it is only read.

  Raises:
    FileNotFoundError: there is no model folder.
    ValueError: its description is damaged.
  """
  folder = pathlib.Path(path)
  config, _ = model_folder.load_config(folder)
  with checkpointing.Checkpoints(folder) as checkpoints:
    steps = [
      _inspect_step(checkpoints, step) for step in checkpoints.all_steps()
    ]
  return Inspected(
    config=config,
    cost=costs.model_costs(config),
    steps=steps,
    row_bytes=sum(file.stat().st_size for file in folder.glob('*.rows')),
    set_aside=sorted(one.name for one in folder.glob('aside_checkpoint_*')),
    history=run_history.read(folder),
  )


def _inspect_step(checkpoints, step) -> InspectedStep:
  path = checkpoints.finished(step)
  size = sum(one.stat().st_size for one in path.rglob('*') if one.is_file())
  try:
    manifests.verify(path)
  except manifests.DamagedCheckpointError as error:
    return InspectedStep(step, size, str(error), {}, {})
  return InspectedStep(
    step,
    size,
    None,
    checkpoints.metadata(step).get('origin', {}),
    checkpoints.metrics(step),
  )


def show(inspected: Inspected) -> None:
  """Prints what was found, for a person."""
  cost = inspected.cost
  print(
    f'Model      {cost.total_parameters:,} parameters, '
    f'{cost.active_parameters:,} per token'
  )
  if inspected.row_bytes:
    print(f'Rows       {inspected.row_bytes / 1e6:,.1f} MB, of all steps')
  for line in inspected.history:
    commit = f', commit {line["commit"][:12]}' if line['commit'] else ''
    changed = ''.join(
      f'\n             {name}: {old} -> {new}'
      for name, (old, new) in line['changes'].items()
    )
    print(
      f'Started    {line["time"]} at step {line["step"]:,} on {line["host"]}, '
      f'version {line["version"]}{commit}\n             {line["command"]}'
      f'{changed}'
    )
  for one in inspected.steps:
    when = f', {one.origin["time"]}' if one.origin else ''
    state = 'whole' if one.problem is None else f'DAMAGED: {one.problem}'
    metrics = ''.join(
      f'  {name} {value:.4g}' for name, value in one.metrics.items()
    )
    print(
      f'Step       {one.step:,}: {one.num_bytes / 1e6:,.1f} MB{when}, {state}'
      f'{metrics}'
    )
  for name in inspected.set_aside:
    print(f'Set aside  {name}')
  if inspected.last_good is None:
    print('Resume     no step is whole; copy one from where it was')
  elif inspected.last_good == inspected.steps[-1].step:
    print(f'Resume     the same command goes on from {inspected.last_good:,}')
  else:
    print(
      f'Resume     `mowe train ... --from_step {inspected.last_good}` goes on '
      'from the newest step that is whole'
    )
