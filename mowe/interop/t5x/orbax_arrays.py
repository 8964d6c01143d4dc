"""Reading the arrays of a tree that Orbax saved, without Orbax.

Orbax would read the whole tree at once, and if it fails half-way, some of its
tasks go on. So the names of arrays are taken from a file of the checkpoint, and
each array is read when it is used, by tensorstore, with which Orbax reads as
well. Flipped bits are read in silence, as by Orbax; what is missing or cut
short is an error.
"""

import json
import pathlib

from mowe.interop import weights
from mowe.interop.t5x import zarr_array

METADATA = '_METADATA'


def read(folder: pathlib.Path) -> dict[weights.Path, weights.Array]:
  """Reads arrays by path, such as ('params', 'token_embedder', 'embedding').

  An array is read when it is used.

  Raises:
    ValueError: the folder is not whole, or names something outside of it.
  """
  folder = folder.absolute()
  described, paths = _read_metadata(folder / METADATA)
  driver = 'zarr3' if described.get('use_zarr3') else 'zarr'
  has_database = described.get('use_ocdbt', True)
  arrays = {}
  for path in paths:
    name = '.'.join(path)
    kvstore = {'driver': 'file', 'path': f'{folder / name}/'}
    if has_database:
      kvstore = {
        'driver': 'ocdbt',
        'base': {'driver': 'file', 'path': f'{folder}/'},
        'path': f'{name}/',
      }
    arrays[path] = zarr_array.ZarrArray(folder / name, kvstore, driver)
  return arrays


def _read_metadata(file):
  """Returns the description of the tree, and the paths of its arrays."""
  try:
    described = json.loads(file.read_text('utf-8'))
    entries = [
      (
        tuple(str(key['key']) for key in entry['key_metadata']),
        entry['value_metadata']['value_type'],
      )
      for entry in described['tree_metadata'].values()
    ]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{file} must describe the arrays of Orbax, but reading it failed: '
      f'{type(error).__name__}: {error}. {zarr_array.AGAIN}'
    ) from None
  # Empty parts of an optimizer have an entry, but are no arrays.
  paths = [path for path, kind in entries if kind not in ('None', 'Dict')]
  for path in paths:
    for part in path:
      if part in ('', '.', '..') or set('/\\\0') & set(part):
        raise ValueError(
          f'{file} must name arrays beside it, but has {part!r}. Do not use '
          'this checkpoint: it may have been made to read other files.'
        )
  return described, paths
