"""A cache of kernels, for models that read experts while they run."""

import collections
import threading
from collections.abc import Callable

import numpy as np

from mowe.stores.row_files import expert_records

# Bytes of kernels that are kept.
_MOST_BYTES = 2**28


class KernelCache:
  """Keeps the kernels that were asked for last; a `host_rows.RowsFrom`.

  Args:
    read: returns the records [n] of experts <int>[n].
    dtype: the dtype of a record as it is read; it may have row state, which is
      not kept.
    num_experts: how many experts there are; numbers beyond stand for none.
    most_bytes: how many bytes are kept between two calls.
  """

  def __init__(
    self,
    read: Callable[[np.ndarray], np.ndarray],
    dtype: np.dtype,
    num_experts: int,
    most_bytes: int = _MOST_BYTES,
  ):
    self._read = read
    self._dtype = expert_records.kernels_only(dtype)
    self._num_experts = num_experts
    self._most = max(1, most_bytes // self._dtype.itemsize)
    self._kept: collections.OrderedDict[int, np.void] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()

  def __call__(self, table: str, experts: np.ndarray) -> dict[str, np.ndarray]:
    """See `host_rows.RowsFrom`."""
    results = {
      name: np.zeros((len(experts), *self._dtype[field].shape), field_dtype)
      for name, field, field_dtype in self._fields(table)
    }
    is_there = (experts >= 0) & (experts < self._num_experts)
    with self._lock:
      # More than fit may be needed at once, so old ones leave at the end.
      self._keep(np.unique(experts[is_there]))
      for i in np.flatnonzero(is_there).tolist():
        record = self._kept[int(experts[i])]
        for name, field, _ in self._fields(table):
          results[name][i] = record[field]
      while len(self._kept) > self._most:
        self._kept.popitem(last=False)
    return results

  def clear(self) -> None:
    """Forgets all kernels, when experts have changed."""
    with self._lock:
      self._kept.clear()

  def _keep(self, experts):
    """Reads those of some experts that are missing, and marks all as new."""
    missing = []
    for expert in experts.tolist():
      if expert in self._kept:
        self._kept.move_to_end(expert)
      else:
        missing.append(expert)
    if not missing:
      return
    records = expert_records.converted(
      self._read(np.array(missing)), self._dtype
    )
    for expert, record in zip(missing, records, strict=True):
      # A copy, as a view would keep the records of all others alive.
      self._kept[expert] = record.copy()

  def _fields(self, table):
    """The name, the field and the dtype of each kernel of a table."""
    prefix = expert_records.kernel_field(table, '')
    return [
      (field.removeprefix(prefix), field, self._dtype[field].base)
      for field in self._dtype.names
      if field.startswith(prefix)
    ]
