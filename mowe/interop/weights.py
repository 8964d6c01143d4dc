"""What every format is read into and written from: a model and its arrays."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol

import flax
import jax
import ml_dtypes
import numpy as np

from mowe.interop import rules
from mowe.models import initialization, t5
from mowe.words import subwords

# Of a piece of a large array that is on its way.
_PIECE_BYTES = 2**26

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {np.dtype(np.float32), np.dtype(np.float16), BFLOAT16}

Path = tuple[str, ...]


class Array(Protocol):
  """An array on the host or in a file, which is read a slice at a time."""

  shape: tuple[int, ...]
  dtype: np.dtype

  def __getitem__(self, rows: slice) -> np.ndarray:
    """Rows of the first axis; all of it for `...`."""


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model with its parameters, and what else a checkpoint may have.

  Attributes:
    config: of the model.
    params: all parameters by path, in the model's dtypes; tables of bfloat16
      are arrays of bfloat16, not of its bits.
    step: how many updates were made.
    moments: state of Adafactor: `v_row`, `v_col`, `v`, `m`, each with an array
      for every parameter; None: not known.
    vocabulary: the subword vocabulary; None: not known.
  """

  config: t5.T5Config
  params: Mapping[Path, Array]
  step: int = 0
  moments: Mapping[str, Mapping[Path, Array]] | None = None
  vocabulary: subwords.Subwords | None = None


def shapes(config: t5.T5Config) -> dict[Path, jax.ShapeDtypeStruct]:
  """Shape and dtype of every parameter of a model, in `Weights`."""
  abstract = initialization.abstract_variables(t5.T5(config))['params']
  flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(abstract))
  # A table of bfloat16 is an array of its bits in the model.
  return {
    path: jax.ShapeDtypeStruct(
      leaf.shape, BFLOAT16 if leaf.dtype == np.uint16 else leaf.dtype
    )
    for path, leaf in flat.items()
  }


def for_model(
  params: Mapping[Path, Array], config: t5.T5Config, source: str
) -> dict[Path, Array]:
  """The parameters in the order and in the precision of the model.

  Args:
    params: by path.
    config: of the model.
    source: what describes the model, for errors.

  Raises:
    ValueError: parameters that are missing, too many, of another shape or of a
      dtype that the model's cannot hold.
  """
  wanted = shapes(config)
  named = lambda arrays: {'/'.join(path): one for path, one in arrays.items()}
  rules.check_names(named(params), named(wanted), source)
  found = {}
  for path, leaf in wanted.items():
    dtype = np.dtype(params[path].dtype)
    holds = {dtype, np.dtype(leaf.dtype)} <= FLOATS
    if not holds or (leaf.dtype == BFLOAT16 and dtype != BFLOAT16):
      raise ValueError(
        f'Parameters must be of a dtype that {leaf.dtype} of the model can '
        f'hold, but {"/".join(path)} is {dtype}. Take weights of the precision '
        'that the model says.'
      )
    same = dtype == leaf.dtype
    found[path] = params[path] if same else Cast(params[path], leaf.dtype)
  return found


def pieces(array: Array, rows: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
  """An array in slices of its first axis, so many megabytes at a time.

  Args:
    array: of any rank.
    rows: the number of rows of a slice is a multiple of it.

  Yields:
    The slice, `...` for an array without axes, and its rows.
  """
  if not array.shape:
    yield ..., np.asarray(array[...])
    return
  num_rows = array.shape[0]
  bytes_of_row = num_bytes(array) // max(1, num_rows)
  step = rows * max(1, _PIECE_BYTES // max(1, bytes_of_row) // rows)
  for first in range(0, num_rows, step):
    where = slice(first, min(first + step, num_rows))
    yield where, np.asarray(array[where])


def num_bytes(array: Array) -> int:
  """Bytes of an array, wherever it is."""
  return int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Cast:
  """An array in another precision, made when it is read."""

  array: Array
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array."""
    return self.array.shape

  def __getitem__(self, rows: slice) -> np.ndarray:
    """See `Array`."""
    return np.asarray(self.array[rows]).astype(self.dtype, copy=False)
