"""One run of `mowe train` with a budget, as a step of a longer command."""

import pathlib
from collections.abc import Sequence

from mowe.commands import train
from mowe.commands.gin_files import gin_config
from mowe.commands.own_text import run_budget, shown_commands


def run(
  gin_files: Sequence[str],
  bindings: Sequence[str],
  search_paths: Sequence[str],
  budget: run_budget.Budget | None,
  folder: pathlib.Path,
) -> None:
  """Trains, or goes on, and prints the command that does the same.

  Args:
    gin_files: the gin files of the run, in their order.
    bindings: gin bindings that are read after them.
    search_paths: folders in which gin files are looked up first.
    budget: how long it trains; None takes TRAIN_STEPS of the gin files.
    folder: where the number of steps of the budget is kept.
  """
  gin_config.parse(gin_files, bindings, search_paths)
  if budget is not None:
    steps = run_budget.fixed_steps(
      budget, gin_config.call(train.Training), folder
    )
    bindings = [*bindings, f'TRAIN_STEPS = {steps}']
    if steps <= gin_config.made('WARMUP_STEPS'):
      bindings.append(f'WARMUP_STEPS = {steps // 10}')
    gin_config.parse(gin_files, bindings, search_paths)
  shown_commands.print_command(
    [
      *('mowe', 'train'),
      *(f'--gin_file={file}' for file in gin_files),
      *(f'--gin.{one.replace(" = ", "=", 1)}' for one in bindings),
    ]
  )
  train.train(
    gin_config.call(train.Training), config_text=gin_config.operative_config
  )
