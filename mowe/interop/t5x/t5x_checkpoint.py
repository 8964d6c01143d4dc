"""Checkpoints of T5X, read and written without t5x.

There are two layouts of the same tree (`t5x_tree`): the legacy one, which all
released checkpoints have (`t5x_legacy`), and that of Orbax, which is today's
default (`t5x_orbax`). A checkpoint is a folder `checkpoint_<step>` in the
folder of a run.
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
  """A module that writes checkpoints: `t5x_legacy` or `t5x_orbax`."""

  def write(self, folder, state):
    """Writes the arrays of a tree, which are given by path, to a new folder."""


def find(path: str | os.PathLike) -> pathlib.Path | None:
  """Returns the folder of a checkpoint of T5X, or None if there is none.

  Args:
    path: the folder of a checkpoint, or a folder with several, of which the
      latest is taken.
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
    path: the folder of a checkpoint, or of several; see `find`.
    config: the config of the model; None if it is a dense T5, whose config
      follows from the shapes of the arrays.

  Raises:
    ValueError: the checkpoint is of another model; and the errors of `read`.
  """
  return t5x_tree.to_weights(read(path), config)


def read(path: str | os.PathLike) -> dict[weights.Path, weights.Array]:
  """Reads all arrays by path, as ('target', 'token_embedder', 'embedding').

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ValueError: the checkpoint is damaged, or was not finished.
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
    folder: the folder to write; it must not exist.
    given: the model; its moments are written if they are known.
    layout: `t5x_legacy` or `t5x_orbax`.

  Returns:
    The folder of the checkpoint in it.

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
