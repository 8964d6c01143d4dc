"""Tells what a file of texts or records is, and opens it unpacked."""

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from mowe.data.text import table_rows

if sys.version_info >= (3, 14):
  from compression import zstd
else:
  from backports import zstd

# The bytes with which a packed file begins, and what opens it. A file may be
# packed whatever its name ends in.
_PACKED: dict[bytes, Callable[[BinaryIO], Any]] = {
  b'\x1f\x8b': gzip.open,
  b'BZh': bz2.open,
  b'\xfd7zXZ\x00': lzma.open,
  b'\x28\xb5\x2f\xfd': zstd.open,
}
_ENDINGS = ('.gz', '.bz2', '.xz', '.zst')

# Bytes that are read from a file at once.
_BUFFER = 1 << 17

_JSON_LINES = ('.jsonl', '.json', '.ndjson', '.jsonlines')
# Endings of formats that would be nonsense if they were read as text.
_REFUSED = (
  *('.zip', '.tar', '.tgz', '.7z', '.pdf', '.docx', '.xlsx', '.npz', '.npy'),
  *('.pkl', '.sqlite'),
)

# What breaking off or damage of a packed file may raise. That of gzip and bz2 is
# an OSError, which can also be one of the system: see `broken_off`.
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)


def has_json_lines(path: str | os.PathLike[str]) -> bool:
  """Returns whether a file has one JSON object per line, by its name.

  Names end in .jsonl, .json, .ndjson or .jsonlines, in any case, and may have
  .gz, .bz2, .xz or .zst behind.

  Raises:
    ValueError: see `ending`.
  """
  return ending(path) in _JSON_LINES


def has_records(path: str | os.PathLike[str]) -> bool:
  """Returns whether a file has records with named fields; others are text.

  Raises:
    ValueError: see `ending`.
  """
  return has_json_lines(path) or ending(path) in (
    *table_rows.SEPARATORS,
    *table_rows.ARROW_ENDINGS,
  )


def ending(path: str | os.PathLike[str]) -> str:
  """Returns the last ending of a file's name, in small letters.

  Endings of packed files are left out: that of 'a.CSV.gz' is '.csv'.

  Raises:
    ValueError: the ending is one of a format that is not read.
  """
  name = os.path.basename(os.fspath(path)).lower()
  for packed in _ENDINGS:
    name = name.removesuffix(packed)
  found = os.path.splitext(name)[1]
  is_packed = name != os.path.basename(os.fspath(path)).lower()
  if found in _REFUSED or (is_packed and found in table_rows.ARROW_ENDINGS):
    raise ValueError(
      'Files must be text, JSON lines (.jsonl), .csv or .tsv, all of them also '
      'packed as .gz, .bz2, .xz or .zst, or .parquet, .arrow or .feather, but '
      f'{path} is {found}{" and packed" if is_packed else ""}. Write one JSON '
      'object per line, such as {"text": ...}.'
    )
  return found


@contextlib.contextmanager
def open_bytes(
  path: str | os.PathLike[str], sha256: str | None = None
) -> Iterator[BinaryIO]:
  """Context of a file whose bytes are read, unpacked if they are packed.

  Args:
    path: the file.
    sha256: the digest of the file as it lies there, which is compared with that
      of the bytes that were read when the context ends; None compares nothing.

  Raises (also when it is read):
    one of DAMAGED: a packed file is not whole, or not packed as its name says.
    ValueError: the file is another one than that of the digest.
  """
  path = os.fspath(path)
  with open(path, 'rb', buffering=0) as raw:
    counted = _Digesting(raw)
    buffered = io.BufferedReader(counted, _BUFFER)
    start = buffered.peek(8)
    openers = [
      opener for mark, opener in _PACKED.items() if start.startswith(mark)
    ]
    if not openers and path.lower().endswith(_ENDINGS):
      raise gzip.BadGzipFile('it is not packed, as its name says')
    with openers[0](buffered) if openers else buffered as file:
      yield file
      if sha256 is None:
        return
      while buffered.read(_BUFFER):
        pass
    if counted.digest.hexdigest() != sha256:
      raise ValueError(
        f'A file must stay as it is while it is read, but {path} was changed. '
        'Run the command again when nothing writes to it.'
      )


class _Digesting(io.RawIOBase):
  """A file that is read from its begin to its end, and its sha256."""

  def __init__(self, raw: io.RawIOBase):
    self._raw = raw
    self.digest = hashlib.sha256()

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int | None:
    number = self._raw.readinto(buffer)
    self.digest.update(memoryview(buffer)[:number])
    return number


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
    # A failed read names no file.
    if error.filename is None:
      return OSError(error.errno, error.strerror, os.fspath(path))
    return error
  return ValueError(
    f'A packed file must be whole, but {path} breaks off after line {line}: '
    f'{error}. Copy or download it again.'
  )
