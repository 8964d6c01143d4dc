"""Config and vocabulary of a model folder, for gin files that go on from it."""

from typing import Any

from mowe.model_folders import model_folder
from mowe.models import model_config
from mowe.words import base_vocabulary


def config(
  *, checkpoint_path: str, dropout_rate: float, dtype: Any
) -> model_config.ModelConfig:
  """The config of a model folder, with settings of a run.

  Args:
    checkpoint_path: a model folder, or a checkpoint in it.
    dropout_rate: the dropout rate of this run.
    dtype: the dtype of activations.
  """
  folder, _ = model_folder.split_checkpoint_path(checkpoint_path)
  found, _ = model_folder.load_config(
    folder, dropout_rate=dropout_rate, dtype=dtype
  )
  return found


def vocabulary(*, checkpoint_path: str) -> base_vocabulary.Vocabulary:
  """The subword vocabulary of a model folder, or of one with the checkpoint."""
  folder, _ = model_folder.split_checkpoint_path(checkpoint_path)
  _, found = model_folder.load_config(folder)
  return found
