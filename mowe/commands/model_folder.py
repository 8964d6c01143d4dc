"""A folder that holds a model: config, vocabularies, checkpoints.

  model.json              the model's config, and which vocabularies it reads
  vocabulary.model        SentencePiece model, a copy (unless bytes are read)
  routing_vocabulary.npz  a copy, for models with word experts
  checkpoint_<step>/      see training/checkpoints
  experts.0.rows          word experts of all checkpoints

It says everything that `evaluate`, `infer` and `ask` need, and can be moved.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
from flax import linen as nn

from mowe.models import (
  initialization,
  model_config,
  parameters,
  saved_config,
)
from mowe.stores import expert_sources, expert_stores
from mowe.training import checkpoints as checkpoints_lib
from mowe.words import routing_vocabulary, subwords

_FORMAT = 'mowe model'
_VERSION = 1
_MODEL = 'model.json'
_SUBWORDS = 'vocabulary.model'
_ROUTING = 'routing_vocabulary.npz'


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model with its weights.

  Attributes:
    model: the Linen module.
    params: all parameters; expert tables among them, unless the model reads
      experts from the host.
    vocabulary: the subword vocabulary.
    step: of the checkpoint.
  """

  model: nn.Module
  params: Any
  vocabulary: subwords.Subwords
  step: int


def describe(
  config: model_config.ModelConfig, vocabulary: subwords.Subwords
) -> dict:
  """What model.json holds."""
  is_bytes = isinstance(vocabulary, subwords.ByteVocabulary)
  return {
    'format': _FORMAT,
    'version': _VERSION,
    'config': saved_config.to_json(config),
    'subwords': {
      'file': 'bytes' if is_bytes else _SUBWORDS,
      'extra_ids': vocabulary.extra_ids,
      'sha256': vocabulary.sha256,
    },
    'routing': None
    if config.routing is None
    else {'file': _ROUTING, 'sha256': config.routing.sha256},
  }


def create(
  folder: str, config: model_config.ModelConfig, vocabulary: subwords.Subwords
) -> pathlib.Path:
  """Writes the model's description, or checks the one that is there.

  Raises:
    CheckpointMismatchError: the folder holds another model.
  """
  path = pathlib.Path(folder)
  described = describe(config, vocabulary)
  if (path / _MODEL).exists():
    _check_same(path / _MODEL, described)
    return path
  if path.exists() and not path.is_dir():
    raise ValueError(
      f'MODEL_DIR must be a folder, but {path} is a file. Choose another.'
    )
  path.mkdir(parents=True, exist_ok=True)
  if described['subwords']['file'] == _SUBWORDS:
    shutil.copyfile(vocabulary.path, path / _SUBWORDS)
  if config.routing is not None:
    config.routing.save(path / _ROUTING)
  # Last, and by renaming: a folder with a model.json is whole.
  content = json.dumps(described, indent=2) + '\n'
  subwords.write_atomically(path / _MODEL, content.encode())
  return path


def split_checkpoint_path(path: str) -> tuple[pathlib.Path, int | None]:
  """A model folder and a step: of the folder, or of one checkpoint in it."""
  whole = pathlib.Path(path)
  prefix, _, step = whole.name.rpartition('_')
  if prefix == 'checkpoint' and step.isdigit():
    return whole.parent, int(step)
  return whole, None


def load(
  path: str, store: expert_stores.Store | None = None, **changes: Any
) -> LoadedModel:
  """Loads a model folder, or one checkpoint in it, for inference.

  Args:
    path: a model folder (its latest checkpoint), or `.../checkpoint_<step>`.
    store: where word experts lie; None: on the device, or on disk if they are
      larger than 4 GiB.
    **changes: fields of the config to replace, such as `dtype`.

  Raises:
    FileNotFoundError: no model or no checkpoint there.
    ValueError: a vocabulary in the folder is not the one of model.json.
  """
  folder, step = split_checkpoint_path(path)
  config, vocabulary = load_config(folder, **changes)
  model = config.build()
  variables = initialization.abstract_variables(model)
  params, tables = parameters.split_tables(variables['params'])
  with checkpoints_lib.Checkpoints(folder) as checkpoints:
    step = checkpoints.latest_step() if step is None else step
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params, tables = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      (params, tables),
    )
    params = checkpoints.restore_parameters({'params': params}, step)['params']
    if tables:
      checkpoint = checkpoints.finished(step)
      source = expert_sources.SavedExperts(checkpoint, kernels_only=True)
      store = store or expert_stores.for_reading(tables)
      tables, rows_from = store.open_for_reading(source, tables)
      if rows_from is not None:
        model = config.with_layer_changes(rows_from=rows_from).build()
  params = parameters.merge_tables(params, tables)
  return LoadedModel(model, params, vocabulary, step)


def load_config(
  folder: pathlib.Path, **changes: Any
) -> tuple[model_config.ModelConfig, subwords.Subwords]:
  """Config and subword vocabulary of a model folder."""
  file = folder / _MODEL
  if not file.is_file():
    raise FileNotFoundError(
      f'A model folder must have a {_MODEL}, but {folder} has none. Give '
      'the MODEL_DIR of a training run, or a checkpoint in it.'
    )
  described = json.loads(file.read_text())
  if described.get('version') != _VERSION:
    raise ValueError(
      f'{file} must have version {_VERSION}, but has '
      f'{described.get("version")}. Use the version of mowe that wrote it.'
    )
  saved = described['subwords']
  name = saved['file']
  vocabulary = subwords.load_subwords(
    name if name == 'bytes' else folder / _SUBWORDS, saved['extra_ids']
  )
  _check_digest(file, 'the subword vocabulary', saved, vocabulary)
  routing = None
  if described['routing'] is not None:
    routing = routing_vocabulary.load(folder / _ROUTING)
    _check_digest(file, 'the routing vocabulary', described['routing'], routing)
  config = saved_config.from_json(described['config'], routing, **changes)
  return config, vocabulary


def _check_digest(file, what, saved, loaded):
  if saved['sha256'] != loaded.sha256:
    raise ValueError(
      f'{file} must name {what} beside it, sha256 {saved["sha256"]}, but '
      f'that file has {loaded.sha256}. Restore the file that the model was '
      'trained with.'
    )


def _check_same(file, described):
  old = json.loads(file.read_text())
  if old == described:
    return
  differences = [
    f'{name}: {old_value!r} there, {new_value!r} now'
    for name, old_value, new_value in _differing(old, described)
  ]
  raise checkpoints_lib.CheckpointMismatchError(
    f'{file.parent} must hold the same model to be resumed, but differs in '
    f'{"; ".join(differences[:5])}. Restore the old settings, or give '
    'another MODEL_DIR.'
  )


def _differing(old, new, name=''):
  if isinstance(old, dict) and isinstance(new, dict):
    for key in {**old, **new}:
      yield from _differing(
        old.get(key), new.get(key), f'{name}.{key}' if name else key
      )
  elif old != new:
    yield name, old, new
