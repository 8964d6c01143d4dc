"""Reads the weights of a model folder for conversion; writes new folders."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import flax
import jax
import numpy as np

from mowe.interop import new_folder, weights
from mowe.interop.t5x import orbax_arrays, t5x_tree
from mowe.model_folders import model_folder
from mowe.models import initialization, parameters
from mowe.models.families import families, model_description
from mowe.stores import expert_sources
from mowe.stores.row_files import expert_records, row_file, row_index
from mowe.training import checkpointing, manifests, train_state
from mowe.training.optimization import adafactor_transform

Path = weights.Path

_STATE = 'state'
_BITS = np.dtype(np.uint16)


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[weights.Weights]:
  """Opens the weights of a model folder, or of one checkpoint in it.

  Arrays are read when they are used, which is possible only while the context
  is open. The optimizer's state is given only if it is one of Adafactor for all
  parameters.

  Raises:
    FileNotFoundError: there is no model folder, or no such checkpoint in it.
    DamagedCheckpointError: files are not what was written.
    ValueError: the parameters do not fit the model.
  """
  folder, step = model_folder.split_checkpoint_path(os.fspath(path))
  config, vocabulary = model_folder.load_config(folder)
  with checkpointing.Checkpoints(folder) as checkpoints:
    checkpoint = checkpoints.finished(step)
  manifests.verify(checkpoint)
  arrays = orbax_arrays.read(checkpoint / _STATE)
  params = {
    name[1:]: array for name, array in arrays.items() if name[0] == 'params'
  }
  moments = _find_moments(arrays, params)
  has_state = any(name[0] == 'opt_state' for name in arrays)
  with contextlib.ExitStack() as closing:
    model = families.build(config)
    for group in _groups(model):
      source = expert_sources.SavedExperts(
        checkpoint, group, model=model, kernels_only=True
      )
      closing.callback(source.close)
      params |= _tables(source)
      # Tables have a row optimizer, so the state is not of all parameters.
      moments = None
    yield weights.Weights(
      config,
      weights.for_model(params, config, str(folder / 'model.json')),
      weights.check_step(arrays[('step',)][...], str(checkpoint)),
      moments,
      vocabulary,
      has_other_state=moments is None and has_state,
    )


def save(folder: str | os.PathLike, given: weights.Weights) -> None:
  """Writes a model folder with one checkpoint, complete or not at all.

  The model can then be asked, evaluated and finetuned.

  Raises:
    FileExistsError: the folder exists.
    ValueError: the weights have no vocabulary.
  """
  vocabulary = weights.needs_vocabulary(given)
  abstract = initialization.abstract_variables(families.build(given.config))[
    'params'
  ]
  _, tables = parameters.split_tables(flax.core.unfreeze(abstract))
  ordinary, _ = parameters.split_tables(
    flax.traverse_util.unflatten_dict(dict(given.params))
  )
  state = train_state.TrainState(
    step=np.asarray(given.step, np.int32),
    params=jax.tree.map(_whole, ordinary, is_leaf=_is_array),
    # Tables have a row optimizer, so the given state cannot be continued.
    opt_state={} if tables else _adafactor_state(given),
    tables={},
    table_state={},
  )
  with new_folder.new_folder(folder) as partial:
    model_folder.create(partial, given.config, vocabulary)
    with checkpointing.Checkpoints(partial) as checkpoints:
      checkpoints.save(
        given.step,
        state,
        metadata={
          'model': model_description.describe(given.config, vocabulary),
        },
        attach=lambda path: _write_tables(path, tables, given.params),
      )


class SavedTable:
  """A kernel of all word experts, which reads them from the file of experts.

  It is a `weights.Array`.
  """

  def __init__(self, source: expert_sources.SavedExperts, field: str):
    self._source = source
    self._field = field
    self._stored = source.dtype[field]
    self.shape = (source.index.num_rows, *self._stored.shape)
    is_bits = self._stored.base == _BITS
    self.dtype = weights.BFLOAT16 if is_bits else self._stored.base

  def __getitem__(self, rows: slice) -> np.ndarray:
    """See `weights.Array`."""
    if rows is ...:
      rows = slice(None)
    first, end, _ = rows.indices(self.shape[0])
    found = np.empty((end - first, *self.shape[1:]), self._stored.base)
    chunks = expert_sources.chunks(first, end, self._source.dtype)
    for start, number in chunks:
      records = self._source.read(np.arange(start, start + number))
      at = start - first
      found[at : at + number] = records[self._field]
    return found.view(self.dtype)


def _groups(model) -> list[str]:
  """The groups of tables of a model."""
  variables = initialization.abstract_variables(model)
  return list(
    parameters.in_groups(parameters.split_tables(variables['params'])[1])
  )


def _tables(source) -> dict[Path, SavedTable]:
  return {
    tuple(field.split('/')[1:]): SavedTable(source, field)
    for field in source.dtype.names
  }


def _write_tables(checkpoint, tables, params):
  """Writes tables beside a checkpoint, a few rows at a time to save memory."""
  for group, own in parameters.in_groups(tables).items():
    _write_group(checkpoint, group, own, params)


def _write_group(checkpoint, group, tables, params):
  dtype = expert_records.record_dtype(tables, {})
  num_experts = jax.tree.leaves(tables)[0].shape[0]
  rows = row_file.RowFile(
    row_file.LockedFile(checkpoint.parent, group=group),
    row_index.RowIndex(dtype, num_experts, group),
  )
  with contextlib.closing(rows):
    rows.check_room(num_experts)
    for first, number in expert_sources.chunks(0, num_experts, dtype):
      where = slice(first, first + number)
      kernels = {
        table: {
          kernel: _bits(params[(*table.split('/'), kernel)][where])
          for kernel in kernels
        }
        for table, kernels in tables.items()
      }
      records = expert_records.from_arrays(dtype, kernels, {})
      rows.write(np.arange(first, first + number), records)
    rows.save(checkpoint)


def _bits(rows):
  """The rows; bfloat16 as uint16 with the same bits, as records hold it."""
  rows = np.asarray(rows)
  return rows.view(_BITS) if rows.dtype == weights.BFLOAT16 else rows


def _is_array(leaf):
  return not isinstance(leaf, dict)


def _whole(array):
  return np.asarray(array[...])


def _find_moments(arrays, params) -> dict[str, dict[Path, Any]] | None:
  """The state of Adafactor, if exactly one is there and has all parameters."""
  first = t5x_tree.MOMENTS[0]
  places = {
    path[: path.index(first)]
    for path in arrays
    if path[0] == 'opt_state' and first in path
  }
  if len(places) != 1:
    return None
  place = places.pop()
  wanted = {
    (*place, name, *path) for name in t5x_tree.MOMENTS for path in params
  }
  if not wanted <= set(arrays):
    return None
  return {
    name: {path: arrays[*place, name, *path] for path in params}
    for name in t5x_tree.MOMENTS
  }


def _adafactor_state(given):
  """The state with which `optimizers.Adafactor` continues; {} if unknown."""
  if given.moments is None:
    return {}
  trees = {
    name: flax.traverse_util.unflatten_dict(
      {path: _whole(array) for path, array in arrays.items()}
    )
    for name, arrays in given.moments.items()
  }
  return adafactor_transform.AdafactorState(
    np.asarray(given.step, np.int32), **trees
  )
