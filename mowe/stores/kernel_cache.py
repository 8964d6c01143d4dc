"""Kernels of experts for models that read them while they run."""

import collections
import threading
from collections.abc import Callable

import numpy as np

from mowe.stores import expert_records

_MOST_BYTES = 2**28


class KernelCache:
  """Keeps the experts that were asked for last; a `host_rows.RowsFrom`.

  Args:
    read: experts <int>[n] to records [n].
    dtype: of a record; row state may be among its fields.
    num_experts: that there are.
    most_bytes: of what is kept.
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
      self._keep(np.unique(experts[is_there]))
      for i in np.flatnonzero(is_there).tolist():
        record = self._kept[int(experts[i])]
        for name, field, _ in self._fields(table):
          results[name][i] = record[field]
      while len(self._kept) > self._most:
        self._kept.popitem(last=False)
    return results

  def clear(self) -> None:
    """Forgets all: they have changed."""
    with self._lock:
      self._kept.clear()

  def _keep(self, experts):
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
      # A copy: a view would keep all the others alive.
      self._kept[expert] = record.copy()

  def _fields(self, table):
    """Kernel name, field and dtype of each kernel of a table."""
    prefix = expert_records.kernel_field(table, '')
    return [
      (field.removeprefix(prefix), field, self._dtype[field].base)
      for field in self._dtype.names
      if field.startswith(prefix)
    ]
