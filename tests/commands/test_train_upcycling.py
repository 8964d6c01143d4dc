"""Tests a run with experts that starts from the checkpoint of a dense model."""

import functools

import jax
import numpy as np
import pytest

from mowe.layers.mixtures import moe
from mowe.layers.routers import tokens_choose
from mowe.model_folders import model_folder


@pytest.fixture(scope='module')
def dense_folder(world, tmp_path_factory):
  folder = tmp_path_factory.mktemp('dense') / 'run'
  jax.config.update('jax_disable_most_optimizations', True)
  world.train(folder, 1, model=world.config(sparse=False))
  return folder


def _config(world, routing, **layer):
  return world.config(
    sparse=False,
    sparse_feed_forward=functools.partial(
      moe.MoeLayer, 4, 14, routing=routing, **layer
    ),
    sparse_encoder_layers=(0,),
    sparse_decoder_layers=(0,),
  )


@pytest.mark.slow
def test_a_run_starts_from_copies_and_resumes(world, dense_folder, tmp_path):
  config = _config(world, tokens_choose.TokensChoose(2, renormalize=True))
  start = functools.partial(
    world.train,
    tmp_path / 'run',
    model=config,
    initial_checkpoint_path=str(dense_folder),
  )
  assert int(start(1).step) == 1
  loaded = model_folder.load(str(tmp_path / 'run'))
  assert loaded.model.config.make_sparse_layers() == config.make_sparse_layers()
  dense = model_folder.load(str(dense_folder)).params
  old = np.asarray(dense['encoder']['layers_0']['mlp']['wo']['kernel'])
  new = np.asarray(
    loaded.params['encoder']['layers_0']['mlp']['expert']['wo']['kernel']
  )
  # One update of AdamW changes a number by at most its learning rate.
  assert new.shape == (4, *old.shape)
  assert 0 < np.abs(new - old[None]).max() < 0.02
  # The second step continues the run, and does not start from the dense model.
  assert int(start(2).step) == 2


def test_raw_scores_are_refused_before_anything_is_trained(
  world, dense_folder, tmp_path
):
  with pytest.raises(ValueError, match='weights of a token must add up to one'):
    world.train(
      tmp_path / 'run',
      1,
      model=_config(world, tokens_choose.TokensChoose()),
      initial_checkpoint_path=str(dense_folder),
    )
