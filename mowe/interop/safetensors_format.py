"""One file of the safetensors format: arrays by name, and no code.

A file begins with eight bytes, the length of the header, little-endian. The
header follows, which is JSON, and then the arrays, row by row. After the header
every byte belongs to exactly one array.

Source: the description of the format at github.com/huggingface/safetensors.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mowe.interop import weights

# The dtypes that are read and written. float32 can hold the values of all.
DTYPES = {
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}
# No weights of any model come near these. NumPy has limits of its own, of which
# it tells without a file's name.
_MOST_AXES = 32
_MOST_NUMBERS = 2**58
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# A limit of the format, so that a damaged length cannot fill the memory.
_LONGEST_HEADER = 100_000_000

_PICKLES = {
  b'PK\x03\x04': 'a zip archive, as torch.save writes',
  b'\x80': 'a pickle',
}


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads arrays by name, as read-only views of the file.

  The whole header is checked first; the bytes of an array are read when it is
  used.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, cut short or of another format, or has
      arrays that are not of floating point.
  """
  path = pathlib.Path(path)
  length = path.stat().st_size
  header, start = _read_header(path, length)
  header.pop('__metadata__', None)
  entries = {
    name: _check_entry(path, name, entry, length - start)
    for name, entry in header.items()
  }
  _check_places(path, entries, length - start)
  # A file without any bytes of arrays cannot be mapped.
  content = np.empty(0, np.uint8)
  if length > start:
    content = np.memmap(path, np.uint8, 'r', offset=start)
  return {
    name: content[first:last].view(dtype).reshape(shape)
    for name, (dtype, shape, first, last) in entries.items()
  }


def write(path: str | os.PathLike, arrays: Mapping[str, weights.Array]) -> None:
  """Writes a new file, with arrays in the order of their names.

  An array that is not in memory is read a piece at a time.

  Raises:
    FileExistsError: the file is there.
    ValueError: an array has a dtype that is not written.
  """
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  at = 0
  for name in sorted(arrays):
    array, size = arrays[name], weights.num_bytes(arrays[name])
    if array.dtype not in _NAMES:
      raise ValueError(
        f'Weights must be of {sorted(map(str, _NAMES))}, but {name} is '
        f'{array.dtype}. Convert it.'
      )
    header[name] = {
      'dtype': _NAMES[array.dtype],
      'shape': list(array.shape),
      'data_offsets': [at, at + size],
    }
    at += size
  described = json.dumps(header, separators=(',', ':')).encode()
  # Spaces, so that the arrays start at a multiple of 8 bytes.
  described += b' ' * (-len(described) % 8)
  with open(path, 'xb') as file:
    file.write(len(described).to_bytes(8, 'little'))
    file.write(described)
    for name in sorted(arrays):
      for _, rows in weights.pieces(arrays[name]):
        file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
    file.flush()
    os.fsync(file.fileno())


def _read_header(path, length) -> tuple[dict[str, Any], int]:
  """Returns the header, and the byte at which the arrays start."""
  with open(path, 'rb') as file:
    first = file.read(9)
    size = int.from_bytes(first[:8], 'little')
    is_whole = len(first) == 9 and size <= min(length - 8, _LONGEST_HEADER)
    if not is_whole or first[8:] != b'{':
      _refuse_pickles(path, first)
    if not is_whole:
      raise _damaged(
        path, f'is {length} bytes long with a header of {size} bytes'
      )
    file.seek(8)
    described = file.read(size)
  try:
    header = json.loads(described, object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    raise _damaged(path, f'has a header that is no JSON ({error})') from None
  if not isinstance(header, dict):
    raise _damaged(path, f'has a header that is a {type(header).__name__}')
  return header, 8 + size


def _refuse_pickles(path, first):
  """Raises ValueError if a file begins as a pickle does."""
  for magic, kind in _PICKLES.items():
    if first.startswith(magic):
      raise ValueError(
        f'{path} must be a safetensors file, but is {kind}, which can run any '
        'code when it is read. Save the model with save_pretrained(folder, '
        'safe_serialization=True) where you trust it.'
      )


def _unique(pairs):
  """Returns a dict of pairs; raises ValueError if a name is there twice."""
  found = dict(pairs)
  if len(found) != len(pairs):
    raise ValueError('a name is there twice')
  return found


def _check_entry(path, name, entry, length):
  """Returns dtype, shape, first byte, and the one after the last."""
  is_whole = isinstance(entry, dict) and set(entry) == {
    'dtype',
    'shape',
    'data_offsets',
  }
  if not is_whole or not (
    isinstance(entry['dtype'], str)
    and _are_sizes(entry['shape'])
    and _are_sizes(entry['data_offsets'])
  ):
    raise _damaged(path, f'describes {name} as {str(entry)[:200]}')
  if entry['dtype'] not in DTYPES:
    raise ValueError(
      f'Weights must be of {sorted(DTYPES)}, but {name} in {path} is '
      f'{entry["dtype"]!r}. Convert it, or leave it out.'
    )
  if len(entry['data_offsets']) != 2:
    raise _damaged(path, f'gives {name} the bytes {entry["data_offsets"]}')
  dtype, shape = DTYPES[entry['dtype']], tuple(entry['shape'])
  # Sizes of zero hide others that numpy cannot hold.
  room = math.prod(max(1, size) for size in shape)
  if len(shape) > _MOST_AXES or room > _MOST_NUMBERS:
    raise _damaged(path, f'gives {name} the shape {str(list(shape))[:200]}')
  first, last = entry['data_offsets']
  wanted = dtype.itemsize * math.prod(shape)
  if not first <= last <= length:
    raise _damaged(
      path, f'gives {name} the bytes {first} to {last} of {length}'
    )
  if last - first != wanted:
    raise _damaged(
      path, f'gives {name} {last - first} bytes, where its shape needs {wanted}'
    )
  return dtype, shape, first, last


def _are_sizes(values):
  return isinstance(values, list) and all(
    type(value) is int and value >= 0 for value in values
  )


def _check_places(path, entries, length):
  """Raises ValueError unless arrays fill the file without gaps."""
  at = 0
  for name, (_, _, first, last) in sorted(
    entries.items(), key=lambda item: item[1][2:]
  ):
    if first != at:
      raise _damaged(
        path,
        f'has {name} start at byte {first}, where the array before it ends at '
        f'{at}',
      )
    at = last
  if at != length:
    raise _damaged(path, f'has {length - at} bytes after its last array')


def _damaged(path, found):
  """Returns the error for a damaged file."""
  return ValueError(
    f'{path} must be a whole safetensors file, but {found}. It was damaged or '
    'cut short: fetch it again.'
  )
