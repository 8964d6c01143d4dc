"""T5X's own layout of a checkpoint: a msgpack file, and zarr for large arrays.

checkpoint                               msgpack: the tree, with small arrays
target.encoder.layers_0.mlp.wo.kernel/   a zarr array; the tree has its spec
state.param_states...scale.v/            a zarr array; the tree has its spec

Source: t5x/checkpoints.py, version 3. Version 2 differs in bfloat16 alone, and
all released checkpoints are of one of the two. msgpack is data: reading it
makes numbers, texts and arrays, and runs nothing. A spec says how tensorstore
opens an array; only the name of the folder is used of it.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np
import tensorstore
from flax import serialization

from mowe.interop import weights
from mowe.interop.t5x import zarr_array

Path = weights.Path

FILE_NAME = 'checkpoint'
# Versions of the layout that are read; the last one is written.
_VERSIONS = (2, 3)
# The most bytes of a chunk of a zarr array that is written.
_CHUNK_BYTES = 2**26
_PICKLES = (b'PK\x03\x04', b'\x80\x02', b'\x80\x03', b'\x80\x04', b'\x80\x05')


def read(folder: str | os.PathLike) -> dict[Path, weights.Array]:
  """Reads arrays by path, such as ('target', 'token_embedder', 'embedding').

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file or an array is damaged, of another version, or names
      something outside of the folder.
  """
  folder = pathlib.Path(folder)
  file = folder / FILE_NAME
  tree = _read_msgpack(file)
  version = tree.get('version') if isinstance(tree, dict) else None
  if version not in _VERSIONS or not isinstance(tree.get('optimizer'), dict):
    raise ValueError(
      f'{file} must be a T5X checkpoint of version {_VERSIONS}, but '
      f'is of version {version!r}. {zarr_array.AGAIN}'
    )
  flat = flax.traverse_util.flatten_dict(
    tree['optimizer'], is_leaf=lambda _, value: _is_spec(value)
  )
  arrays: dict[Path, Any] = {}
  parts: dict[str, str] = {}
  for path, leaf in flat.items():
    name = '/'.join(path)
    if _is_spec(leaf):
      arrays[path] = _open(folder, name, leaf)
      part = arrays[path].place
      if part in parts:
        raise ValueError(
          f'{file} must name a folder for every array, but {part} is of '
          f'{parts[part]} and of {name}. {zarr_array.AGAIN}'
        )
      parts[part] = name
    elif leaf is not None:
      arrays[path] = _array(file, name, leaf)
  return arrays


def write(folder: pathlib.Path, state: Mapping[Path, weights.Array]) -> None:
  """Writes a checkpoint to a new folder.

  Parameters, and second moments that are not factored, become zarr arrays. The
  rest becomes a part of the msgpack file. t5x writes the same.

  Args:
    folder: the folder of the checkpoint.
    state: the arrays by path.
  """
  folder.mkdir()
  leaves: dict[Path, Any] = {}
  for path, array in state.items():
    is_large = path[0] == 'target' or (path[-1] == 'v' and array.shape != (1,))
    leaves[path] = (
      _write_zarr(folder, '.'.join(path), array)
      if is_large
      else np.asarray(array[...])
    )
  tree = {
    'version': _VERSIONS[-1],
    'optimizer': flax.traverse_util.unflatten_dict(leaves),
  }
  with open(folder / FILE_NAME, 'xb') as file:
    file.write(serialization.msgpack_serialize(tree))
    file.flush()
    os.fsync(file.fileno())


def _read_msgpack(file):
  """Reads the tree; refuses pickles."""
  with open(file, 'rb') as opened:
    content = opened.read()
  if content.startswith(_PICKLES):
    raise ValueError(
      f'{file} must be msgpack, as t5x writes it, but is a pickle, which can '
      'run any code when it is read. Do not use it.'
    )
  try:
    return serialization.msgpack_restore(content)
  # msgpack, flax and numpy raise many kinds of errors, each for another damage.
  except Exception as error:
    raise ValueError(
      f'{file} must be msgpack, as t5x writes it, but reading it failed: '
      f'{type(error).__name__}: {str(error)[:200]}. {zarr_array.AGAIN}'
    ) from None


def _is_spec(value):
  """Whether a node of the tree stands for a zarr array."""
  return isinstance(value, dict) and {'driver', 'kvstore', 'metadata'} <= set(
    value
  )


def _open(folder, name, spec):
  """Opens the array that a spec names, in the folder of this checkpoint.

  The spec may have the path that the checkpoint had when it was written.
  """
  kvstore = spec['kvstore']
  given = kvstore.get('path') if isinstance(kvstore, dict) else None
  # Older specs have the path here.
  given = spec.get('path') if given is None else given
  part = given.rstrip('/') if isinstance(given, str) else ''
  if not part or part in ('.', '..') or set('/\\\0') & set(part):
    raise ValueError(
      f'{folder / FILE_NAME} must name folders beside it, but has {given!r} '
      f'for {name}. Do not use this checkpoint: it may have been made to read '
      'other files.'
    )
  if not (folder / part).is_dir():
    raise FileNotFoundError(
      f'{folder / FILE_NAME} must name folders that are there, but {part} is '
      'not. Fetch the rest of the checkpoint.'
    )
  kvstore = {'driver': 'file', 'path': f'{folder / part}/'}
  array = zarr_array.ZarrArray(folder / part, kvstore)
  metadata = spec['metadata']
  described = metadata.get('shape') if isinstance(metadata, dict) else None
  if described is None or list(array.shape) != list(described):
    raise ValueError(
      f'{folder / part} must have the shape {described} that {FILE_NAME} says, '
      f'but has {list(array.shape)}. {zarr_array.AGAIN}'
    )
  return array


def _array(file, name, leaf):
  """Returns a small array of the msgpack file, after a check."""
  if not isinstance(leaf, np.ndarray | np.generic | int | float):
    raise ValueError(
      f'{file} must hold arrays and numbers, but {name} is a '
      f'{type(leaf).__name__}. {zarr_array.AGAIN}'
    )
  array = np.asarray(leaf)
  zarr_array.check_dtype(f'{name} of {file}', array.dtype)
  return array


def _write_zarr(folder, name, array):
  """Writes an array, and returns the spec that stands for it in the tree."""
  chunks = _chunks(array)
  metadata = {
    'chunks': chunks,
    'compressor': {'id': 'gzip', 'level': 1},
    'shape': list(array.shape),
  }
  dtype = np.dtype(array.dtype)
  stored = 'bfloat16' if dtype == weights.BFLOAT16 else dtype.str
  store = tensorstore.open(
    {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': f'{folder / name}/'},
      'metadata': metadata | {'dtype': stored},
    },
    create=True,
  ).result()
  for where, rows in weights.pieces(array, chunks[0] if chunks else 1):
    store[where].write(rows).result()
  return {
    'driver': 'zarr',
    'dtype': dtype.name,
    'kvstore': {'driver': 'file', 'path': f'{name}/'},
    'metadata': metadata,
  }


def _chunks(array):
  """Returns the shape of a chunk: the largest axis is halved until it fits."""
  chunks = list(array.shape)
  itemsize = np.dtype(array.dtype).itemsize
  while chunks and int(np.prod(chunks)) * itemsize > _CHUNK_BYTES:
    largest = chunks.index(max(chunks))
    chunks[largest] = -(-chunks[largest] // 2)
  return chunks
