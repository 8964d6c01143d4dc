"""Descriptions of models that may come from strangers."""

import copy
import json

import pytest
import tiny_training

from mowe.models.families import model_description
from mowe.words import byte_vocabulary


@pytest.fixture(scope='module')
def described():
  config = tiny_training.make_config(sparse=False, vocab_size=384)
  return model_description.describe(config, byte_vocabulary.ByteVocabulary(0))


def _load(folder, described):
  file = folder / 'model.json'
  file.write_text(json.dumps(described))
  return model_description.load(file, model_description.read(file))


def test_what_was_described_is_read_again(tmp_path, described):
  config, vocabulary = _load(tmp_path, described)
  assert model_description.describe(config, vocabulary) == described


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('num_encoder_layers', 2**20, 'from 1 to 4096, but is 1048576. Restore'),
    ('num_decoder_layers', '3', "from 1 to 4096, but is '3'"),
    ('emb_dim', 24.0, 'must be a number from 1 to .* but is 24.0'),
    ('emb_dim', True, 'but is True'),
    ('vocab_size', -1, 'but is -1'),
    ('num_heads', [4] * 1000, r'but is \[4, 4, .{50,60}\. Restore'),
    ('dropout_rate', '0.1', "from 0 to below 1, but is '0.1'"),
    ('dropout_rate', 1, 'but is 1. Restore'),
    ('dtype', 'object', "dtype of .* must be one of .* but is 'object'"),
    ('dtype', ['float32'], 'must be one of'),
  ],
)
def test_absurd_values_are_refused_before_anything_is_built(
  tmp_path, described, name, value, message
):
  changed = copy.deepcopy(described)
  changed['config'][name] = value
  with pytest.raises(ValueError, match=message):
    _load(tmp_path, changed)


@pytest.mark.parametrize('content', ['', '[1]', '{"a": ', '[' * 10**5])
def test_what_is_no_object_is_named(tmp_path, content):
  (tmp_path / 'model.json').write_text(content)
  with pytest.raises(
    ValueError, match='model.json must be .* Restore the file'
  ):
    model_description.read(tmp_path / 'model.json')
