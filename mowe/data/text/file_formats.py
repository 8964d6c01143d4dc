"""Tells what a file of texts or records is, and opens it unpacked."""

import bz2
import gzip
import lzma
import os
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

if sys.version_info >= (3, 14):
  from compression import zstd
else:
  from backports import zstd

# The bytes with which a packed file begins, and what opens it. A file may be
# packed whatever its name ends in.
_PACKED: dict[bytes, Callable[[str], Any]] = {
  b'\x1f\x8b': gzip.open,
  b'BZh': bz2.open,
  b'\xfd7zXZ\x00': lzma.open,
  b'\x28\xb5\x2f\xfd': zstd.open,
}
_ENDINGS = ('.gz', '.bz2', '.xz', '.zst')

_JSON_LINES = ('.jsonl', '.json', '.ndjson', '.jsonlines')
# Endings of formats that would be nonsense if they were read as text.
_REFUSED = (
  *('.csv', '.tsv', '.parquet', '.arrow', '.feather', '.zip', '.tar', '.tgz'),
  *('.7z', '.pdf', '.docx', '.xlsx', '.npz', '.npy', '.pkl', '.sqlite'),
)

# What breaking off or damage of a packed file may raise. That of gzip and bz2 is
# an OSError, which can also be one of the system: see `broken_off`.
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)


def has_json_lines(path: str | os.PathLike[str]) -> bool:
  """Returns whether a file has one JSON object per line, by its name.

  Names end in .jsonl, .json, .ndjson or .jsonlines, in any case, and may have
  .gz, .bz2, .xz or .zst behind. All other files are text.

  Raises:
    ValueError: the ending is one of a format that is not read.
  """
  name = os.path.basename(os.fspath(path)).lower()
  for ending in _ENDINGS:
    name = name.removesuffix(ending)
  if name.endswith(_REFUSED):
    raise ValueError(
      'Files must be text, or JSON lines (.jsonl), either also packed as .gz, '
      f'.bz2, .xz or .zst, but {path} is {os.path.splitext(name)[1]}. Write one '
      'JSON object per line, such as {"text": ...}.'
    )
  return name.endswith(_JSON_LINES)


def open_bytes(path: str | os.PathLike[str]) -> BinaryIO:
  """Opens a file for reading its bytes, unpacked if they are packed.

  Raises (also when it is read):
    one of DAMAGED: a packed file is not whole, or not packed as its name says.
  """
  path = os.fspath(path)
  with open(path, 'rb') as file:
    start = file.read(8)
  for mark, opener in _PACKED.items():
    if start.startswith(mark):
      return opener(path)
  if path.lower().endswith(_ENDINGS):
    raise gzip.BadGzipFile('it is not packed, as its name says')
  return open(path, 'rb')


def broken_off(
  path: str | os.PathLike[str], line: int, error: Exception
) -> Exception:
  """Returns the error for a file of which reading raised one of DAMAGED.

  An error of the system, such as one of permissions, stays what it is.

  Args:
    path: the file.
    line: the number of the last line that was whole.
    error: what was raised.
  """
  if isinstance(error, OSError) and error.errno is not None:
    return error
  return ValueError(
    f'A packed file must be whole, but {path} breaks off after line {line}: '
    f'{error}. Copy or download it again.'
  )
