"""Does one run of an experiment: a process that trains, measures, and ends.

`python -m mowe.comparison.single_run RUN.json` does what is not done yet. A
signal ends it after the current step, as it ends `mowe train`. So does the end
of the process that started it, whose pipe is its standard input.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from mowe.commands import data_config, evaluations, out_of_memory, train
from mowe.commands.gin_files import gin_config
from mowe.commands.own_text import shown_commands
from mowe.comparison import (
  experiment_data,
  measurements,
  planned_runs,
  provenance,
)
from mowe.training.performance import kept_memory, peak_memory
from mowe.words import atomic_files, json_files, terminal_text

# The exit status of a process that was stopped.
STOPPED = 75

_DONE = 'finished.json'
_SETTINGS = 'compare.json'


@dataclasses.dataclass(frozen=True)
class Clock:
  """An evaluation that times training, without the time of evaluations.

  Attributes:
    others: the evaluations that are made at the same steps.
  """

  others: Sequence[Any] = ()

  def prepare(
    self, model: Any, vocabulary: Any, loss: Any
  ) -> evaluations.Evaluation:
    """Prepares all evaluations."""
    prepared = [one.prepare(model, vocabulary, loss) for one in self.others]
    # The first stretch of training contains compilation, and is not reported.
    last: list[float] = []

    def evaluation(params, tables):
      now = time.monotonic()
      values = {measurements.SECONDS: now - last.pop()} if last else {}
      for one in prepared:
        found = one(params, tables)
        # All other values are measured at the end.
        values |= {k: v for k, v in found.items() if k.endswith('/loss')}
      last.append(time.monotonic())
      return values

    return evaluation


def run(planned: planned_runs.Run) -> None:
  """Trains what is not trained yet, and measures.

  Raises:
    ValueError: a folder holds a run with other settings.
  """
  folder = pathlib.Path(planned.folder)
  if is_finished(planned):
    return
  with _each_program_once(folder / 'compiled'):
    _train_and_measure(planned, folder / measurements.RESULTS)


def _train_and_measure(planned, results):
  for number, stage in enumerate(planned.stages):
    is_last = number == len(planned.stages) - 1
    if not _is_done(stage):
      print(f'\n{planned.name}, seed {planned.seed}, {stage.name}:')
      _train(planned, stage, is_pretraining=not is_last)
  print(f'\n{planned.name}, seed {planned.seed}, measuring:', flush=True)
  measured = measurements.measure(planned)
  content = json.dumps(
    {
      'digest': planned.digest(),
      **measured,
      **_of_stages(planned),
      provenance.KEY: provenance.of_this_process(),
    },
    indent=2,
  )
  # Results are written last, so that everything else is complete if they exist.
  atomic_files.write_atomically(results, content.encode())


def is_measured(planned: planned_runs.Run) -> bool:
  """Returns whether a run has been measured, with whatever settings."""
  folder = pathlib.Path(planned.folder)
  files = measurements.RESULTS, measurements.QUESTIONS
  return all((folder / name).is_file() for name in files)


def is_finished(planned: planned_runs.Run) -> bool:
  """Returns whether a run has been trained and measured as it is planned."""
  if not is_measured(planned):
    return False
  found = measurements.read_results(pathlib.Path(planned.folder))
  return found.get('digest') == planned.digest()


def check_folders(planned: planned_runs.Run) -> None:
  """Raises ValueError if a folder holds a run with other settings."""
  for stage in planned.stages:
    _check_settings(stage)


def _train(planned, stage, is_pretraining):
  _check_settings(stage)
  folder = pathlib.Path(stage.folder)
  folder.mkdir(parents=True, exist_ok=True)
  settings = json.dumps(stage.settings, indent=2) + '\n'
  atomic_files.write_atomically(folder / _SETTINGS, settings.encode())
  words = [f'--gin_file={file}' for file in stage.gin_files]
  words += [f'--gin.{one.replace(" = ", "=", 1)}' for one in stage.bindings]
  shown_commands.print_command(['mowe', 'train', *words])
  gin_config.parse(stage.gin_files, stage.bindings)
  total = gin_config.made('TRAIN_STEPS')
  changes = {}
  if is_pretraining:
    changes = {
      'eval_configs': (Clock(_held_out(planned)),),
      'eval_period': max(1, total // planned.num_points),
    }
  clock = folder / 'seconds.txt'
  seconds = _seconds_before(clock)
  # The file is absent while the stage runs, because the time is not known after
  # a kill.
  clock.unlink(missing_ok=True)
  start = time.monotonic()
  try:
    train.train(
      gin_config.call(train.Training, **changes),
      config_text=gin_config.operative_config,
    )
  finally:
    if seconds is not None:
      seconds += time.monotonic() - start
      atomic_files.write_atomically(clock, f'{seconds:.1f}'.encode())
  memory = peak_memory.peak()
  content = json.dumps(
    {
      'step': total,
      'seconds': seconds,
      'peak_memory': memory.bytes,
      'memory_of': memory.place,
    }
  )
  atomic_files.write_atomically(folder / _DONE, content.encode())


def _seconds_before(clock: pathlib.Path) -> float | None:
  """Returns the seconds that a stage took so far; None after a kill."""
  if clock.exists():
    return float(clock.read_text())
  return None if any(clock.parent.glob('checkpoint_*')) else 0.0


def _held_out(planned) -> tuple[evaluations.LossEvaluation, ...]:
  if not planned.has_held_out:
    return ()
  data = gin_config.call(
    data_config.DataConfig, mixture_or_task_name=experiment_data.HELD_OUT
  )
  return (evaluations.LossEvaluation(data, name=experiment_data.HELD_OUT),)


def _check_settings(stage: planned_runs.PlannedStage) -> None:
  path = pathlib.Path(stage.folder) / _SETTINGS
  # Before its first checkpoint a run has nothing that could be continued.
  if not path.is_file() or not any(path.parent.glob('checkpoint_*')):
    return
  old = json_files.read_object(path, f'Remove {stage.folder}.')
  if old == stage.settings:
    return
  names = [
    name for name in stage.settings if old.get(name) != stage.settings[name]
  ]
  then, now = (
    '; '.join(_without(one, other, names))
    for one, other in ((old, stage.settings), (stage.settings, old))
  )
  raise ValueError(
    f'{stage.folder} must hold the run of this experiment to be continued, but '
    f'differs in {", ".join(names)}: {then} then, {now} now. Restore the '
    'settings, remove that folder, or give another OUTPUT.'
  )


def _without(settings, others, names) -> Iterator[str]:
  """Yields what of some settings is not in others."""
  for name in names:
    value, other = settings.get(name), others.get(name)
    if isinstance(value, list) and isinstance(other, list):
      yield from (line for line in value if line not in other)
    else:
      yield str(value)


def _is_done(stage: planned_runs.PlannedStage) -> bool:
  _check_settings(stage)
  return (pathlib.Path(stage.folder) / _DONE).is_file()


def _of_stages(planned) -> dict[str, Any]:
  """Returns the seconds of all stages, and the peak memory of pretraining."""
  done = [
    json_files.read_object(
      pathlib.Path(stage.folder) / _DONE, f'Remove {stage.folder}.'
    )
    for stage in planned.stages
  ]
  if not done:
    return {'seconds': None, 'peak_memory': None, 'memory_of': None}
  seconds = [stage['seconds'] for stage in done]
  return {
    'seconds': None if None in seconds else sum(seconds),
    'peak_memory': done[0]['peak_memory'],
    'memory_of': done[0]['memory_of'],
  }


@contextlib.contextmanager
def _each_program_once(folder: pathlib.Path) -> Iterator[None]:
  """Context that keeps compiled programs in a folder, which is then removed.

  The losses of training and of measuring are the same program, and so are all
  answers. To compile them again would take longer than all questions of a small
  model.
  """
  # Programs that a killed process left may be compiled for another machine.
  shutil.rmtree(folder, ignore_errors=True)
  if jax.config.jax_compilation_cache_dir is not None:
    yield
    return
  settings = {
    'jax_compilation_cache_dir': str(folder),
    'jax_persistent_cache_min_compile_time_secs': 0.2,
    'jax_persistent_cache_min_entry_size_bytes': 0,
  }
  old = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    for name, value in old.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    shutil.rmtree(folder, ignore_errors=True)


def _stop_with(parent: int, stop: Callable[[], None]) -> None:
  """Calls `stop` when the other end of a pipe is closed, as by a kill."""

  def wait():
    # sys.stdin is not used, because this thread would hold its lock at the end.
    while os.read(parent, 1024):
      pass
    stop()

  threading.Thread(target=wait, daemon=True).start()


def main(path: str) -> int:
  """Does the run that a file describes, and returns the exit status."""
  planned = planned_runs.Run.from_json(pathlib.Path(path).read_text('utf-8'))
  kept_memory.keep_on_cpu()
  _stop_with(0, lambda: os.kill(os.getpid(), signal.SIGTERM))
  with terminal_text.harmless_output():
    return _run_or_say_why(planned)


def _run_or_say_why(planned: planned_runs.Run) -> int:
  try:
    run(planned)
  except KeyboardInterrupt as error:
    print(f'mowe: {error or "stopped."}', file=sys.stderr)
    return STOPPED
  except (ValueError, OSError, FloatingPointError) as error:
    if os.environ.get('MOWE_TRACE'):
      raise
    print(f'mowe: {error}', file=sys.stderr)
    return 1
  except (RuntimeError, MemoryError) as error:
    text = out_of_memory.explanation(error)
    if text is None or os.environ.get('MOWE_TRACE'):
      raise
    print(f'mowe: {text}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1]))
