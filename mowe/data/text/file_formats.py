"""Tells what a file of texts or records is, and opens it unpacked."""

import bz2
import gzip
import importlib
import lzma
import os
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

# The bytes with which a packed file begins, and what opens it. A file may be
# packed whatever its name ends in.
_PACKED: dict[bytes, Callable[[str], Any]] = {
  b'\x1f\x8b': gzip.open,
  b'BZh': bz2.open,
  b'\xfd7zXZ\x00': lzma.open,
}
_ZSTANDARD = b'\x28\xb5\x2f\xfd'
_ENDINGS = ('.gz', '.bz2', '.xz', '.zst')

_JSON_LINES = ('.jsonl', '.json', '.ndjson', '.jsonlines')
# Endings of formats that would be nonsense if they were read as text.
_REFUSED = (
  *('.csv', '.tsv', '.parquet', '.arrow', '.feather', '.zip', '.tar', '.tgz'),
  *('.7z', '.pdf', '.docx', '.xlsx', '.npz', '.npy', '.pkl', '.sqlite'),
)

# What breaking off or damage of a packed file raises.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


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
    ValueError: the file is packed by zstd, and zstandard is not installed.
    OSError, EOFError or another of DAMAGED: a packed file is not whole.
  """
  path = os.fspath(path)
  with open(path, 'rb') as file:
    start = file.read(8)
  if start.startswith(_ZSTANDARD):
    return _open_zstandard(path)
  for mark, opener in _PACKED.items():
    if start.startswith(mark):
      return opener(path)
  if path.lower().endswith(_ENDINGS):
    raise gzip.BadGzipFile('it is not packed, as its name says')
  return open(path, 'rb')


def _open_zstandard(path) -> Any:
  try:
    zstandard = importlib.import_module('zstandard')
  except ImportError:
    raise ValueError(
      f'To read {path}, which is packed by zstd, zstandard must be installed, '
      'but it is not. Run `pip install zstandard`, or unpack the file with '
      '`zstd -d`.'
    ) from None
  return zstandard.open(path, 'rb')
