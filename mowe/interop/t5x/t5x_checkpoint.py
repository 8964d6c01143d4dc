"""Checkpoints of T5X, read and written without t5x.

Both layouts hold the same tree (`t5x_tree`): the legacy one, which all released
checkpoints have (`t5x_legacy`), and Orbax, today's default (`t5x_orbax`). A
checkpoint is a folder `checkpoint_<step>` in the folder of a run.
"""

import os
import pathlib
import re
from typing import Protocol

from mowe.interop import new_folder, weights
from mowe.interop.t5x import orbax_arrays, t5x_legacy, t5x_orbax, t5x_tree
from mowe.models import model_config

_NAME = re.compile(r'checkpoint_(\d+)')


class Layout(Protocol):
  """A module that writes a checkpoint: `t5x_legacy` or `t5x_orbax`."""

  def write(self, folder, state):
    """Writes the arrays of a tree, by path, to a new folder."""


def find(path: str | os.PathLike) -> pathlib.Path | None:
  """The checkpoint that a path means, None if it is not of T5X.

  Args:
    path: of a checkpoint, or of a folder with some, of which it is the latest.
  """
  folder = pathlib.Path(path)
  if _is_checkpoint(folder):
    return folder
  if not folder.is_dir():
    return None
  found = {
    int(_NAME.fullmatch(one.name)[1]): one
    for one in folder.iterdir()
    if _NAME.fullmatch(one.name) and _is_checkpoint(one)
  }
  return found[max(found)] if found else None


def load(
  path: str | os.PathLike, config: model_config.ModelConfig | None = None
) -> weights.Weights:
  """Reads a model, its step, and the state of Adafactor where there is one.

  Args:
    path: as for `find`.
    config: of the model; None: the dense T5 that its arrays are those of.

  Raises:
    ValueError: a checkpoint of another model; and the errors of `read`.
  """
  return t5x_tree.to_weights(read(path), config)


def read(path: str | os.PathLike) -> dict[weights.Path, weights.Array]:
  """All arrays by path, such as ('target', 'token_embedder', 'embedding').

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ValueError: it is damaged, or not finished.
  """
  folder = find(path)
  if folder is None:
    raise FileNotFoundError(
      f'{path} must be a checkpoint of T5X, with a file '
      f'{t5x_legacy.FILE_NAME} or a folder {t5x_orbax.STATE}, but is not. Give '
      'the folder checkpoint_<step>.'
    )
  is_legacy = (folder / t5x_legacy.FILE_NAME).is_file()
  return (t5x_legacy if is_legacy else t5x_orbax).read(folder)


def save(
  folder: str | os.PathLike, given: weights.Weights, layout: Layout
) -> pathlib.Path:
  """Writes a new folder with one checkpoint, which t5x and `load` read.

  Args:
    folder: where; must not be there.
    given: the model; moments are written where there are some.
    layout: `t5x_legacy` or `t5x_orbax`.

  Returns:
    The checkpoint in it.

  Raises:
    FileExistsError: the folder is there.
  """
  name = f'checkpoint_{given.step}'
  with new_folder.new_folder(folder) as partial:
    layout.write(partial / name, t5x_tree.from_weights(given))
  return pathlib.Path(folder) / name


def _is_checkpoint(folder):
  state = folder / t5x_orbax.STATE
  return (folder / t5x_legacy.FILE_NAME).is_file() or (
    (state / orbax_arrays.METADATA).is_file()
  )
