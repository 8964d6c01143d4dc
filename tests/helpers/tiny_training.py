"""A tiny model and its batches, for the tests of training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers.memory import word_experts
from mowe.models import threefry
from mowe.models.t5 import t5_config
from mowe.training import train_state
from mowe.words.plans import batch_plans, step_plans

BATCH, INPUTS, TARGETS = 8, 6, 5
VOCAB, EXPERTS = 32, 12


@dataclasses.dataclass(frozen=True)
class FixedRouting:
  """Stands for a routing vocabulary; the tests make routing ids themselves."""

  num_experts: int = EXPERTS


def make_config(sparse=True, **changes):
  """All sizes differ, and those that are sharded divide over four devices."""
  sparse_parts = {}
  if sparse:
    sparse_parts = {
      'sparse_feed_forward': functools.partial(
        word_experts.MoweLayer, EXPERTS, 4
      ),
      'sparse_encoder_layers': (0,),
      'sparse_decoder_layers': (0,),
      'routing': FixedRouting(),
    }
  settings = {
    'vocab_size': VOCAB,
    'emb_dim': 24,
    'num_heads': 4,
    'head_dim': 2,
    'mlp_dim': 20,
    'num_encoder_layers': 1,
    'num_decoder_layers': 1,
    'dropout_rate': 0.0,
  }
  return t5_config.T5Config(**(settings | sparse_parts | changes))


def make_batch(seed=0, absent=()):
  """Rows of uneven lengths, one of them without any target.

  Experts in `absent` do not occur; the id `EXPERTS` marks tokens without one.
  """
  rng = np.random.default_rng(seed)

  def tokens(length, shortest):
    ids = rng.integers(3, VOCAB, (BATCH, length))
    ends = rng.integers(shortest, length + 1, (BATCH, 1))
    return np.where(np.arange(length) < ends, ids, 0).astype(np.int32)

  inputs, targets = tokens(INPUTS, 2), tokens(TARGETS, 0)
  targets[3] = 0
  decoder_inputs = np.zeros_like(targets)
  decoder_inputs[:, 1:] = targets[:, :-1]
  present = np.setdiff1d(np.arange(EXPERTS), absent)

  def route(ids):
    routed = np.where(ids < 26, present[ids % len(present)], EXPERTS)
    return np.where(ids > 0, routed, -1).astype(np.int32)

  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': decoder_inputs,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets > 0).astype(np.float32),
    'encoder_routing_ids': route(inputs),
    'decoder_routing_ids': route(decoder_inputs),
  }


def stream_ids(batch):
  return {name: batch[f'{name}_routing_ids'] for name in ('encoder', 'decoder')}


# Two size classes hold any batch, and compile within a few seconds.
_STREAM = batch_plans.ClassSizes(((4, EXPERTS), (BATCH * INPUTS, EXPERTS)))
_PROFILE = batch_plans.CapacityProfile(
  (('encoder', _STREAM), ('decoder', _STREAM)),
  updates=batch_plans.ClassSizes(((4, EXPERTS), (2 * BATCH * INPUTS, EXPERTS))),
)


def make_plan(batch, num_microbatches=1):
  plan = batch_plans.make_plan(
    stream_ids(batch), _PROFILE, EXPERTS, num_microbatches=num_microbatches
  )
  assert plan is not None
  return step_plans.StepPlan(plan, {})


def make_state(model, optimizer, row_optimizer, seed=0):
  return train_state.create(
    model,
    threefry.key(seed),
    optimizer=optimizer,
    row_optimizer=row_optimizer,
  )


def copy(state):
  """A copy of the arrays, which may be donated."""
  return jax.tree.map(jnp.array, state)


def assert_close(actual, expected, tolerance):
  """Compares trees; `tolerance` is relative to the maximum of each array."""
  actual, expected = jax.device_get((actual, expected))
  expected_leaves = jax.tree_util.tree_leaves_with_path(expected)
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, want), got in zip(
    expected_leaves, jax.tree.leaves(actual), strict=True
  ):
    scale = max(float(np.abs(want).max(initial=0.0)), 1e-8)
    np.testing.assert_allclose(
      got,
      want,
      rtol=0,
      atol=tolerance * scale,
      err_msg=jax.tree_util.keystr(path),
    )


def assert_same_bits(actual, expected):
  actual, expected = jax.device_get((actual, expected))
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, want), got in zip(
    jax.tree_util.tree_leaves_with_path(expected),
    jax.tree.leaves(actual),
    strict=True,
  ):
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes(), (
      jax.tree_util.keystr(path)
    )
