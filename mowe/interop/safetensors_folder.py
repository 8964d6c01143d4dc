"""A folder of `save_pretrained`: config.json and weights in safetensors files.

config.json                        describes the model
model.safetensors                  all weights, or
model-00001-of-00003.safetensors   a part of them, and
model.safetensors.index.json       which tensor is in which part
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mowe.interop import new_folder, rules, safetensors_format, weights
from mowe.words import json_files

CONFIG = 'config.json'
_WHOLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'

# Endings of files in which weights are pickles.
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


def read(
  folder: str | os.PathLike,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Reads the config, and tensors by name as read-only views of the files.

  Raises:
    FileNotFoundError: the folder, its config or its weights are not there.
    ValueError: weights are in another format, files are damaged, or an index
      names a file outside of the folder or disagrees with the files.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(
      f'A model must be a folder with {CONFIG} and {_WHOLE}, but {folder} is '
      f'{"a file" if folder.exists() else "not there"}. Give the folder that '
      'save_pretrained wrote.'
    )
  has_whole, has_index = (folder / _WHOLE).exists(), (folder / _INDEX).exists()
  if has_whole and has_index:
    raise ValueError(
      f'{folder} must have {_WHOLE} or {_INDEX}, but has both. Remove the one '
      'that is left over from another model.'
    )
  if not (has_whole or has_index) or not (folder / CONFIG).is_file():
    raise _nothing_to_read(folder)
  config = _read_json(folder / CONFIG)
  if has_whole:
    return config, safetensors_format.read(folder / _WHOLE)
  return config, _read_parts(folder)


def write(
  folder: str | os.PathLike,
  config: Mapping[str, Any],
  tensors: Mapping[str, weights.Array],
  *,
  max_file_bytes: int,
  attach: Callable[[pathlib.Path], None] | None = None,
) -> None:
  """Writes a new folder, which is there complete or not at all.

  Args:
    folder: the folder to write, which must not exist; its parents are made.
    config: the contents of config.json.
    tensors: the tensors by name.
    max_file_bytes: bytes of tensors in one file; a larger tensor has a file of
      its own.
    attach: called with the folder before it is complete, to put more files into
      it; None puts no more into it.

  Raises:
    FileExistsError: the folder is there.
  """
  with new_folder.new_folder(folder) as partial:
    _write_weights(partial, tensors, max_file_bytes)
    if attach is not None:
      attach(partial)
    _write_json(partial / CONFIG, config)


def is_candidate(names: Sequence[str]) -> bool:
  """Whether a folder with these files is one for `read`, though maybe damaged.

  A folder of pickles is one, too: `read` says why it refuses it.
  """
  return any(
    name == CONFIG or name.endswith(('.safetensors', *_PICKLES))
    for name in names
  )


def _read_parts(folder):
  """Reads the tensors of a model whose weights are in several files."""
  index = _read_json(folder / _INDEX)
  parts = index.get('weight_map')
  if not isinstance(parts, dict) or not all(
    isinstance(part, str) for part in parts.values()
  ):
    raise ValueError(
      f'{folder / _INDEX} must have a weight_map from tensors to files, but '
      f'has {sorted(index)}. Fetch it again.'
    )
  tensors: dict[str, np.ndarray] = {}
  for part in sorted(set(parts.values())):
    # A name beside the index, which may be a link: in a cache of downloads all
    # files are links.
    is_beside = not set('/\\\0') & set(part) and part.endswith('.safetensors')
    if not is_beside:
      raise ValueError(
        f'{folder / _INDEX} must name safetensors files beside it, but names '
        f'{part!r}. Do not use this model: the index may have been made to '
        'read other files.'
      )
    if not (folder / part).is_file():
      raise FileNotFoundError(
        f'{folder / _INDEX} must name files that are there, but {part} is not. '
        'Fetch the rest of the model.'
      )
    found = safetensors_format.read(folder / part)
    wanted = {name for name, file in parts.items() if file == part}
    if set(found) != wanted:
      raise ValueError(
        f'{folder / part} must hold what {_INDEX} says, but differs in '
        f'{rules.listed(sorted(wanted ^ set(found)))}. Fetch both again.'
      )
    tensors |= found
  return tensors


def _read_json(path):
  """Reads a JSON object."""
  return json_files.read_object(path, 'Fetch it again.')


def _nothing_to_read(folder):
  """Returns the error for a folder that lacks its config or its weights."""
  names = sorted(path.name for path in folder.iterdir())
  pickles = [name for name in names if name.endswith(_PICKLES)]
  if pickles and not any(name.endswith('.safetensors') for name in names):
    return ValueError(
      f'{folder} must hold its weights as {_WHOLE}, but has '
      f'{rules.listed(pickles)}: a pickle, which can run any code when it is '
      'read. Save the model with save_pretrained(folder, '
      'safe_serialization=True) where you trust it.'
    )
  return FileNotFoundError(
    f'{folder} must hold {CONFIG} and {_WHOLE} or {_INDEX}, but has '
    f'{names}. Save the model with save_pretrained(folder, '
    'safe_serialization=True).'
  )


def _write_weights(folder, tensors, max_file_bytes):
  """Writes tensors to one file, or to several with an index."""
  files: list[dict[str, np.ndarray]] = [{}]
  room = max_file_bytes
  for name in sorted(tensors):
    size = weights.num_bytes(tensors[name])
    if files[-1] and size > room:
      files.append({})
      room = max_file_bytes
    files[-1][name] = tensors[name]
    room -= size
  if len(files) == 1:
    safetensors_format.write(folder / _WHOLE, files[0])
    return
  weight_map = {}
  for number, part in enumerate(files, start=1):
    file = f'model-{number:05}-of-{len(files):05}.safetensors'
    safetensors_format.write(folder / file, part)
    weight_map |= dict.fromkeys(part, file)
  index = {
    'metadata': {
      'total_parameters': sum(
        math.prod(tensor.shape) for tensor in tensors.values()
      ),
      'total_size': sum(map(weights.num_bytes, tensors.values())),
    },
    'weight_map': weight_map,
  }
  _write_json(folder / _INDEX, index)


def _write_json(path, tree):
  """Writes a new file, which is on disk when this returns."""
  with open(path, 'x', encoding='utf-8') as file:
    json.dump(tree, file, indent=2, sort_keys=True)
    file.write('\n')
    file.flush()
    os.fsync(file.fileno())
