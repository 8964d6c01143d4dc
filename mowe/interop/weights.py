"""A model and its arrays: what all formats are read into, and written from."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import flax
import jax
import ml_dtypes
import numpy as np

from mowe.interop import rules
from mowe.models import initialization, model_config
from mowe.models.families import families
from mowe.words import base_vocabulary

# Bytes of a piece of a large array, of which one is in memory at a time.
_PIECE_BYTES = 2**26
# Training counts steps in an int32.
_LAST_STEP = 2**31 - 1

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {np.dtype(np.float32), np.dtype(np.float16), BFLOAT16}

Path = tuple[str, ...]


class Array(Protocol):
  """An array on the host or in a file, which is read a slice at a time."""

  shape: tuple[int, ...]
  dtype: np.dtype

  def __getitem__(self, rows: slice) -> np.ndarray:
    """Returns rows of the first axis, or the whole array for `...`."""


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model with its parameters, and what else a checkpoint may have.

  Attributes:
    config: the config of the model.
    params: all parameters by path, in the model's dtypes; tables in bfloat16
      are arrays of bfloat16, not of its bits.
    step: how many updates were made.
    moments: the state of Adafactor: `v_row`, `v_col`, `v`, `m`, each with an
      array for every parameter; None if it is not known.
    vocabulary: the subword vocabulary; None if it is not known.
    has_other_state: whether the checkpoint that was read has the state of an
      optimizer that is not in `moments`.
  """

  config: model_config.ModelConfig
  params: Mapping[Path, Array]
  step: int = 0
  moments: Mapping[str, Mapping[Path, Array]] | None = None
  vocabulary: base_vocabulary.Vocabulary | None = None
  has_other_state: bool = False


def shapes(
  config: model_config.ModelConfig,
) -> dict[Path, jax.ShapeDtypeStruct]:
  """Returns the shape and dtype of every parameter, as `Weights` has them."""
  abstract = initialization.abstract_variables(families.build(config))['params']
  flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(abstract))
  # In the model a table in bfloat16 is an array of its bits.
  return {
    path: jax.ShapeDtypeStruct(
      leaf.shape, BFLOAT16 if leaf.dtype == np.uint16 else leaf.dtype
    )
    for path, leaf in flat.items()
  }


def for_model(
  params: Mapping[Path, Array], config: model_config.ModelConfig, source: str
) -> dict[Path, Array]:
  """Returns the parameters in the order and in the precision of the model.

  Args:
    params: the parameters by path.
    config: the config of the model.
    source: what describes the model, for errors.

  Raises:
    ValueError: parameters are missing, too many, of another shape, or of a
      dtype whose values the model's dtype cannot hold.
  """
  blocks = sum(config.depths().values())
  if blocks > len(params):
    # A wrong depth is found here, before a model of that depth is built.
    raise ValueError(
      f'Parameters must be those of the model that {source} describes, but '
      f'there are {len(params):,} arrays for {blocks:,} blocks. Take both from '
      'the same checkpoint.'
    )
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


def check_step(step: Any, source: str) -> int:
  """Returns the number of updates that a checkpoint says, after a check.

  Args:
    step: what was found.
    source: where it was found, for the error.

  Raises:
    ValueError: it is not an integer from 0 to 2**31 - 1.
  """
  array = np.asarray(step)
  is_integer = array.shape == () and np.issubdtype(array.dtype, np.integer)
  if not is_integer or not 0 <= array <= _LAST_STEP:
    found = f'{list(array.shape)} of {array.dtype}' if array.shape else step
    raise ValueError(
      f'step of {source} must be a number of updates, from 0 to {_LAST_STEP}, '
      f'but is {found}. Take what was written with the weights.'
    )
  return int(array)


def pieces(array: Array, rows: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields an array in slices of its first axis, some megabytes at a time.

  Args:
    array: an array of any rank.
    rows: the number of rows of every slice but the last is a multiple of it.

  Yields:
    The slice, or `...` for an array without axes; and the array's rows there.
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
  """Returns the bytes that an array has, wherever it is."""
  return int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Cast:
  """An array in another precision, which is converted when it is read.

  Attributes:
    array: the array as it is.
    dtype: the dtype in which it is read.
  """

  array: Array
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the array."""
    return self.array.shape

  def __getitem__(self, rows: slice) -> np.ndarray:
    """See `Array`."""
    return np.asarray(self.array[rows]).astype(self.dtype, copy=False)


def needs_vocabulary(given: Weights) -> base_vocabulary.Vocabulary:
  """Returns the subword vocabulary of a model.

  Raises:
    ValueError: the vocabulary is not known, or has more ids than the model.
  """
  vocabulary, rows = given.vocabulary, given.config.vocab_size
  if vocabulary is None:
    raise ValueError(
      'A model that is to answer must come with its subword vocabulary, but '
      'what was read has none. Give it with --vocabulary: the spiece.model of '
      "the model, or 'bytes'."
    )
  if vocabulary.size > rows:
    raise ValueError(
      f'The vocabulary must have at most the {rows:,} ids of the model, but '
      f'has {vocabulary.size:,} with its {vocabulary.extra_ids} sentinels. '
      'Give the one that the model was trained with.'
    )
  return vocabulary


def digest(params: Mapping[Path, Array]) -> str:
  """Returns a sha256 of the names, shapes, dtypes and bits of parameters."""
  sha256 = hashlib.sha256()
  for path in sorted(params):
    array = params[path]
    kind = f'{"/".join(path)} {np.dtype(array.dtype)} {tuple(array.shape)}\n'
    sha256.update(kind.encode())
    for _, rows in pieces(array):
      sha256.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
  return sha256.hexdigest()


def rounded(params: Mapping[Path, Array]) -> dict[Path, Array]:
  """Returns the parameters in bfloat16."""
  return {path: Cast(array, BFLOAT16) for path, array in params.items()}
