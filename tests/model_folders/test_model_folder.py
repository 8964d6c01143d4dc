"""Tests what is checked of a folder in which a run goes on."""

import own_layers
import pytest

from mowe.model_folders import model_folder
from mowe.models.families import saved_config


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('vocabulary.model', 'vocabulary.model'),
    ('routing_vocabulary.npz', 'routing_vocabulary.npz'),
  ],
)
def test_vocabularies_in_the_folder_are_those_of_the_run(
  world, tmp_path, name, message
):
  arguments = tmp_path / 'run', world.config(), world.vocabulary
  folder = model_folder.create(*arguments)
  assert model_folder.create(*arguments) == folder
  file = folder / name
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    model_folder.create(*arguments)
  file.unlink()
  with pytest.raises(FileNotFoundError, match=name):
    model_folder.create(*arguments)


def test_a_run_with_a_layer_of_its_own_goes_on_without_trust(
  world, tmp_path, monkeypatch
):
  """The run has the layer already: nothing is imported for what a file says."""
  monkeypatch.setattr(saved_config, '_trusted', set())
  config = world.config(sparse_feed_forward=own_layers.PlainFeedForward)
  for _ in range(2):
    model_folder.create(tmp_path / 'run', config, world.vocabulary)
