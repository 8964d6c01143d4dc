"""Reading an array of zarr, in whichever store it lies."""

import os
from typing import Any

import numpy as np
import tensorstore

from mowe.interop import weights

AGAIN = 'It was damaged, cut short or not finished: fetch it again.'


class ZarrArray:
  """An array that is read when it is used; see `weights.Array`.

  Args:
    place: where it lies, for errors.
    kvstore: where it lies, as tensorstore has it.
    driver: 'zarr' or 'zarr3'.

  Raises:
    ValueError: there is none, it is damaged (when that is met), or is not of
      floating point or signed integers.
  """

  def __init__(
    self,
    place: str | os.PathLike,
    kvstore: dict[str, Any],
    driver: str = 'zarr',
  ):
    self.place = os.fspath(place)
    spec = {
      'driver': driver,
      'kvstore': kvstore,
      # All of an array is written, zeros too: what is not there is lost.
      'fill_missing_data_reads': False,
    }
    self._store = self._result(lambda: tensorstore.open(spec, read=True))
    self.shape = tuple(self._store.shape)
    self.dtype = np.dtype(self._store.dtype.numpy_dtype)
    check_dtype(place, self.dtype)

  def __getitem__(self, rows: slice) -> np.ndarray:
    """See `weights.Array`."""
    return self._result(lambda: self._store[rows].read())

  def _result(self, start):
    try:
      return start().result()
    except ValueError as error:
      reason = str(error).split(' [')[0]
      raise ValueError(
        f'{self.place} must be a whole zarr array, but reading it failed: '
        f'{reason}. {AGAIN}'
      ) from None


def check_dtype(place: str | os.PathLike, dtype: np.dtype) -> None:
  """Raises ValueError for what is neither a weight nor a step."""
  if dtype not in weights.FLOATS and dtype not in (np.int32, np.int64):
    raise ValueError(
      f'{place} must be of floating point or signed integers, but is {dtype}. '
      'Save it in float32 or bfloat16.'
    )
