"""Reading a zarr array, in any store that tensorstore knows."""

import os
from typing import Any

import numpy as np
import tensorstore

from mowe.interop import weights

AGAIN = 'It was damaged, cut short or not finished: fetch it again.'


class ZarrArray:
  """An array that is read when it is used; see `weights.Array`.

  Args:
    place: the path of the array, for errors.
    kvstore: the store of the array, as tensorstore describes it.
    driver: 'zarr' or 'zarr3'.

  Attributes:
    place: the path of the array.
    shape: the shape of the array.
    dtype: the dtype of the array.

  Raises:
    ValueError: there is no array, it is not of floating point or signed
      integers, or it is damaged; the last may be raised when it is read.
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
      # All chunks of an array are written, also those of zeros. So one that is
      # missing was lost, and must not be read as zeros.
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
    """Returns the result of a task of tensorstore; explains its errors."""
    try:
      return start().result()
    except ValueError as error:
      reason = str(error).split(' [')[0]
      raise ValueError(
        f'{self.place} must be a whole zarr array, but reading it failed: '
        f'{reason}. {AGAIN}'
      ) from None


def check_dtype(place: str | os.PathLike, dtype: np.dtype) -> None:
  """Raises ValueError for a dtype that neither weights nor steps have."""
  if dtype not in weights.FLOATS and dtype not in (np.int32, np.int64):
    raise ValueError(
      f'{place} must be of floating point or signed integers, but is {dtype}. '
      'Save it in float32 or bfloat16.'
    )
