"""One run of `mowe train` with a budget, as a step of a longer command."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mowe.commands import train
from mowe.commands.gin_files import gin_config
from mowe.commands.own_text import made_of, run_budget, shown_commands

# So often a finetuning is evaluated, and so many lines of progress a short run
# has, if nobody says how many.
_NUM_EVALUATIONS = 10
_NUM_LINES = 20


def run(
  gin_files: Sequence[str],
  macros: Mapping[str, Any],
  bindings: Sequence[str],
  search_paths: Sequence[str],
  budget: run_budget.Budget | None,
) -> train.Training:
  """Trains, or goes on, and prints the command that does the same.

  Args:
    gin_files: the gin files of the run, in their order.
    macros: values that the command itself gives, MODEL_DIR among them.
    bindings: gin bindings of the user, which are read last.
    search_paths: folders in which gin files are looked up first.
    budget: how long it trains; None takes TRAIN_STEPS of the gin files.

  Returns:
    The run that was done.
  """
  own = as_bindings(macros)
  folder = pathlib.Path(macros['MODEL_DIR'])
  gin_config.parse(gin_files, [*own, *bindings], search_paths)
  if budget is None:
    steps = gin_config.made('TRAIN_STEPS')
  else:
    steps = run_budget.fixed_steps(
      budget,
      gin_config.call(train.Training),
      folder / 'data',
      has_begun=made_of.has_begun(folder),
    )
    own.append(f'TRAIN_STEPS = {steps}')
  if steps <= gin_config.made('WARMUP_STEPS'):
    own.append(f'WARMUP_STEPS = {steps // 10}')
  if steps < _NUM_LINES * gin_config.made('LOG_PERIOD'):
    own.append(f'LOG_PERIOD = {max(1, steps // _NUM_LINES)}')
  if gin_config.has_macro('EVAL_TASK_NAME'):
    own.append(f'EVAL_PERIOD = {max(1, steps // _NUM_EVALUATIONS)}')
  bindings = [*own, *bindings]
  gin_config.parse(gin_files, bindings, search_paths)
  shown_commands.print_command(
    [
      *('mowe', 'train'),
      *(f'--gin_file={file}' for file in gin_files),
      *(f'--gin.{one.replace(" = ", "=", 1)}' for one in bindings),
    ]
  )
  training = gin_config.call(train.Training)
  train.train(training, config_text=gin_config.operative_config)
  return training


def as_bindings(macros: Mapping[str, Any]) -> list[str]:
  """Returns gin bindings that give macros these values."""
  return [f'{name} = {value!r}' for name, value in macros.items()]


def check_free(macros: Iterable[str], bindings: Sequence[str]) -> None:
  """Raises ValueError if a binding sets a macro that the command itself sets."""
  for binding in bindings:
    name = binding.partition('=')[0].strip()
    if name in macros:
      raise ValueError(
        f'{name} must be left to this command, which makes what it names, but '
        f'--gin.{name} was given. Leave it out; for settings of your own take '
        '`mowe train`.'
      )
