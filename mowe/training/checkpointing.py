"""Checkpoints: Orbax for the arrays, and a manifest that vouches for them.

One folder per step, `checkpoint_1000`, as in T5X:

  state/          the arrays, written by Orbax in the background
  metadata.json   what must still hold on resume: config, digests of data
  metrics.json    metrics of this step, for `best_step`
  experts.0.npz   where word experts lie in experts.0.rows, beside the folder;
                  written by the caller of `save`, see `attach` there
  manifest.json   sha256 of every other file; written last

The manifest is what makes a checkpoint: a folder without one is unfinished and
is never read. So a process may be killed at any moment: while it saves, before
the manifest is written, or while it removes an old checkpoint, whose manifest
it removes first. The digests of a manifest are compared before a restore,
because Orbax restores flipped bits in silence.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mowe.training import manifests
from mowe.words import atomic_files, json_files

PyTree = Any

_PREFIX = 'checkpoint_'
_ASIDE = 'aside_'
_FOLDER_NAME = re.compile(_PREFIX + r'(\d+)')


class NoCheckpointError(FileNotFoundError):
  """There is no finished checkpoint where one was expected."""


class CheckpointMismatchError(ValueError):
  """A checkpoint belongs to another model, other data or another run."""


DamagedCheckpointError = manifests.DamagedCheckpointError


class Checkpoints:
  """Saves and restores the state of one run in one folder.

  Saving is asynchronous: the arrays are copied at once and written in the
  background, one checkpoint at a time. Every process of a multi-host run makes
  the same calls; process 0 writes all but the arrays.

  Attributes:
    folder: the folder of the run; made if it is not there.
    keep_last: how many of the newest finished checkpoints are kept; None keeps
      all.
    best_metric: name of a metric; the checkpoint with the best value is kept as
      well, however old it is. None keeps none for that reason.
    best_mode: 'max' if a larger value of `best_metric` is better, or 'min'.

  Raises:
    ValueError: `keep_last` below 1, or another `best_mode`.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    keep_last: int | None = 3,
    best_metric: str | None = None,
    best_mode: str = 'max',
  ):
    if keep_last is not None and keep_last < 1:
      raise ValueError(
        f'keep_last must be at least 1, but is {keep_last}. Take None to '
        'keep all checkpoints.'
      )
    if best_mode not in ('max', 'min'):
      raise ValueError(
        f"best_mode must be 'max' or 'min', but is {best_mode!r}. Take 'min' "
        "for a loss and 'max' for a score."
      )
    self.folder = pathlib.Path(folder).absolute()
    self.keep_last = keep_last
    self.best_metric = best_metric
    self.best_mode = best_mode
    self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    # A thread of our own waits for the arrays and writes the manifest. Orbax's
    # callback would run before its folder has its final name.
    self._finisher = futures.ThreadPoolExecutor(1, 'checkpoint_finisher')
    self._finishing: futures.Future[None] | None = None
    # The step that this object saved or restored last.
    self._own_step: int | None = None

  def save(
    self,
    step: int,
    state: PyTree,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    attach: Callable[[pathlib.Path], None] | None = None,
  ) -> bool:
    """Starts to save a step; the arrays may be donated as soon as it returns.

    Args:
      step: the number of the checkpoint, above all others in the folder.
      state: any pytree of jax arrays.
      metrics: numbers of this step by name, with `best_metric` among them if
        there is one. A checkpoint with None is never the best.
      metadata: anything that JSON can hold; see `check_metadata`.
      attach: called with the folder of the checkpoint, to put more files into
        it before this returns. None puts nothing more into it.

    Returns:
      Whether the step is being saved. It is not if it is the one that was saved
      or restored last, as it is on disk then.

    Raises:
      ValueError: `metrics` lacks `best_metric`.
      CheckpointMismatchError: the folder holds a later step of another run.
    """
    self.wait()
    if metrics is not None and self.best_metric not in (None, *metrics):
      raise ValueError(
        f'metrics must hold best_metric {self.best_metric!r}, but has '
        f'{sorted(metrics)}. Save with it, or with metrics=None.'
      )
    if not self._is_new(step):
      return False
    path = self._path(step)
    if jax.process_index() == 0:
      # A killed process may have left a part of this step.
      shutil.rmtree(path, ignore_errors=True)
      path.mkdir(parents=True)
    _wait_for_all_processes(f'checkpoint_folder_{step}')
    if attach is not None:
      attach(path)
      _wait_for_all_processes(f'checkpoint_attached_{step}')
    with _naming_full_disk(path):
      self._checkpointer.save(path / 'state', args=ocp.args.StandardSave(state))
    texts = {
      'metadata.json': _to_json(metadata or {}),
      'metrics.json': _to_json(metrics or {}),
    }
    self._finishing = self._finisher.submit(self._finish, step, texts)
    self._own_step = step
    return True

  def wait(self) -> None:
    """Returns when all is on disk; raises errors of the background threads."""
    if self._finishing is not None:
      finishing, self._finishing = self._finishing, None
      finishing.result()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    self.wait()
    self._finisher.shutdown()
    self._checkpointer.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    self.close()

  def all_steps(self) -> list[int]:
    """Returns the steps with a finished checkpoint, in order."""
    return sorted(
      step
      for step, path in self._step_folders()
      if (path / manifests.FILE_NAME).exists()
    )

  def latest_step(self) -> int | None:
    """Returns the last finished step, or None if there is none."""
    return max(self.all_steps(), default=None)

  def finished(self, step: int | None = None) -> pathlib.Path:
    """Returns the folder of a finished step, by default the latest.

    Raises:
      NoCheckpointError: no step is finished, or this one is not.
    """
    steps = self.all_steps()
    if not steps or (step is not None and step not in steps):
      wanted = (
        'a checkpoint' if step is None else f'a checkpoint of step {step}'
      )
      raise NoCheckpointError(
        f'{self.folder} must hold {wanted}, but has finished steps {steps}. '
        'Check the path; a folder without manifest.json was not finished.'
      )
    return self._path(steps[-1] if step is None else step)

  def set_aside(self, step: int) -> pathlib.Path:
    """Renames a checkpoint, so that it is not seen any more; returns its path.

    Nothing of it is removed, now or later.
    """
    path = self._path(step)
    new = self.folder / f'{_ASIDE}{path.name}'
    number = 1
    while new.exists():
      number += 1
      new = self.folder / f'{_ASIDE}{path.name}_{number}'
    path.rename(new)
    atomic_files.sync(self.folder)
    return new

  def set_aside_damaged(self, pattern: str) -> None:
    """Sets older checkpoints aside of which some files are damaged.

    The latest stays, as it may be restored; that tells of damage by itself.

    Args:
      pattern: a glob of names of files that are read of older checkpoints, too.
    """
    if jax.process_index() == 0:
      for step in self.all_steps()[:-1]:
        try:
          manifests.verify_files(self._path(step), pattern)
        except manifests.DamagedCheckpointError as error:
          print(f'{error} It is set aside as {self.set_aside(step).name}.')
    _wait_for_all_processes('set_aside_damaged')

  def go_back(self, step: int | None) -> None:
    """Sets checkpoints aside, so that an older one is the latest.

    Args:
      step: which one; None for the newest whose files are all as they were
        written.

    Raises:
      NoCheckpointError: there is no such checkpoint. Nothing is changed then.
    """
    if jax.process_index() == 0:
      if step is None:
        step = self._last_good_step()
      else:
        self.finished(step)
      for later in [one for one in self.all_steps() if one > step]:
        print(f'Step {later} is set aside as {self.set_aside(later).name}.')
    _wait_for_all_processes('go_back')

  def _last_good_step(self) -> int:
    for step in reversed(self.all_steps()):
      try:
        manifests.verify(self._path(step))
      except manifests.DamagedCheckpointError as error:
        print(error)
        continue
      return step
    raise NoCheckpointError(
      f'{self.folder} must hold a checkpoint that is whole, but of the steps '
      f'{self.all_steps()} none is. Copy one of them again from where it was '
      'whole.'
    )

  def best_step(self) -> int | None:
    """Returns the best finished step by `best_metric`, or None.

    Of equally good steps it is the later one. NaN is never the best.
    """
    if self.best_metric is None:
      return None
    sign = 1 if self.best_mode == 'max' else -1
    values = [
      (sign * value, step)
      for step in self.all_steps()
      if (value := self.metrics(step).get(self.best_metric)) is not None
      and not math.isnan(value)
    ]
    return max(values)[1] if values else None

  def metrics(self, step: int | None = None) -> dict[str, float]:
    """Returns the metrics saved with a step, by default the latest."""
    return _from_json(self.finished(step) / 'metrics.json')

  def metadata(self, step: int | None = None) -> dict[str, Any]:
    """Returns the metadata saved with a step, by default the latest."""
    return _from_json(self.finished(step) / 'metadata.json')

  def check_metadata(
    self, expected: Mapping[str, Any], step: int | None = None
  ) -> None:
    """Compares each name in `expected` with what was saved.

    Args:
      expected: what holds now, such as digests of vocabulary and data, and the
        part of the config that must not change. Nested names are compared one
        by one; names that are not in it may differ.
      step: the step to compare with, by default the latest.

    Raises:
      CheckpointMismatchError: something differs; the message names each
        difference, with the old and the new value.
      NoCheckpointError: there is no such checkpoint.
    """
    path = self.finished(step)
    manifests.verify_files(path, 'metadata.json')
    old = _flatten(_from_json(path / 'metadata.json'))
    # Through JSON, so that tuples and lists are alike.
    new = _flatten(json.loads(_to_json(expected)))
    missing = '(nothing)'
    differences = [
      f'{name}: {old.get(name, missing)!r} then, {new[name]!r} now'
      for name in new
      if name not in old or old[name] != new[name]
    ]
    if differences:
      raise CheckpointMismatchError(
        f'{path} must come from the same run, but differs in '
        f'{"; ".join(differences)}. Restore the old settings and files to '
        'continue, or give another folder for a new run.'
      )

  def restore(self, abstract_state: PyTree, step: int | None = None) -> PyTree:
    """Returns the state of a step, after comparing all digests.

    Args:
      abstract_state: the tree with `jax.ShapeDtypeStruct` leaves (or arrays);
        their shardings say where the arrays go, on any number of devices. An
        array without a sharding goes to where it was saved from.
      step: the step to restore, by default the latest.

    Raises:
      NoCheckpointError: no step is finished, or this one is not.
      DamagedCheckpointError: a file is not what was written; the message says
        which.
      CheckpointMismatchError: the checkpoint has other parameters or shapes;
        the message names the first ones.
    """
    path = self._verified(step)
    self._check_shapes(path, abstract_state, whole=True)
    args = ocp.args.StandardRestore(abstract_state)
    with _naming(path):
      state = self._checkpointer.restore(path / 'state', args=args)
    self._own_step = _step_of(path)
    return state

  def restore_parameters(
    self, abstract_parts: Mapping[str, PyTree], step: int | None = None
  ) -> dict[str, PyTree]:
    """Returns some parts of a state, such as `params`; see `restore`.

    Args:
      abstract_parts: field of the saved state -> its abstract tree, such as
        {'params': ...}; nothing else is read from the disk.
      step: the step to restore, by default the latest.

    Raises:
      The errors of `restore`.
    """
    path = self._verified(step)
    parts = dict(abstract_parts)
    self._check_shapes(path, parts, whole=False)
    args = ocp.args.PyTreeRestore(
      item=parts,
      restore_args=ocp.checkpoint_utils.construct_restore_args(parts),
      partial_restore=True,
    )
    with (
      _naming(path),
      ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
      return checkpointer.restore(path / 'state', args=args)

  def _finish(self, step: int, texts: Mapping[str, str]) -> None:
    """Waits for the arrays, writes the manifest and removes old steps."""
    path = self._path(step)
    with _naming_full_disk(path):
      self._checkpointer.wait_until_finished()
      if jax.process_index() != 0:
        return
      for name, text in texts.items():
        (path / name).write_text(text, encoding='utf-8')
      manifests.write(path)
    self._remove_old(step)

  def _is_new(self, step: int) -> bool:
    """Whether a step can be saved; False if it is on disk already.

    Raises:
      CheckpointMismatchError: the folder holds a later step of another run.
    """
    latest = self.latest_step()
    if latest is None or step > latest:
      return True
    if step == latest == self._own_step:
      return False
    raise CheckpointMismatchError(
      f'A new checkpoint must be later than all in {self.folder}, but step '
      f'{step} was to be saved and step {latest} is there. Restore that '
      'one to continue its run, or give another folder.'
    )

  def _remove_old(self, newest: int) -> None:
    """Removes steps up to `newest` that are not kept, or were not finished."""
    keep = self.all_steps()
    if self.keep_last is not None:
      keep = keep[-self.keep_last :] + [self.best_step()]
    for step, path in self._step_folders():
      if step not in keep and step <= newest:
        # The manifest goes first, so that a checkpoint that is half removed
        # looks unfinished.
        (path / manifests.FILE_NAME).unlink(missing_ok=True)
        atomic_files.sync(path)
        shutil.rmtree(path)

  def _check_shapes(self, path: pathlib.Path, abstract: PyTree, whole: bool):
    """Raises unless the saved arrays have the shapes of an abstract tree.

    With `whole` there must be no other arrays in the checkpoint.
    """
    with _naming(path):
      metadata = self._checkpointer.metadata(path / 'state')
      saved_tree = metadata.item_metadata.tree
    saved, wanted = _shapes(saved_tree), _shapes(abstract)
    differences = [
      f'{name}: {saved.get(name, "absent")} there, '
      f'{wanted.get(name, "absent")} here'
      for name in (*wanted, *(set(saved) - set(wanted) if whole else ()))
      if saved.get(name) != wanted.get(name)
    ]
    if differences:
      rest = len(differences) - 3
      more = f' and {rest} more' if rest > 0 else ''
      raise CheckpointMismatchError(
        f'{path} must hold this model and optimizer, but differs in '
        f'{"; ".join(sorted(differences)[:3])}{more}. Build the model with '
        'the config in its metadata.json, or restore only the parts that '
        'fit with restore_parameters.'
      )

  def _verified(self, step: int | None) -> pathlib.Path:
    """Returns the folder of a finished step, after comparing all digests."""
    self.wait()
    path = self.finished(step)
    manifests.verify(path)
    return path

  def _path(self, step: int) -> pathlib.Path:
    return self.folder / f'{_PREFIX}{step}'

  def _step_folders(self) -> list[tuple[int, pathlib.Path]]:
    """Returns the steps that have a folder, finished or not, in order."""
    if not self.folder.is_dir():
      return []
    paths = [
      path
      for path in self.folder.iterdir()
      if path.is_dir() and _FOLDER_NAME.fullmatch(path.name)
    ]
    return sorted((_step_of(path), path) for path in paths)


def _wait_for_all_processes(point: str) -> None:
  """Returns when every process of the run has come to this point."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(point)


# Errors of reading a checkpoint that do not say that it is damaged.
_NOT_OF_FILES = (
  errno.EACCES,
  errno.EPERM,
  errno.EMFILE,
  errno.ENFILE,
  errno.EIO,
)
_NOT_OF_FILES_IN_WORDS = (
  *('RESOURCE_EXHAUSTED', 'DEADLINE_EXCEEDED', 'UNAVAILABLE'),
  *map(os.strerror, _NOT_OF_FILES),
)


@contextlib.contextmanager
def _naming_full_disk(path: pathlib.Path) -> Iterator[None]:
  """Raises the system's error with the checkpoint's name if the disk is full.

  Orbax raises another error for it, whose text alone says what happened.
  """
  try:
    with atomic_files.naming(path):
      yield
  except (ValueError, RuntimeError) as error:
    for number in (errno.ENOSPC, errno.EDQUOT):
      text = os.strerror(number)
      if text in str(error):
        raise OSError(number, text, str(path)) from error
    raise


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Names the checkpoint if Orbax cannot read it.

  Its digests are those of its manifest by then, so that another program wrote
  these files. Orbax raises errors of many kinds for them.
  """
  try:
    yield
  except MemoryError:
    raise
  except Exception as error:
    # The system, the device or another process may fail though the files are
    # whole.
    of_system = isinstance(error, OSError) and error.errno in _NOT_OF_FILES
    if of_system or any(code in str(error) for code in _NOT_OF_FILES_IN_WORDS):
      raise
    first = (str(error).splitlines() or [''])[0]
    raise DamagedCheckpointError(
      f'{path / "state"} must hold arrays as Orbax writes them, but cannot be '
      f'read ({type(error).__name__}: {first}). '
      'Copy the checkpoint again from where it was whole, or restore another '
      'step.'
    ) from error


def _step_of(path: pathlib.Path) -> int:
  return int(path.name.removeprefix(_PREFIX))


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): _shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _shape(leaf: Any) -> tuple[int, ...]:
  # A typed random key is saved as the integers that it is made of.
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return tuple(leaf.shape)


def _flatten(tree: Any, name: str = '') -> dict[str, Any]:
  """Returns the values of a JSON tree by dotted names; lists are values."""
  if not isinstance(tree, dict) or not tree:
    return {name: tree}
  return {
    inner: value
    for key, child in tree.items()
    for inner, value in _flatten(
      child, f'{name}.{key}' if name else key
    ).items()
  }


def _to_json(tree: Mapping[str, Any]) -> str:
  return json.dumps(tree, indent=2, sort_keys=True, default=_number) + '\n'


def _number(value: Any) -> Any:
  """Makes a Python number of a numpy or jax scalar."""
  if isinstance(value, np.generic | np.ndarray | jax.Array):
    return value.item()
  raise TypeError(
    f'Metadata and metrics must be JSON, but hold a {type(value).__name__}. '
    'Convert it to a text or a number first.'
  )


def _from_json(path: pathlib.Path) -> dict[str, Any]:
  return json_files.read_object(
    path, 'Copy the checkpoint again from where it was whole.'
  )
