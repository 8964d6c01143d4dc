"""Our own folder of safetensors: every model of this package, and its words.

config.json             "model_type": "mowe", and what is in model.json of a
                        model folder: config, digests of the vocabularies
model.safetensors       the parameters by their names, whole or in parts
vocabulary.model        a copy of the vocabulary (unless the model reads bytes)
routing_vocabulary.npz  a copy of the routing vocabulary, for models with word
                        experts

The folder has all that a model needs to answer. Tables of word experts are
written and read a piece at a time. Nothing in it is executed: see
`saved_config`.
"""

import os
import pathlib

from mowe.interop import safetensors_folder, weights
from mowe.models.families import model_description

MODEL_TYPE = 'mowe'


def load(folder: str | os.PathLike) -> weights.Weights:
  """Reads a model; its arrays are views of the files.

  Raises:
    FileNotFoundError: the folder, or a file of it, is not there.
    ValueError: weights are damaged, missing, too many or of another shape, or
      the vocabularies are not those of the model.
  """
  described, tensors = safetensors_folder.read(folder)
  described = dict(described)
  kind, step = described.pop('model_type', None), described.pop('step', 0)
  file = pathlib.Path(folder) / safetensors_folder.CONFIG
  if kind != MODEL_TYPE:
    raise ValueError(
      f'{file} must have model_type {MODEL_TYPE!r}, but has {kind!r}. It is '
      'of another framework.'
    )
  step = weights.check_step(step, str(file))
  config, vocabulary = model_description.load(file, described)
  params = {tuple(name.split('/')): array for name, array in tensors.items()}
  return weights.Weights(
    config,
    weights.for_model(params, config, str(file)),
    step,
    vocabulary=vocabulary,
  )


def save(
  folder: str | os.PathLike,
  given: weights.Weights,
  *,
  max_file_bytes: int = 5 * 10**9,
) -> None:
  """Writes a new folder, which is there complete or not at all.

  Args:
    folder: the folder to write; it must not exist.
    given: the model, with its vocabulary; moments are not written.
    max_file_bytes: bytes of weights in one file; a larger table has a file of
      its own.

  Raises:
    FileExistsError: the folder is there.
    ValueError: the vocabulary is not known.
  """
  vocabulary = weights.needs_vocabulary(given)
  described = model_description.describe(given.config, vocabulary)
  safetensors_folder.write(
    folder,
    {'model_type': MODEL_TYPE, 'step': given.step} | described,
    {'/'.join(path): array for path, array in given.params.items()},
    max_file_bytes=max_file_bytes,
    attach=lambda partial: model_description.write_vocabularies(
      partial, given.config, vocabulary
    ),
  )
