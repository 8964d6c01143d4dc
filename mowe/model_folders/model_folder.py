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
from typing import Any

import jax
from flax import linen as nn

from mowe.models import initialization, model_config, parameters
from mowe.models.families import families, model_description
from mowe.stores import expert_sources, expert_stores
from mowe.training import checkpointing
from mowe.words import atomic_files, base_vocabulary

_MODEL = 'model.json'


@dataclasses.dataclass(frozen=True, repr=False)
class LoadedModel:
  """A model with its weights.

  Attributes:
    model: the Linen module.
    params: all parameters; expert tables among them, unless the model reads
      experts from the host.
    vocabulary: the subword vocabulary.
    step: the training step of the checkpoint.
  """

  model: nn.Module
  params: Any
  vocabulary: base_vocabulary.Vocabulary
  step: int

  def __repr__(self) -> str:
    family = families.of_config(self.model.config).name
    sizes = [leaf.size for leaf in jax.tree.leaves(self.params)]
    return (
      f'LoadedModel({family}, {sum(sizes):,} parameters, '
      f'vocabulary of {self.vocabulary.size:,}, step {self.step:,})'
    )


def create(
  folder: str,
  config: model_config.ModelConfig,
  vocabulary: base_vocabulary.Vocabulary,
) -> pathlib.Path:
  """Writes the model's description, or checks the one that is there.

  Raises:
    CheckpointMismatchError: the folder holds another model.
  """
  path = pathlib.Path(folder)
  described = model_description.describe(config, vocabulary)
  if (path / _MODEL).exists():
    _check_same(path / _MODEL, described)
    return path
  if path.exists() and not path.is_dir():
    raise ValueError(
      f'MODEL_DIR must be a folder, but {path} is a file. Choose another.'
    )
  path.mkdir(parents=True, exist_ok=True)
  model_description.write_vocabularies(path, config, vocabulary)
  # Last, and by renaming: a folder with a model.json is whole.
  content = json.dumps(described, indent=2) + '\n'
  atomic_files.write_atomically(path / _MODEL, content.encode())
  return path


def check_same_vocabularies(
  path: str,
  config: model_config.ModelConfig,
  vocabulary: base_vocabulary.Vocabulary,
) -> None:
  """Raises ValueError if the weights there are for other tokens or words.

  Args:
    path: a model folder, or a checkpoint in it. Without a description in it
      nothing is known, and nothing is refused.
    config: the config of the model that is to start from these weights.
    vocabulary: the subword vocabulary of that model.
  """
  file = split_checkpoint_path(path)[0] / _MODEL
  if not file.is_file():
    return
  old = model_description.read(file)
  new = model_description.describe(config, vocabulary)
  for name, kind in (('subwords', 'subword'), ('routing', 'routing')):
    # A dense model has no routing vocabulary.
    if old[name] and new[name] and old[name] != new[name]:
      raise ValueError(
        f'A model must start from weights of its own {kind} vocabulary, but '
        f'{path} has {_identity(old[name])} and the model '
        f'{_identity(new[name])}. Take the {kind} vocabulary in '
        f'{file.parent}, or other weights.'
      )


def _identity(described: dict[str, Any]) -> str:
  sentinels = described.get('extra_ids')
  counted = '' if sentinels is None else f' and {sentinels} sentinels'
  return f'that of sha256 {described["sha256"][:12]}{counted}'


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
  model = families.build(config)
  variables = initialization.abstract_variables(model)
  params, tables = parameters.split_tables(variables['params'])
  with checkpointing.Checkpoints(folder) as checkpoints:
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
        model = families.build(config.with_layer_changes(rows_from=rows_from))
  params = parameters.merge_tables(params, tables)
  return LoadedModel(model, params, vocabulary, step)


def load_config(
  folder: pathlib.Path, **changes: Any
) -> tuple[model_config.ModelConfig, base_vocabulary.Vocabulary]:
  """Config and subword vocabulary of a model folder."""
  file = folder / _MODEL
  if not file.is_file():
    raise FileNotFoundError(
      f'A model folder must have a {_MODEL}, but {folder} has none. Give '
      'the MODEL_DIR of a training run, or a checkpoint in it.'
    )
  return model_description.load(file, model_description.read(file), **changes)


def _check_same(file, described):
  old = model_description.read(file)
  if old == described:
    return
  differences = [
    f'{name}: {old_value!r} there, {new_value!r} now'
    for name, old_value, new_value in _differing(old, described)
  ]
  raise checkpointing.CheckpointMismatchError(
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
