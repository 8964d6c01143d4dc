"""Model folders before and after modules are added or pruned.

  modules.json   in the folder that is made: from which weights, by which rule

The folder from which it comes is only read.
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
from mowe.stores import row_index
from mowe.training import checkpointing, manifests, partitioning
from mowe.training.optimization import modules_state
from mowe.words import atomic_files, base_vocabulary

PROVENANCE = 'modules.json'

_STATE = 'state'


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint that is read as a whole.

  Attributes:
    folder: the model folder.
    step: the training step of the checkpoint.
    digest: sha256 of its manifest, which has those of all its files.
    config: the config of the model.
    vocabulary: the subword vocabulary.
    metadata: what was saved with the checkpoint.
    provenance: where the modules come from, if the folder was made of another
      one; or None.
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
    """What says which weights these are."""
    return {
      'folder': str(self.folder.resolve()),
      'step': self.step,
      'manifest_sha256': self.digest,
    }


def open_source(path: str | os.PathLike) -> Source:
  """Reads everything but the arrays.

  Raises:
    FileNotFoundError: no model or no checkpoint there.
    DamagedCheckpointError: files are not what was written.
    ValueError: a model with word experts.
  """
  folder, step = model_folder.split_checkpoint_path(os.fspath(path))
  config, vocabulary = model_folder.load_config(folder)
  with checkpointing.Checkpoints(folder) as checkpoints:
    checkpoint = checkpoints.finished(step)
    metadata = checkpoints.metadata(step)
  manifests.verify(checkpoint)
  if row_index.exists(checkpoint):
    raise ValueError(
      'Modules are added to and taken from models without word experts, but '
      f'{checkpoint} has a table of them. Take a model whose layers have '
      'routers.'
    )
  provenance = folder / PROVENANCE
  return Source(
    folder=folder,
    step=int(checkpoint.name.rpartition('_')[2]),
    digest=digest_of(checkpoint),
    config=config,
    vocabulary=vocabulary,
    metadata=metadata,
    provenance=(
      json.loads(provenance.read_text('utf-8')) if provenance.exists() else None
    ),
  )


def digest_of(checkpoint: pathlib.Path) -> str:
  """What tells the files of a checkpoint from any others."""
  return manifests.digest(checkpoint / manifests.FILE_NAME)


def check_target(target: str | os.PathLike) -> None:
  """Raises if a model folder cannot be written there."""
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
  source: Source,
  config: model_config.ModelConfig,
  edits: modules_edits.Edits,
  rule: Mapping[str, Any],
) -> str | None:
  """Writes the changed model to a new folder, complete or not at all.

  Args:
    target: the folder.
    source: the model that is changed.
    config: the config of the changed model.
    edits: the edits of the parameters of the source.
    rule: what was done, for `modules.json`.

  Returns:
    None if the state of the optimizer was kept, else why it was left out.
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
    # Parameters go on without it, as in finetuning.
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
  """The whole state as it was saved, its arrays on the host."""
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
