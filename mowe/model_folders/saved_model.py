"""Config and vocabulary of a model folder, for gin files that start from it."""

from typing import Any

from mowe.model_folders import model_folder
from mowe.models import model_config
from mowe.words import base_vocabulary


def config(
  *, checkpoint_path: str, dropout_rate: float, dtype: Any
) -> model_config.ModelConfig:
  """The config of a model folder, with two settings replaced.

  Args:
    checkpoint_path: a model folder, or a checkpoint in it.
    dropout_rate: the dropout rate of the new run.
    dtype: the dtype of activations in the new run.
  """
  folder, _ = model_folder.split_checkpoint_path(checkpoint_path)
  found, _ = model_folder.load_config(
    folder, dropout_rate=dropout_rate, dtype=dtype
  )
  return found


def vocabulary(*, checkpoint_path: str) -> base_vocabulary.Vocabulary:
  """The subword vocabulary of a model folder, or of a checkpoint's folder."""
  folder, _ = model_folder.split_checkpoint_path(checkpoint_path)
  _, found = model_folder.load_config(folder)
  return found
