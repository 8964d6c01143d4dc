"""Metrics as sums and counts, and where they are written.

A metric stays a sum and a count until it is written, so that microbatches,
devices and steps combine exactly, whatever their sizes.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mowe.words import atomic_files, json_files

# A metric as it is written: a number, or an array of one number per expert.
Value = float | np.ndarray


class Mean(NamedTuple):
  """A mean that can still be merged; or n of them, such as one per expert.

  Attributes:
    total: the sum, <float32>[] or <float32>[n].
    count: what the sum will be divided by, in the same shape.
  """

  total: jax.Array | float
  count: jax.Array | float

  @classmethod
  def of(cls, values: jax.Array, weights: jax.Array | None = None) -> 'Mean':
    """Returns the mean of an array, or its weighted mean.

    Args:
      values: <float>[...].
      weights: <float>[...], in the shape of `values`; padding has 0. None gives
        each value the weight 1.
    """
    values = jnp.asarray(values, jnp.float32)
    if weights is None:
      return cls(values.sum(), jnp.float32(values.size))
    weights = jnp.asarray(weights, jnp.float32)
    return cls((values * weights).sum(), weights.sum())

  def merge(self, other: 'Mean') -> 'Mean':
    """Returns the mean over both."""
    return Mean(self.total + other.total, self.count + other.count)

  def compute(self) -> float | np.ndarray:
    """Returns the number or array; NaN where nothing was counted."""
    with np.errstate(divide='ignore', invalid='ignore'):
      value = np.asarray(self.total, np.float64) / np.asarray(self.count)
    value = np.where(np.asarray(self.count) == 0, math.nan, value)
    return value if value.ndim else float(value)


def merge(
  metrics: Mapping[str, Mean], others: Mapping[str, Mean]
) -> dict[str, Mean]:
  """Merges metrics by name; those that only one side has stay as they are."""
  merged = {**metrics, **others}
  for name in metrics.keys() & others.keys():
    merged[name] = metrics[name].merge(others[name])
  return merged


def compute(metrics: Mapping[str, Mean]) -> dict[str, Value]:
  """Brings all metrics to the host at once, and returns their values."""
  return {
    name: mean.compute() for name, mean in jax.device_get(dict(metrics)).items()
  }


class Writer(Protocol):
  """Writes the metrics of steps somewhere."""

  def write(self, step: int, values: Mapping[str, Value]) -> None:
    """Writes the values of a step."""

  def flush(self) -> None:
    """Writes what is still held in memory, to the disk where it must not be lost."""

  def close(self) -> None:
    """Flushes and closes the file."""


class Board(Protocol):
  """Where people look at metrics besides the files of a run."""

  def check(self) -> None:
    """Raises ModuleNotFoundError if what it needs is not installed."""

  def open(self, folder: pathlib.Path, resume_step: int) -> Writer:
    """Opens it for the run in a folder, which continues from a step."""


class JsonLinesWriter:
  """Appends one line of JSON per step: {"step": 10, "loss": 2.5}.

  An array is written as a list, and a NaN as null, so that every line is JSON
  for any reader.

  Attributes:
    path: the file; made with its folder if it is not there.
    resume_step: the step from which a run continues. Lines of later steps are
      removed first, as these steps will be done again. None keeps all lines. A
      last line that is half written is always removed.

  Raises:
    ValueError: a line of the file, other than the last, is not such a line.
  """

  def __init__(
    self, path: str | os.PathLike[str], resume_step: int | None = None
  ):
    self.path = pathlib.Path(path)
    atomic_files.make_folder(self.path.parent)
    if self.path.exists():
      _truncate(self.path, resume_step)
    self._file = self.path.open('a', encoding='utf-8')
    atomic_files.sync(self.path.parent)

  def write(self, step: int, values: Mapping[str, Value]) -> None:
    """Writes and flushes one line."""
    line: dict[str, Any] = {'step': int(step)}
    for name, value in values.items():
      line[name] = _finite(np.asarray(value, np.float64).tolist())
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()

  def flush(self) -> None:
    """Returns when all lines are on the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Flushes and closes the file."""
    self._file.close()


class TensorBoardWriter:
  """Writes scalars, and arrays as histograms, without TensorFlow.

  Attributes:
    folder: the folder of the event files.
    resume_step: the step from which a run continues; TensorBoard then hides
      what an earlier process wrote for later steps. None hides nothing.
  """

  def __init__(
    self, folder: str | os.PathLike[str], resume_step: int | None = None
  ):
    # Imported here, as only this class needs it and importing takes a while.
    import tensorboardX

    purge_step = None if resume_step is None else resume_step + 1
    self._writer = tensorboardX.SummaryWriter(
      str(folder), purge_step=purge_step
    )

  def write(self, step: int, values: Mapping[str, Value]) -> None:
    """Writes one point of each curve."""
    for name, value in values.items():
      if np.ndim(value):
        self._writer.add_histogram(name, np.nan_to_num(value), int(step))
      elif math.isfinite(value):
        # NaN, the mean of nothing, is left out: it would be a point without
        # a place, and a warning each time.
        self._writer.add_scalar(name, float(value), int(step))

  def flush(self) -> None:
    """Returns when all points are in the file."""
    self._writer.flush()

  def close(self) -> None:
    """Flushes and closes the file."""
    self._writer.close()


@dataclasses.dataclass(frozen=True)
class TensorBoard:
  """TensorBoard, which reads the folder `tensorboard` of a run."""

  def check(self) -> None:
    """See `Board.check`; mowe installs what it needs."""

  def open(self, folder: pathlib.Path, resume_step: int) -> Writer:
    """See `Board.open`."""
    return TensorBoardWriter(folder / 'tensorboard', resume_step)


@dataclasses.dataclass(frozen=True)
class WeightsAndBiases:
  """The site or server of Weights & Biases, if it has a project.

  Its own environment variables hold here: WANDB_MODE=offline writes to the
  folder `wandb` of the run, for `wandb sync`. Keys are its own business: nobody
  here reads one.

  Attributes:
    project: the name of the project; None writes nothing.
    name: the name of the run there; None takes that of its folder.
  """

  project: str | None = None
  name: str | None = None

  def check(self) -> None:
    """See `Board.check`."""
    if self.project is None:
      return
    found = importlib.util.find_spec('wandb')
    # A folder `wandb`, which it makes itself, has no file of its own.
    if found is not None and found.origin is not None:
      return
    raise ModuleNotFoundError(
      'Metrics go to Weights & Biases by the package wandb, but it is not '
      "installed. Install it with `pip install 'mowe[wandb]'`, or leave "
      'WANDB_PROJECT out.'
    )

  def open(self, folder: pathlib.Path, resume_step: int) -> Writer:
    """See `Board.open`."""
    del resume_step  # Its points have the steps that they are given.
    if self.project is None:
      return NoWriter()
    return WeightsAndBiasesWriter(
      self.project, self.name or folder.name, folder
    )


class NoWriter:
  """Writes nothing."""

  def write(self, step: int, values: Mapping[str, Value]) -> None:
    """See `Writer.write`."""

  def flush(self) -> None:
    """See `Writer.flush`."""

  def close(self) -> None:
    """See `Writer.close`."""


class WeightsAndBiasesWriter:
  """Writes scalars, and arrays as histograms, to a run of Weights & Biases.

  A run that continues in its folder continues there, too.

  Args:
    project: the name of the project.
    name: the name of the run.
    folder: the folder of the run. Its file wandb.json names the run there.

  Raises:
    ValueError: Weights & Biases does not begin the run.
  """

  def __init__(self, project: str, name: str, folder: pathlib.Path):
    # Imported here, as only this class needs it and importing takes a while.
    import wandb

    self._histogram = wandb.Histogram
    try:
      self._run = wandb.init(
        project=project,
        name=name,
        id=_id_of_run(folder / 'wandb.json'),
        resume='allow',
        dir=str(folder),
      )
    # It has errors of many kinds for a key or a network that is not there.
    except Exception as error:
      raise ValueError(
        f'Weights & Biases must begin a run, but led to: {error}. Log in with '
        '`wandb login`, set WANDB_MODE=offline, or leave WANDB_PROJECT out.'
      ) from error
    # Metrics of several kinds come at different times, and a run that goes back
    # to a checkpoint writes some steps again. Its own steps may do neither.
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def write(self, step: int, values: Mapping[str, Value]) -> None:
    """Writes one point of each curve."""
    points: dict[str, Any] = {'step': int(step)}
    for name, value in values.items():
      if np.ndim(value):
        points[name] = self._histogram(np.nan_to_num(value))
      elif math.isfinite(value):
        points[name] = float(value)
    self._run.log(points)

  def flush(self) -> None:
    """Does nothing: points are sent in the background."""

  def close(self) -> None:
    """Returns when all points are sent or on the disk."""
    self._run.finish()


def _id_of_run(path: pathlib.Path) -> str:
  """The name of a run for Weights & Biases, which a file keeps."""
  if path.exists():
    return json_files.read_object(path, 'Remove it.')['id']
  made = uuid.uuid4().hex[:12]
  atomic_files.write_atomically(path, json.dumps({'id': made}).encode())
  return made


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the lines written by `JsonLinesWriter`, in order."""
  text = pathlib.Path(path).read_text(encoding='utf-8')
  return [json.loads(line) for line in text.splitlines() if line]


def _finite(value):
  """The value with None in place of what is not finite; lists are walked."""
  if isinstance(value, list):
    return [_finite(one) for one in value]
  return value if math.isfinite(value) else None


def _truncate(path: pathlib.Path, resume_step: int | None) -> None:
  """Removes a half-written last line, and lines after the resumed step."""
  # What is no UTF-8 is kept as it is until its line is looked at.
  text = path.read_text('utf-8', 'surrogateescape')
  lines = text.splitlines(keepends=True)
  kept = []
  for number, line in enumerate(lines, start=1):
    if not line.endswith('\n'):
      # The process was killed while it wrote its last line.
      break
    try:
      step = json.loads(line)['step']
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f'Every line of {path} must be JSON with a step, but line {number} is '
        f'{line[:60]!r}. Repair that line, or move the file away.'
      ) from error
    if resume_step is None or step <= resume_step:
      kept.append(line)
  if kept != lines:
    # Written beside the file and then renamed: a kill here loses no line.
    atomic_files.write_atomically(
      path, ''.join(kept).encode('utf-8', 'surrogateescape')
    )
