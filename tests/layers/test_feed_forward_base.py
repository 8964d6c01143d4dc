"""Tests layers of users: they are trained, saved, read again, or refused."""

import dataclasses

import own_layers
import pytest

from mowe.commands import ask
from mowe.model_folders import model_folder
from mowe.models.families import saved_config
from mowe.training.optimization import optimizers


def _config(world, layer):
  return world.config(
    sparse=False,
    sparse_feed_forward=layer,
    sparse_encoder_layers=(0,),
    sparse_decoder_layers=(0,),
  )


@pytest.fixture
def trusted(monkeypatch):
  """Trusts the module with the layers until the test ends."""
  monkeypatch.setattr(saved_config, '_trusted', set())
  saved_config.trust('own_layers')


def _train(world, folder, layer, **changes):
  return world.train(
    folder, 2, model=_config(world, layer), row_optimizer=None, **changes
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('layer', 'optimizer'),
  [
    (own_layers.PlainFeedForward, optimizers.AdamW(1e-2)),
    (own_layers.ByParity, optimizers.Adafactor(1e-2)),
  ],
)
def test_a_layer_of_a_user_is_trained_saved_and_read(
  world, tmp_path, layer, optimizer, trusted
):
  folder = tmp_path / 'run'
  _train(world, folder, layer, optimizer=optimizer)
  loaded = model_folder.load(str(folder))
  assert type(loaded.model.config.sparse_layers()['encoder']) is layer
  assert len(ask.ask(str(folder), ['Who met Karl?'], max_length=3)) == 1


def test_a_module_that_is_not_trusted_is_not_imported(
  world, tmp_path, monkeypatch
):
  folder = tmp_path / 'run'
  _train(world, folder, own_layers.PlainFeedForward)
  monkeypatch.setattr(saved_config, '_trusted', set())
  with pytest.raises(ValueError, match='--trust_module own_layers, or call'):
    model_folder.load(str(folder))


def test_a_class_that_could_not_be_imported_is_not_saved(world):
  @dataclasses.dataclass
  class Local(own_layers.PlainFeedForward):
    pass

  with pytest.raises(ValueError, match='Move the class to a module of its own'):
    saved_config.to_json(_config(world, Local))


def test_a_layer_that_looks_ahead_is_refused_in_a_decoder(world):
  with pytest.raises(ValueError, match='must not depend on later tokens'):
    _config(world, own_layers.LooksAhead)
