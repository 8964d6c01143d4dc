"""Reads model folders whose modules are to be changed, and writes new ones.

The source folder is only read. The new folder has a modules.json, which says
from which weights and by which rule it was made.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

from mowe.interop import new_folder, weights
from mowe.model_folders import model_folder
from mowe.models import initialization, model_config
from mowe.models.families import families, model_description
from mowe.models.surgery import modules_edits
from mowe.stores.row_files import row_index
from mowe.training import checkpointing, manifests, partitioning
from mowe.training.optimization import modules_state
from mowe.words import atomic_files, base_vocabulary, json_files

PROVENANCE = 'modules.json'

_STATE = 'state'


@dataclasses.dataclass(frozen=True)
class ModulesSource:
  """A checkpoint whose modules are to be changed.

  Attributes:
    folder: the model folder.
    step: the training step of the checkpoint.
    digest: sha256 of the manifest, which holds the sha256 of every file.
    config: the config of the model.
    vocabulary: the subword vocabulary.
    metadata: the metadata that was saved with the checkpoint.
    provenance: content of the folder's modules.json, which says how its own
      modules were changed; None: the folder has no such file.
  """

  folder: pathlib.Path
  step: int
  digest: str
  config: model_config.ModelConfig
  vocabulary: base_vocabulary.Vocabulary
  metadata: Mapping[str, Any]
  provenance: Mapping[str, Any] | None

  @property
  def checkpoint(self) -> pathlib.Path:
    """Folder of the checkpoint."""
    return self.folder / f'checkpoint_{self.step}'

  def named(self) -> dict[str, Any]:
    """Names these weights, for modules.json and usage.json."""
    return {
      'folder': str(self.folder.resolve()),
      'step': self.step,
      'manifest_sha256': self.digest,
    }


def open_source(path: str | os.PathLike) -> ModulesSource:
  """Opens a model folder, or a checkpoint in it, without reading its arrays.

  Raises:
    FileNotFoundError: there is no model folder, or no such checkpoint in it.
    DamagedCheckpointError: files are not what was written.
    ValueError: the model has word experts.
  """
  folder, step = model_folder.split_checkpoint_path(os.fspath(path))
  config, vocabulary = model_folder.load_config(folder)
  with checkpointing.Checkpoints(folder) as checkpoints:
    checkpoint = checkpoints.finished(step)
    metadata = checkpoints.metadata(step)
  manifests.verify(checkpoint)
  if row_index.exists(checkpoint):
    raise ValueError(
      'Modules can be added or pruned only in models without word experts, but '
      f'{checkpoint} has a table of them. Give a model whose layers have '
      'routers.'
    )
  provenance = folder / PROVENANCE
  return ModulesSource(
    folder=folder,
    step=int(checkpoint.name.rpartition('_')[2]),
    digest=digest_of(checkpoint),
    config=config,
    vocabulary=vocabulary,
    metadata=metadata,
    provenance=(
      json_files.read_object(provenance, 'Restore the file.')
      if provenance.exists()
      else None
    ),
  )


def digest_of(checkpoint: pathlib.Path) -> str:
  """The sha256 of a checkpoint's manifest, which identifies all its files."""
  return manifests.digest(checkpoint / manifests.FILE_NAME)


def check_target(target: str | os.PathLike) -> None:
  """Raises unless a model folder can be written to `target`.

  Raises:
    FileExistsError: `target` exists.
    ValueError: `target` is named like a checkpoint, or is in a model folder.
  """
  new_folder.check_new(target)
  whole = pathlib.Path(target).resolve()
  _, step = model_folder.split_checkpoint_path(os.fspath(whole))
  if step is not None:
    raise ValueError(
      'The name of a model folder must not be that of a checkpoint, but is '
      f'{whole.name}. Choose another.'
    )
  for folder in whole.parents:
    if (folder / 'model.json').is_file():
      raise ValueError(
        f'The target must not be in another model folder, but {target} is in '
        f'{folder}, which has a model.json. Choose another place.'
      )


def write(
  target: str | os.PathLike,
  source: ModulesSource,
  config: model_config.ModelConfig,
  edits: modules_edits.Edits,
  rule: Mapping[str, Any],
) -> str | None:
  """Writes the changed model to a new folder, complete or not at all.

  Args:
    target: the folder to write.
    source: the model that is changed.
    config: the config of the changed model.
    edits: the edits of the source's parameters.
    rule: description of the change, for modules.json.

  Returns:
    The reason why the optimizer's state was left out; None: it was kept.
  """
  state = _read_state(source)
  old = _flat(state['params'])
  axes = _axes(source.config)
  reason = None
  try:
    opt_state = modules_state.edit(
      state['opt_state'],
      edits,
      {path: array.shape for path, array in old.items()},
      axes,
    )
  except ValueError as error:
    # The parameters are usable without the optimizer's state. Training then
    # starts from them with a fresh one, as finetuning does.
    opt_state, reason = {}, str(error)
  new = weights.for_model(
    modules_edits.apply(edits, old), config, 'the changed config'
  )
  state |= {
    'params': flax.traverse_util.unflatten_dict(new),
    'opt_state': opt_state,
  }
  provenance = {**rule, 'source': source.named(), 'before': source.provenance}
  described = model_description.describe(config, source.vocabulary)
  with new_folder.new_folder(target) as partial:
    model_folder.create(partial, config, source.vocabulary)
    content = json.dumps(provenance, indent=2) + '\n'
    atomic_files.write_atomically(partial / PROVENANCE, content.encode())
    with checkpointing.Checkpoints(partial) as checkpoints:
      metadata = {**source.metadata, 'model': described, 'modules': provenance}
      checkpoints.save(source.step, state, metadata=metadata)
  return reason


def _read_state(source):
  """Reads the whole saved train state; its arrays are in host memory."""
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
    folder = (source.checkpoint / _STATE).absolute()
    saved = checkpointer.metadata(folder).item_metadata.tree
    shapes = jax.tree.map(lambda one: np.empty(one.shape, one.dtype), saved)
    state = checkpointer.restore(folder, args=ocp.args.StandardRestore(shapes))
  return dict(state)


def _axes(config):
  variables = initialization.abstract_variables(families.build(config))
  return partitioning.parameter_axes(variables['params_axes'])


def _flat(tree):
  return {
    path: np.asarray(array)
    for path, array in flax.traverse_util.flatten_dict(tree).items()
  }
