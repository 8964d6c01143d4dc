"""Tests the state a run begins with: its place, and what is not computed."""

import functools

import jax
import numpy as np
import pytest

from mowe.layers.memory import word_experts
from mowe.model_folders import initial_state
from mowe.models import initialization
from mowe.models.t5 import t5, t5_config
from mowe.training import checkpointing, partitioning
from mowe.training.optimization import optimizers, row_optimizers


def _setup(frozen=False, seed=0, **mesh_sizes):
  config = t5_config.T5Config(
    vocab_size=32,
    emb_dim=24,
    num_heads=4,
    head_dim=2,
    mlp_dim=20,
    num_encoder_layers=1,
    num_decoder_layers=1,
    sparse_feed_forward=functools.partial(word_experts.MoweLayer, 12, 4),
    sparse_encoder_layers=(0,),
  )
  mesh = partitioning.make_mesh(
    **mesh_sizes, devices=None if mesh_sizes else jax.devices()[:1]
  )
  return initial_state.Setup.make(
    t5.T5(config),
    optimizers.AdamW(1e-2),
    None if frozen else row_optimizers.RowAdafactor(1e-2),
    mesh,
    seed,
    batch_size=8,
  )


def _start(setup, folder, initial_path=None, save_as=None):
  """The state and its tables, which may be frozen."""
  folder.mkdir(exist_ok=True)
  with checkpointing.Checkpoints(folder) as saved:
    state, experts = setup.start(saved, {}, initial_path)
    if save_as is not None:
      saved.save(
        save_as,
        state.replace(step=state.step + save_as, tables={}, table_state={}),
        attach=lambda path: experts.save(path, state),
      )
    experts.close()
  return state, experts.tables(state)


def _assert_same_bits(actual, expected):
  jax.tree.map(
    np.testing.assert_array_equal, *jax.device_get((actual, expected))
  )


@pytest.fixture
def saved(tmp_path):
  """A folder with a state that was drawn from another seed."""
  setup = _setup(seed=1)
  state, _ = _start(setup, tmp_path / 'saved', save_as=3)
  return tmp_path / 'saved', state


@pytest.fixture
def no_drawing(monkeypatch):
  def refuse(*unused_arguments):
    raise AssertionError('Nothing is to be drawn.')

  monkeypatch.setattr(initialization, 'initial_parameters', refuse)
  monkeypatch.setattr(initialization, 'initial_rows', refuse)


@pytest.mark.slow
@pytest.mark.parametrize('frozen', [False, True], ids=['trained', 'frozen'])
def test_a_fresh_state_lies_where_it_belongs(tmp_path, frozen):
  setup = _setup(frozen, data=2, expert=2, model=2)
  state, tables = _start(setup, tmp_path)
  whole = state.replace(tables=tables)
  jax.tree.map(
    lambda x, abstract: np.testing.assert_equal(
      (x.shape, x.dtype, x.sharding),
      (abstract.shape, abstract.dtype, abstract.sharding),
    ),
    whole,
    setup.abstract,
  )
  assert bool(state.tables) != frozen
  expected, expected_tables = _start(_setup(frozen), tmp_path)
  _assert_same_bits((state, tables), (expected, expected_tables))


@pytest.mark.slow
def test_seeds_give_other_parameters(tmp_path):
  embeddings = [
    _start(_setup(seed=seed), tmp_path)[0].params['token_embedder']['embedding']
    for seed in (0, 1)
  ]
  assert not np.array_equal(*embeddings)


@pytest.mark.slow
def test_a_resumed_state_is_not_drawn(saved, no_drawing):
  folder, state = saved
  resumed, _ = _start(_setup(), folder)
  assert int(resumed.step) == 3
  _assert_same_bits(resumed.params, state.params)


@pytest.mark.slow
def test_finetuning_draws_nothing_and_begins_at_step_0(
  saved, tmp_path, no_drawing
):
  folder, state = saved
  setup = _setup(data=2, expert=2, model=2)
  tuned, _ = _start(setup, tmp_path / 'new', str(folder))
  assert int(tuned.step) == 0
  _assert_same_bits((tuned.params, tuned.tables), (state.params, state.tables))
  for leaf in jax.tree.leaves((tuned.opt_state, tuned.table_state)):
    assert not np.any(leaf)
  jax.tree.map(
    lambda x, abstract: np.testing.assert_equal(x.sharding, abstract.sharding),
    tuned,
    setup.abstract,
  )
