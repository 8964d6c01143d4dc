"""An expert as one record of bytes: its kernels in all tables, then its state.

Checkpoints, and stores outside the device, keep experts one by one, so that
those of a batch can be read and written alone. A record is an element of a
structured numpy array, whose fields are named by the paths of the arrays they
come from. All kernels come before the row state, so that the kernels are the
first bytes of a record and can be read without the rest.
"""

from typing import Any

import jax
import ml_dtypes
import numpy as np

from mowe.models import parameters

# How the names of fields begin. A model needs its kernels, and only training
# the state of the row optimizer.
_KERNELS = 'kernels/'
_STATE = 'state/'

# Kernels in bfloat16 are kept as their bits, in tables and in records.
_BITS = np.dtype('<u2')
_FLOAT = np.dtype('<f4')
# The bits of the exponent of a bfloat16, all of which NaN and infinity have.
_EXPONENT = np.uint16(0x7F80)


def record_dtype(
  tables: parameters.Tables, table_state: dict[str, Any]
) -> np.dtype:
  """The dtype of the record of one expert.

  Args:
    tables: path of a table -> kernel name -> array [num_experts, ...], which
      may be abstract.
    table_state: path of a table -> the state of its row optimizer, a tree of
      arrays [num_experts, ...]; {} if experts are frozen.
  """
  return np.dtype(
    [
      (name, np.dtype(leaf.dtype).newbyteorder('<'), tuple(leaf.shape[1:]))
      for name, leaf in _named(tables, table_state)
    ]
  )


def abstract_tables(dtype: np.dtype) -> parameters.Tables:
  """The tables of one row each whose records have this dtype, abstract."""
  tables: parameters.Tables = {}
  for name in kernels_only(dtype).names:
    table, _, kernel = name.removeprefix(_KERNELS).rpartition('/')
    tables.setdefault(table, {})[kernel] = jax.ShapeDtypeStruct(
      (1, *dtype[name].shape), dtype[name].base
    )
  return tables


def kernels_only(dtype: np.dtype) -> np.dtype:
  """The dtype of a record without row state: its first bytes, up to there."""
  return np.dtype([one for one in dtype.descr if one[0].startswith(_KERNELS)])


def kernel_field(table: str, kernel: str) -> str:
  """The name of the field that holds a kernel."""
  return f'{_KERNELS}{table}/{kernel}'


def to_arrays(
  records: np.ndarray,
  tables: parameters.Tables,
  table_state: dict[str, Any],
) -> tuple[parameters.Tables, dict[str, Any]]:
  """Records [n] as arrays [n, ...] in the structure of these two trees.

  Args:
    records: a structured array [n].
    tables: the tables, which may be abstract; see `record_dtype`.
    table_state: the row state, which may be abstract; see `record_dtype`.
  """
  treedef = jax.tree.structure((tables, table_state))
  names = [name for name, _ in _named(tables, table_state)]
  return treedef.unflatten(
    [np.ascontiguousarray(records[name]) for name in names]
  )


def from_arrays(
  dtype: np.dtype, tables: parameters.Tables, table_state: dict[str, Any]
) -> np.ndarray:
  """Arrays [n, ...] on the host as records [n] of this dtype."""
  named = _named(tables, table_state)
  records = np.empty(len(named[0][1]), dtype)
  for name, leaf in named:
    records[name] = leaf
  return records


def converted(records: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """The records with other fields, or kernels in another precision.

  Fields that the records lack become zeros, which are a fresh row state. The
  caller asks `check_convertible` first whether that makes sense.

  Args:
    records: a structured array [n].
    dtype: the dtype of the result.
  """
  if records.dtype == dtype:
    return records
  result = np.zeros(records.shape, dtype)
  for name in dtype.names:
    if name in records.dtype.names:
      result[name] = _to_precision(records[name], dtype[name].base)
  return result


def check_convertible(old: np.dtype, new: np.dtype) -> str:
  """Says why records cannot be `converted`; an empty text if they can.

  Kernels must have the same names and shapes. Row state must have as well,
  unless one of the two sides has none at all.

  Args:
    old: the dtype of the records that are there.
    new: the dtype of the records that are wanted.
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


def not_finite(records: np.ndarray) -> np.ndarray:
  """Whether records [n] hold NaN or infinity, <bool>[n]."""
  found = np.zeros(len(records), bool)
  for name in records.dtype.names:
    values, base = records[name], records.dtype[name].base
    if base == _BITS and name.startswith(_KERNELS):
      is_bad = (values & _EXPONENT) == _EXPONENT
    elif base.kind == 'f':
      is_bad = ~np.isfinite(values)
    else:
      continue
    found |= is_bad.any(axis=tuple(range(1, is_bad.ndim)))
  return found


def to_json(dtype: np.dtype) -> list[list[Any]]:
  """The dtype of records as JSON, which `from_json` reads."""
  return [
    [name, dtype[name].base.str, list(dtype[name].shape)]
    for name in dtype.names
  ]


def from_json(fields: list[list[Any]]) -> np.dtype:
  """The dtype of records that `to_json` described."""
  return np.dtype([(name, base, tuple(shape)) for name, base, shape in fields])


def _named(tables, table_state) -> list[tuple[str, Any]]:
  """Every array of the two trees with the name of its field, kernels first."""
  parts = {_KERNELS: tables, _STATE: table_state}
  return [
    (prefix + jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
    for prefix, tree in parts.items()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _to_precision(values: np.ndarray, base: np.dtype) -> np.ndarray:
  """Kernels between float32 and the bits of bfloat16; all else unchanged."""
  if (values.dtype, base) == (_FLOAT, _BITS):
    return values.astype(ml_dtypes.bfloat16).view(_BITS)
  if (values.dtype, base) == (_BITS, _FLOAT):
    # The bits of a bfloat16 are the upper half of those of its float32.
    return (values.astype(np.uint32) << 16).view(np.float32)
  return values
