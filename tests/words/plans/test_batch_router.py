"""Tests that batches get the model's routing ids and plans, for each stream."""

import concurrent.futures

import jax.numpy as jnp
import numpy as np
import pytest

from mowe.words.plans import batch_router


@pytest.fixture(scope='module')
def make_batch(tiny, texts):
  def make(seed, packed=False):
    rng = np.random.default_rng(seed)
    rows = np.zeros((4, 14), np.int32)
    for row in rows:
      ids = tiny.encode(texts[rng.integers(len(texts))])[: rng.integers(3, 14)]
      row[: len(ids) + 1] = [*ids, tiny.eos_id]
    targets = rows[::-1, :9]
    batch = {
      'encoder_input_tokens': rows,
      'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
      'decoder_target_tokens': targets,
    }
    if packed:
      batch['encoder_segment_ids'] = np.where(np.arange(14) < 5, 1, 2) * (
        rows > 0
      )
      batch['decoder_segment_ids'] = np.where(np.arange(9) < 4, 1, 2) * (
        targets > 0
      )
    return batch

  return make


def _router(routing, make_batch, streams=('encoder', 'decoder'), **settings):
  return batch_router.BatchRouter(
    routing,
    streams=streams,
    trial_batches=[make_batch(seed) for seed in range(3)],
    **settings,
  )


@pytest.mark.slow
@pytest.mark.parametrize('packed', [False, True])
def test_ids_are_those_that_the_model_makes(routing, make_batch, packed):
  batch = make_batch(5, packed)
  routed = batch_router.add_routing_ids(batch, routing)
  assert {k: v for k, v in routed.items() if 'routing' not in k} == batch
  for stream, method in (
    ('encoder', routing.encoder_ids),
    ('decoder', routing.decoder_ids),
  ):
    tokens = jnp.asarray(batch[f'{stream}_input_tokens'])
    segments = batch.get(f'{stream}_segment_ids')
    ids = routed[f'{stream}_routing_ids']
    assert isinstance(ids, np.ndarray) and ids.dtype == np.int32
    np.testing.assert_array_equal(
      ids, method(tokens, None if segments is None else jnp.asarray(segments))
    )


def test_segments_cut_words(routing, make_batch):
  batch = make_batch(5, packed=True)
  with_segments = batch_router.add_routing_ids(batch, routing)
  for stream in ('encoder', 'decoder'):
    del batch[f'{stream}_segment_ids']
  without = batch_router.add_routing_ids(batch, routing)
  name = 'encoder_routing_ids'
  assert (with_segments[name] != without[name]).any()


@pytest.mark.parametrize('number', [1, 2])
def test_every_token_finds_its_expert_in_the_plan(routing, make_batch, number):
  batch, plan = _router(routing, make_batch, num_microbatches=number)(
    make_batch(7)
  )
  for name in ('encoder', 'decoder'):
    stream = getattr(plan, name)
    ids = batch[f'{name}_routing_ids']
    for part in range(number):
      take = lambda x, part=part: x if number == 1 else x[part]
      # The expert of each slot, class after class.
      of_slot = np.concatenate(
        [
          np.repeat(take(experts), take(sources).shape[1])
          for experts, sources in zip(*stream.classes, strict=True)
        ]
      )
      slots, wanted = take(stream.slots), ids[part::number]
      real = (wanted >= 0) & (wanted < routing.num_experts)
      assert real.any()
      np.testing.assert_array_equal(of_slot[slots[real]], wanted[real])
      assert (slots[~real] == of_slot.size).all()


def test_a_stream_without_sparse_layers_is_not_planned(routing, make_batch):
  batch, plan = _router(routing, make_batch, streams=('decoder',))(
    make_batch(7)
  )
  assert plan.encoder is None and plan.decoder is not None
  assert 'encoder_routing_ids' in batch
  present = np.unique(batch['decoder_routing_ids'])
  present = present[(present >= 0) & (present < routing.num_experts)]
  planned = np.concatenate(plan.updates.experts)
  assert set(present) == set(planned[planned < routing.num_experts])


def test_threads_and_order_change_no_plan(routing, make_batch):
  router = _router(routing, make_batch)
  batches = [make_batch(seed) for seed in range(12)]
  one_by_one = [router(batch)[1] for batch in batches]
  fresh = _router(routing, make_batch)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    threaded = list(pool.map(lambda b: fresh(b)[1], reversed(batches)))
  for plan, other in zip(one_by_one, reversed(threaded), strict=True):
    for experts, same in zip(
      plan.updates.experts, other.updates.experts, strict=True
    ):
      np.testing.assert_array_equal(experts, same)
    np.testing.assert_array_equal(plan.encoder.slots, other.encoder.slots)
    np.testing.assert_array_equal(plan.decoder.slots, other.decoder.slots)


def test_a_batch_of_another_shape_is_refused(routing, make_batch):
  router = _router(routing, make_batch)
  batch = {k: np.tile(v, (300, 1)) for k, v in make_batch(3).items()}
  with pytest.raises(ValueError, match='shape of the trial batches'):
    router(batch)


def test_a_router_needs_a_trial_batch(routing):
  with pytest.raises(ValueError, match='at least one trial batch'):
    batch_router.BatchRouter(routing, streams=('encoder',), trial_batches=[])
