"""An array in a file whose blocks are compared with checksums as they are read."""

import pathlib
import zlib

import numpy as np

# Bytes of a block. A batch reads from as many blocks as it has examples, and
# each is read whole once.
BLOCK = 1 << 16


def checksums(content: np.ndarray) -> np.ndarray:
  """Returns the CRC-32 of each block of an array, <uint32>[blocks]."""
  data = memoryview(content.reshape(-1).view(np.uint8))
  return np.array(
    [zlib.crc32(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)],
    np.uint32,
  )


class VerifiedArray:
  """A part of an array is compared with the checksums when it is first read.

  Several threads may read at once.

  Args:
    array: the array [length], such as a memory map.
    expected: what `checksums` gave when the array was written.
    path: the file of the array, for messages.

  Attributes:
    dtype: the dtype of the array.

  Raises (when it is read):
    ValueError: a block is not as it was written.
  """

  def __init__(
    self, array: np.ndarray, expected: np.ndarray, path: pathlib.Path
  ):
    self.dtype = array.dtype
    self._array = array
    self._expected = expected
    self._path = path
    self._is_verified = np.zeros(len(expected), bool)

  def __len__(self) -> int:
    return len(self._array)

  def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
    """Returns a slice without steps, or the numbers at places <int>[...]."""
    # A number never lies in two blocks, as their size is a power of two.
    if isinstance(part, slice):
      start, stop, step = part.indices(len(self._array))
      assert step == 1, step
      blocks = np.arange(
        start * self.dtype.itemsize // BLOCK,
        -(-stop * self.dtype.itemsize // BLOCK),
      )
    else:
      blocks = np.unique(np.asarray(part) * self.dtype.itemsize // BLOCK)
    self._verify(blocks[~self._is_verified[blocks]])
    return self._array[part]

  def whole(self) -> np.ndarray:
    """Returns all of it, after comparing all blocks."""
    return self[:]

  def _verify(self, blocks: np.ndarray) -> None:
    if not len(blocks):
      return
    data = memoryview(self._array.view(np.uint8))
    for block in blocks.tolist():
      at = block * BLOCK
      if zlib.crc32(data[at : at + BLOCK]) != self._expected[block]:
        raise ValueError(
          f'{self._path} must be as it was when the cache was built, but its '
          f'bytes {at:,} to {min(at + BLOCK, len(data)):,} have changed. Build '
          'the cache again (--overwrite).'
        )
      self._is_verified[block] = True
