"""Reads and writes the description of a model in the folder of its weights.

  vocabulary.model        SentencePiece model, a copy (unless bytes are read)
  routing_vocabulary.npz  a copy, for models with word experts

Beside them a JSON file holds the description: the config, and the digests of
the vocabularies, which are compared when they are loaded.
"""

import pathlib
from typing import Any

from mowe.models import model_config, token_memories
from mowe.models.families import saved_config
from mowe.words import (
  atomic_files,
  base_vocabulary,
  byte_vocabulary,
  json_files,
  routing_vocabulary,
  subword_vocabularies,
)

_FORMAT = 'mowe model'
_VERSION = 1
_SUBWORDS = 'vocabulary.model'
_ROUTING = 'routing_vocabulary.npz'

# Limits above the sizes of every model, against damaged files and those of
# strangers: a model of them is built before its weights are read.
_SIZES = {
  'vocab_size': 2**24,
  'emb_dim': 2**20,
  'num_heads': 2**14,
  'head_dim': 2**14,
  'mlp_dim': 2**22,
  'num_layers': 2**12,
  'num_encoder_layers': 2**12,
  'num_decoder_layers': 2**12,
}
_DTYPES = ('float32', 'bfloat16')


def describe(
  config: model_config.ModelConfig, vocabulary: base_vocabulary.Vocabulary
) -> dict[str, Any]:
  """The description, as a tree of JSON values."""
  is_bytes = isinstance(vocabulary, byte_vocabulary.ByteVocabulary)
  return {
    'format': _FORMAT,
    'version': _VERSION,
    'config': saved_config.to_json(config),
    'subwords': {
      'file': 'bytes' if is_bytes else _SUBWORDS,
      'extra_ids': vocabulary.extra_ids,
      'sha256': vocabulary.sha256,
    },
    'routing': None
    if config.routing is None
    else {'file': _ROUTING, 'sha256': config.routing.sha256},
    'addresses': {
      name: address.fingerprint
      for name, address in token_memories.addresses(config).items()
    },
  }


def write_vocabularies(
  folder: pathlib.Path,
  config: model_config.ModelConfig,
  vocabulary: base_vocabulary.Vocabulary,
) -> None:
  """Writes the files that a description names."""
  if not isinstance(vocabulary, byte_vocabulary.ByteVocabulary):
    content = pathlib.Path(vocabulary.path).read_bytes()
    atomic_files.write_atomically(folder / _SUBWORDS, content)
  if config.routing is not None:
    config.routing.save(folder / _ROUTING)


def read(file: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file that holds a description.

  Raises:
    ValueError: it is not a JSON object.
  """
  return json_files.read_object(file, 'Restore the file.')


def load(
  file: pathlib.Path, described: dict[str, Any], **changes: Any
) -> tuple[model_config.ModelConfig, base_vocabulary.Vocabulary]:
  """Config and subword vocabulary of a description.

  Args:
    file: the file of the description; the vocabularies lie beside it.
    described: the content of the file, as `read` returns it.
    **changes: values of config fields that replace the saved ones.

  Raises:
    ValueError: another version, or a vocabulary that is not the one it names.
  """
  if described.get('version') != _VERSION:
    raise ValueError(
      f'{file} must have version {_VERSION}, but has '
      f'{described.get("version")}. Use the version of mowe that wrote it.'
    )
  try:
    return _load(file, described, changes)
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{file} must describe a model of mowe, but reading it failed: '
      f'{type(error).__name__}: {error}. Restore the file.'
    ) from error


def load_vocabularies(
  file: pathlib.Path, described: dict[str, Any]
) -> tuple[
  base_vocabulary.Vocabulary, routing_vocabulary.RoutingVocabulary | None
]:
  """The subword and the routing vocabulary that a description names.

  Args:
    file: the file of the description; the vocabularies lie beside it.
    described: the content of the file, as `read` returns it.

  Raises:
    FileNotFoundError: a vocabulary is not there.
    ValueError: a vocabulary is not the one that the description names.
  """
  saved = described['subwords']
  name = saved['file']
  vocabulary = subword_vocabularies.load_subwords(
    name if name == 'bytes' else file.parent / _SUBWORDS, saved['extra_ids']
  )
  _check_digest(file, 'subword', _SUBWORDS, saved, vocabulary)
  routing = None
  if described['routing'] is not None:
    routing = routing_vocabulary.load(file.parent / _ROUTING)
    _check_digest(file, 'routing', _ROUTING, described['routing'], routing)
  return vocabulary, routing


def _load(file, described, changes):
  _check_sizes(file, described['config'])
  vocabulary, routing = load_vocabularies(file, described)
  config = saved_config.from_json(described['config'], routing, **changes)
  _check_addresses(file, described['addresses'], config)
  return config, vocabulary


def _check_sizes(file, config):
  """Raises unless sizes and dtype can be, before anything is made of them."""
  for name, largest in _SIZES.items():
    size = config.get(name, 1)
    if type(size) is not int or not 1 <= size <= largest:
      raise ValueError(
        f'{name} of {file} must be a number from 1 to {largest}, but is '
        f'{size!r:.60}. Restore the file.'
      )
  rate = config.get('dropout_rate', 0.0)
  if type(rate) not in (int, float) or not 0 <= rate < 1:
    raise ValueError(
      f'dropout_rate of {file} must be a number from 0 to below 1, but is '
      f'{rate!r:.60}. Restore the file.'
    )
  dtype = config.get('dtype', _DTYPES[0])
  if dtype not in _DTYPES:
    raise ValueError(
      f'dtype of {file} must be one of {_DTYPES}, but is {dtype!r:.60}. '
      'Restore the file.'
    )


def _check_addresses(file, saved, config):
  """Raises unless the memories name the same rows as when they were trained."""
  for name, address in token_memories.addresses(config).items():
    found, expected = address.fingerprint, saved.get(name)
    if found != expected:
      raise ValueError(
        f'The memory {name!r} of {file} must be addressed as it was '
        f'trained, with the fingerprint {expected}, but its address has '
        f'{found}. Restore the file.'
      )


def _check_digest(file, kind, name, saved, loaded):
  if saved['sha256'] != loaded.sha256:
    raise ValueError(
      f'{file} must name the {kind} vocabulary beside it, sha256 '
      f'{saved["sha256"]}, but {name} has {loaded.sha256}. Restore the file that '
      'the model was trained with.'
    )
