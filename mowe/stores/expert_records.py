"""An expert as one record of bytes: its kernels in all tables, then its state.

Stores outside the device and checkpoints keep experts one by one, so that those
of a batch can be read and written alone. A record is an element of a structured
numpy array, whose fields are named by the paths of the arrays they come from.
"""

from typing import Any

import jax
import ml_dtypes
import numpy as np

from mowe.models import parameters

# Fields of these names are what a model needs without its optimizer.
_KERNELS = 'kernels/'
_STATE = 'state/'

# How bfloat16 is kept, in tables as in records: by its bits.
_BITS = np.dtype('<u2')
_FLOAT = np.dtype('<f4')


def record_dtype(
  tables: parameters.Tables, table_state: dict[str, Any]
) -> np.dtype:
  """The record of one expert; arrays may be abstract.

  Args:
    tables: table -> kernel -> [num_experts, ...].
    table_state: table -> row state, leaves [num_experts, ...]; {} if frozen.
  """
  return np.dtype(
    [
      (name, np.dtype(leaf.dtype).newbyteorder('<'), tuple(leaf.shape[1:]))
      for name, leaf in _named(tables, table_state)
    ]
  )


def kernels_only(dtype: np.dtype) -> np.dtype:
  """The record without row state: the same first bytes."""
  return np.dtype([one for one in dtype.descr if one[0].startswith(_KERNELS)])


def kernel_field(table: str, kernel: str) -> str:
  """Name of the field of a kernel."""
  return f'{_KERNELS}{table}/{kernel}'


def to_arrays(
  records: np.ndarray,
  tables: parameters.Tables,
  table_state: dict[str, Any],
) -> tuple[parameters.Tables, dict[str, Any]]:
  """Records [n] as arrays [n, ...] in the structure of these two trees."""
  treedef = jax.tree.structure((tables, table_state))
  names = [name for name, _ in _named(tables, table_state)]
  return treedef.unflatten(
    [np.ascontiguousarray(records[name]) for name in names]
  )


def from_arrays(
  dtype: np.dtype, tables: parameters.Tables, table_state: dict[str, Any]
) -> np.ndarray:
  """Arrays [n, ...] on the host as records [n]."""
  named = _named(tables, table_state)
  records = np.empty(len(named[0][1]), dtype)
  for name, leaf in named:
    records[name] = leaf
  return records


def converted(records: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """The records with other fields or another precision of kernels.

  Fields that they lack are zeros: a fresh row state. `check_convertible` says
  whether that makes sense.
  """
  if records.dtype == dtype:
    return records
  result = np.zeros(records.shape, dtype)
  for name in dtype.names:
    if name in records.dtype.names:
      result[name] = _to_precision(records[name], dtype[name].base)
  return result


def check_convertible(old: np.dtype, new: np.dtype) -> str:
  """What keeps records from becoming others; empty if nothing does.

  Kernels must have the same names and shapes. Row state must as well, unless
  there is none of it on one of the two sides.
  """
  sides = {'there': old, 'here': new}
  fields = {
    side: {name: dtype[name].shape for name in dtype.names}
    for side, dtype in sides.items()
  }
  stateless = [
    not any(name.startswith(_STATE) for name in names)
    for names in fields.values()
  ]
  problems = []
  for name in {**fields['here'], **fields['there']}:
    if any(stateless) and name.startswith(_STATE):
      continue
    shapes = [fields[side].get(name, 'absent') for side in sides]
    if shapes[0] != shapes[1]:
      problems.append(f'{name}: {shapes[0]} there, {shapes[1]} here')
  return '; '.join(problems[:3])


def to_json(dtype: np.dtype) -> list[list[Any]]:
  """What `from_json` reads."""
  return [
    [name, dtype[name].base.str, list(dtype[name].shape)]
    for name in dtype.names
  ]


def from_json(fields: list[list[Any]]) -> np.dtype:
  """The dtype of records that were described by `to_json`."""
  return np.dtype([(name, base, tuple(shape)) for name, base, shape in fields])


def _named(tables, table_state) -> list[tuple[str, Any]]:
  """Every array with the name of its field, kernels first."""
  parts = {_KERNELS: tables, _STATE: table_state}
  return [
    (prefix + jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
    for prefix, tree in parts.items()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _to_precision(values: np.ndarray, base: np.dtype) -> np.ndarray:
  if (values.dtype, base) == (_FLOAT, _BITS):
    return values.astype(ml_dtypes.bfloat16).view(_BITS)
  if (values.dtype, base) == (_BITS, _FLOAT):
    return (values.astype(np.uint32) << 16).view(np.float32)
  return values
