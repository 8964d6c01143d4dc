"""Gin files of memories: their published sizes, and addresses after them."""

import math
import pathlib

import jax
import numpy as np
import pytest

from mowe.commands.gin_files import gin_config
from mowe.models import initialization, model_config, parameters
from mowe.models.families import families
from mowe.words import byte_vocabulary, vocabulary_builder

_ROOT = pathlib.Path(__file__).resolve().parent.parent / 'gin_configs'
_MEMORIES = sorted(path.stem for path in (_ROOT / 'memories').iterdir())
_LEARNED = ('memory_plus', 'peer')
_ADDRESSES = ('pieces', 'words', 'word_2grams', 'piece_2grams')
_VOCAB = 384


@pytest.fixture(scope='module')
def routing_path(tmp_path_factory):
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    ['a few words and a few more'],
    byte_vocabulary.ByteVocabulary(),
    num_words=5,
    num_experts=5,
    num_skipped=1,
  )
  path = tmp_path_factory.mktemp('routing') / 'words.npz'
  routing.save(path)
  return str(path)


def _config(files, **macros):
  macros = {'VOCABULARY_PATH': 'bytes', 'DTYPE': 'float32'} | macros
  bindings = [f'{name} = {value!r}' for name, value in macros.items()]
  gin_config.parse([f'gin_configs/{file}.gin' for file in files], bindings)
  return gin_config.made('MODEL')


def _macros(address, routing_path):
  """What an address needs, and no more: macros that nothing reads are refused."""
  words = {'ROUTING_VOCABULARY': routing_path} if 'word' in address else {}
  return words | ({'NGRAM_ROWS': 500} if 'grams' in address else {})


def _numbers(shape):
  return math.prod(shape)


def _tables(config):
  variables = initialization.abstract_variables(families.build(config))
  return parameters.split_tables(variables['params'])


def test_engram_has_the_published_rows():
  """Engram 27B has 5.7B numbers in two layers, each with its own rows."""
  config = _config(
    ['models/decoder_only_engram_base'],
    ROWS=(2_262_400, 2_262_400),
    BLOCKS=(1, 14),
    **{
      'mowe.models.token_memories.Memory.shares_rows': False,
      'mowe.models.decoder_only.decoder_only_config.DecoderOnlyConfig'
      '.num_layers': 30,
    },
  )
  _, tables = _tables(config)
  (leaf,) = jax.tree.leaves(tables)
  assert leaf.shape[1:] == (2, 80)
  assert _numbers(leaf.shape) == pytest.approx(5.79e9, rel=1e-3)


def test_per_layer_embeddings_have_the_published_table():
  """Gemma 3n and 4 E2B have 262,144 rows of 35 x 256 = 8,960 numbers."""
  config = _config(
    ['models/decoder_only_per_layer_base'],
    VOCAB_SIZE=262_144,
    BLOCKS=tuple(range(35)),
    **{
      'mowe.models.decoder_only.decoder_only_config.DecoderOnlyConfig'
      '.num_layers': 35
    },
  )
  _, tables = _tables(config)
  (leaf,) = jax.tree.leaves(tables)
  assert _numbers(leaf.shape) == 262_144 * 8_960


@pytest.mark.parametrize(
  ('name', 'leaf', 'tables'), [('memory_plus', 'values', 1), ('peer', 'up', 2)]
)
def test_learned_memories_have_a_million_rows(name, leaf, tables):
  """The values of Memory+ are shared; PEER has experts for each block."""
  ordinary, _ = _tables(_config([f'models/{name}_base']))
  found = [
    one.shape
    for path, one in jax.tree_util.tree_leaves_with_path(ordinary)
    if path[-1].key == leaf
  ]
  assert found == [(2**20, 768)] * tables


@pytest.mark.parametrize('address', _ADDRESSES)
@pytest.mark.parametrize(
  'memory', [name for name in _MEMORIES if name not in _LEARNED]
)
def test_every_memory_has_every_address(memory, address, routing_path):
  config = _config(
    [f'models/{memory}_tiny', f'addresses/{address}'],
    VOCAB_SIZE=_VOCAB,
    **_macros(address, routing_path),
  )
  (one,) = config.memories
  wanted = {'pieces': _VOCAB, 'words': 6, 'word_2grams': 503}.get(address, 503)
  # A bank of three rows for each row of the address.
  width = 3 if memory == 'l3' else 1
  assert (one.address.num_rows, one.address.num_slots) == (
    wanted * width,
    width,
  )
  assert (config.routing is None) == ('word' not in address)


@pytest.mark.parametrize('address', [*_ADDRESSES[:1], *_ADDRESSES[2:]])
def test_every_address_names_experts(address, routing_path):
  config = _config(
    ['models/mowe_tiny', 'addresses/names_experts', f'addresses/{address}'],
    VOCAB_SIZE=_VOCAB,
    NUM_EXPERTS=512,
    **_macros(address, routing_path),
  )
  names = model_config.names_experts(config)
  assert names.num_experts == 512
  tokens = np.array([[9, 30, 30, 0]], np.int32)
  ids = names.encoder_ids(tokens)
  assert ids[0, 3] == -1 and (ids[0, :3] >= 0).all() and ids.max() < 512
  # Only the address of pieces does not look back.
  assert (ids[0, 1] == ids[0, 2]) == (address == 'pieces')
