"""A folder that holds a model: config, vocabularies, checkpoints.

  model.json              the model's config, and which vocabularies it reads
  vocabulary.model        a copy of the subword vocabulary (unless it is bytes)
  routing_vocabulary.npz  a copy of it, for models with word experts
  checkpoint_<step>/      a checkpoint, see training/checkpointing.py
  experts.0.rows          the word experts of all checkpoints

The folder has everything that `evaluate`, `infer` and `ask` need, so it can be
moved.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
from flax import linen as nn

from mowe.models import initialization, model_config, parameters
from mowe.models.families import families, model_description
from mowe.stores import expert_stores, store_groups
from mowe.training import checkpointing
from mowe.words import atomic_files, base_vocabulary
from mowe.words.plans import step_plans

_MODEL = 'model.json'


@dataclasses.dataclass(frozen=True, repr=False)
class LoadedModel:
  """A model with its weights.

  Attributes:
    model: the Linen module.
    params: all parameters. Expert tables are included unless the model reads
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
  """Makes a model folder without checkpoints, or checks that it is the same.

  Raises:
    CheckpointMismatchError: the folder holds another model.
    FileNotFoundError: the folder has lost a vocabulary.
    ValueError: `folder` is a file, or a vocabulary in it is damaged.
  """
  path = pathlib.Path(folder)
  described = model_description.describe(config, vocabulary)
  if (path / _MODEL).exists():
    _check_same(path / _MODEL, described)
    # The run itself has its vocabularies from elsewhere, but whoever loads the
    # model reads the copies: if one is damaged, nothing more may be trained.
    model_description.load_vocabularies(path / _MODEL, described)
    return path
  if path.exists() and not path.is_dir():
    raise ValueError(
      f'MODEL_DIR must be a folder, but {path} is a file. Choose another.'
    )
  atomic_files.make_folder(path)
  model_description.write_vocabularies(path, config, vocabulary)
  # model.json is written last, and is renamed into place. So a folder that has
  # one is complete.
  content = json.dumps(described, indent=2) + '\n'
  atomic_files.write_atomically(path / _MODEL, content.encode())
  return path


def check_same_vocabularies(
  path: str,
  config: model_config.ModelConfig,
  vocabulary: base_vocabulary.Vocabulary,
) -> None:
  """Checks that weights belong to the vocabularies of a model.

  Args:
    path: a model folder, or a checkpoint in it. If the folder has no
      model.json, nothing is checked.
    config: the config of the model that is to start from these weights.
    vocabulary: the subword vocabulary of that model.

  Raises:
    ValueError: the weights were trained with another vocabulary.
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
        f'{_identity(new[name])}. Give the {kind} vocabulary in '
        f'{file.parent}, or other weights.'
      )
  named = [_names_of_experts(described) for described in (old, new)]
  if None not in named and named[0] != named[1]:
    raise ValueError(
      'What names the experts of tokens must be as in the weights that a model '
      f'starts from, but {path} has the fingerprint {named[0][:12]} and the '
      f'model {named[1][:12]}. Give it the same routing vocabulary and the '
      'same expert_names.'
    )
  _check_same_memories(path, old['config'], new['config'])
  for name, fingerprint in new['addresses'].items():
    if old['addresses'].get(name, fingerprint) != fingerprint:
      raise ValueError(
        f'The memory {name!r} must be addressed as in the weights that it '
        f'starts from, but {path} has the fingerprint '
        f'{old["addresses"][name][:12]} and the model {fingerprint[:12]}. Give '
        'it the same address: tokens, hash, sizes and seed.'
      )


def _names_of_experts(described: Any) -> str | None:
  """A fingerprint of what names experts; None if the tokens name none."""
  if described['config'].get('sparse_feed_forward') is None:
    return None
  routing = described['routing'] or {}
  return described['addresses'].get(step_plans.EXPERTS, routing.get('sha256'))


def _check_same_memories(path: str, old: Any, new: Any) -> None:
  """Raises ValueError unless two configs have the same memories."""
  there, here = (
    {
      memory['name']: (memory['place'], memory['payload']['class'])
      for memory in config.get('memories', ())
    }
    for config in (old, new)
  )
  different = sorted(
    name for name in there | here if there.get(name) != here.get(name)
  )
  if different:
    raise ValueError(
      'A model must have the memories of the weights that it starts from, in '
      f'the same places, but {path} has {sorted(there)} and the model '
      f'{sorted(here)}: {different} differ. Change the model, or train it from '
      'the start.'
    )


def _identity(described: dict[str, Any]) -> str:
  """Names a vocabulary in a message by its digest."""
  sentinels = described.get('extra_ids')
  counted = '' if sentinels is None else f' and {sentinels} sentinels'
  return f'that of sha256 {described["sha256"][:12]}{counted}'


def exists(folder: pathlib.Path) -> bool:
  """Whether a folder is a model folder: whether it says what it holds."""
  return (folder / _MODEL).exists()


def split_checkpoint_path(path: str) -> tuple[pathlib.Path, int | None]:
  """Splits a path into a model folder and a step.

  The step is None if the path is that of the folder itself, instead of one of a
  checkpoint `.../checkpoint_<step>`.
  """
  whole = pathlib.Path(path).expanduser()
  prefix, _, step = whole.name.rpartition('_')
  if prefix == 'checkpoint' and step.isdigit():
    return whole.parent, int(step)
  return whole, None


def check_has_checkpoint(path: str) -> None:
  """Raises NoCheckpointError unless a folder, or a path in it, has weights."""
  folder, step = split_checkpoint_path(path)
  with checkpointing.Checkpoints(folder) as checkpoints:
    checkpoints.finished(step)


def load(
  path: str, store: expert_stores.Store | None = None, **changes: Any
) -> LoadedModel:
  """Loads a model folder, or one checkpoint in it, for inference.

  Args:
    path: a model folder (its latest checkpoint), or `.../checkpoint_<step>`.
    store: where the word experts lie. None: on the device, or on disk if they
      are larger than 4 GiB.
    **changes: fields of the config to replace, such as `dtype`.

  Raises:
    FileNotFoundError: there is no model folder, or no such checkpoint in it.
    ValueError: a vocabulary in the folder is not the one that model.json names.
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
      store = store or expert_stores.for_reading(tables)
      tables, rows_from = store_groups.open_for_reading(
        checkpoint, model, tables, store
      )
      if rows_from is not None:
        model = families.build(config.with_layer_changes(rows_from=rows_from))
  params = parameters.merge_tables(params, tables)
  return LoadedModel(model, params, vocabulary, step)


def load_config(
  folder: pathlib.Path, **changes: Any
) -> tuple[model_config.ModelConfig, base_vocabulary.Vocabulary]:
  """Reads the config and the subword vocabulary of a model folder.

  Args:
    folder: the model folder.
    **changes: fields of the config to replace, such as `dtype`.

  Raises:
    FileNotFoundError: the folder has no model.json.
    ValueError: a vocabulary in the folder is not the one that model.json names.
  """
  file = folder / _MODEL
  if not file.is_file():
    raise FileNotFoundError(
      f'A model folder must have a {_MODEL}, but {folder} has none. Give '
      'the MODEL_DIR of a training run, or a checkpoint in it.'
    )
  return model_description.load(file, model_description.read(file), **changes)


def saved_config(path: str, **changes: Any) -> model_config.ModelConfig:
  """Returns the config of a model folder, or of a checkpoint in it.

  Args:
    path: the folder, or `.../checkpoint_<step>`.
    **changes: fields of the config to replace, such as `dropout_rate`.

  Raises:
    FileNotFoundError: the folder has no model.json.
    ValueError: a vocabulary in the folder is not the one that model.json names.
  """
  folder, _ = split_checkpoint_path(path)
  return load_config(folder, **changes)[0]


def saved_vocabulary(path: str) -> base_vocabulary.Vocabulary:
  """Returns the subword vocabulary of a model folder; see `saved_config`."""
  folder, _ = split_checkpoint_path(path)
  return load_config(folder)[1]


def trained_lengths(checkpoint_path: str) -> dict[str, int]:
  """Returns the feature lengths with which a model was trained.

  Args:
    checkpoint_path: a model folder (its latest checkpoint), or one checkpoint.

  Returns:
    The most tokens of 'inputs', if it has them, and of 'targets', EOS included.

  Raises:
    FileNotFoundError: there is no model folder, or no such checkpoint in it.
    ValueError: the checkpoint was converted, not trained.
  """
  folder, step = split_checkpoint_path(checkpoint_path)
  with checkpointing.Checkpoints(folder) as checkpoints:
    metadata = checkpoints.metadata(step)
  if 'data' not in metadata:
    raise ValueError(
      'A model must have been trained by `mowe train` to know the lengths of '
      f'its inputs and targets, but {folder} was converted. Give them as '
      "--gin.TASK_FEATURE_LENGTHS=\"{'inputs': 64, 'targets': 32}\"."
    )
  return metadata['data']['task_feature_lengths']


def _check_same(file, described):
  old = model_description.read(file)
  if old == described:
    return
  differences = [
    f'{name}: {old_value!r} in the folder, {new_value!r} now'
    for name, old_value, new_value in _differing(old, described)
  ]
  raise checkpointing.CheckpointMismatchError(
    f'{file.parent} must hold the same model to be resumed, but differs in '
    f'{"; ".join(differences[:5])}. Restore the old settings, or give '
    'another MODEL_DIR.'
  )


def _differing(old, new, name=''):
  """Yields the dotted name and both values of each leaf that differs."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in {**old, **new}:
      yield from _differing(
        old.get(key), new.get(key), f'{name}.{key}' if name else key
      )
  elif old != new:
    yield name, old, new
