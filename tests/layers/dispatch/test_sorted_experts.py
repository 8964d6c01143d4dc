"""Tests rows sorted by expert against a loop, for any shares of the experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers import feed_forward
from mowe.layers.dispatch import expert_dropout, slots, sorted_experts
from mowe.layers.mixtures import experts

EMBED, EXPERT_DIM = 5, 3
RELU = experts.ExpertFeedForward(('relu',))

SHARES = {
  'even': (12, 12, 12, 12),
  'one takes all': (0, 48, 0, 0),
  'first and last are empty': (0, 30, 18, 0),
  'several full tiles': (45, 1, 1, 1),
  'fewer rows than room': (3, 0, 5, 2),
  'nothing': (0, 0, 0, 0),
}


def loop(rows, kernels, sizes, keep, activations):
  outputs, start = [], 0
  for e, size in enumerate(sizes):
    own = rows[start : start + size]
    names = feed_forward.kernel_names(activations)
    hidden = feed_forward.activate(
      [own @ kernels[name][e] for name in names], activations
    )
    if keep is not None:
      hidden *= keep[start : start + size]
    outputs.append(hidden @ kernels['wo'][e])
    start += size
  return jnp.concatenate(outputs)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(compute, rows, kernels, cotangent):
  """The outputs, and the gradients of rows and kernels."""
  outputs, backward = jax.vjp(compute, rows, kernels)
  return outputs, *backward(cotangent)


def close(actual, expected):
  largest = np.abs(expected).max(initial=1e-3)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize('with_dropout', [False, True])
@pytest.mark.parametrize('activations', [('gelu', 'linear'), ('relu',)])
@pytest.mark.parametrize('sizes', SHARES.values(), ids=SHARES)
def test_values_and_gradients_equal_the_loop(sizes, activations, with_dropout):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  share = sorted_experts.batched_share(48, 4)
  num_rows = 48 + sorted_experts.tile_size(share)
  # The rows after the last one are not zero, as nothing may read them.
  rows, cotangent = normal(num_rows, EMBED), normal(num_rows, EMBED)
  kernels = {
    name: normal(4, EMBED, EXPERT_DIM)
    for name in feed_forward.kernel_names(activations)
  } | {'wo': normal(4, EXPERT_DIM, EMBED)}
  pairs = jnp.asarray(rng.permutation(num_rows), jnp.int32)
  dropout = keep = None
  if with_dropout:
    masks = 2.0 * (normal(-(-num_rows // 7), EXPERT_DIM) > 0)
    dropout = expert_dropout.ExpertDropout(masks, block=7)
    keep = masks[pairs // 7]

  expert = experts.ExpertFeedForward(activations)

  outputs, d_rows, d_kernels = with_gradients(
    lambda r, k: sorted_experts.by_expert(
      r,
      k,
      None,
      sorted_experts.Rows(jnp.asarray(sizes), pairs),
      dropout,
      expert,
      share,
    ),
    rows,
    kernels,
    cotangent,
  )
  used = sum(sizes)
  expected, expected_rows, expected_kernels = with_gradients(
    lambda r, k: loop(r, k, sizes, keep, activations),
    rows[:used],
    kernels,
    cotangent[:used],
  )
  close(outputs[:used], expected)
  close(d_rows[:used], expected_rows)
  jax.tree.map(close, d_kernels, expected_kernels)


@pytest.mark.slow
@pytest.mark.parametrize('share', [0, 3, 11])
def test_an_expert_may_have_another_width(share):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  sizes, kernel = np.array([2, 0, 7]), normal(3, EMBED, 8)
  rows = normal(9 + sorted_experts.tile_size(share), EMBED)
  expert = np.repeat(np.arange(3), sizes)

  def ours(rows, kernel):
    return sorted_experts.by_expert(
      rows,
      {'kernel': kernel},
      None,
      sorted_experts.Rows(jnp.asarray(sizes), jnp.arange(rows.shape[0])),
      None,
      experts.project,
      share,
    )[:9]

  def one_by_one(rows, kernel):
    return jnp.einsum('rm,rmf->rf', rows[:9], kernel[expert])

  cotangent = normal(9, 8)
  outputs, d_rows, d_kernel = with_gradients(ours, rows, kernel, cotangent)
  expected, expected_rows, expected_kernel = with_gradients(
    one_by_one, rows, kernel, cotangent
  )
  close(outputs, expected)
  close(d_rows[:9], expected_rows[:9])
  close(d_kernel, expected_kernel)


@pytest.mark.parametrize('even', [0, 1, 5, 29, 64, 100, 255, 256, 8192])
def test_the_share_is_an_even_one_and_what_loads_differ_by(even):
  share = sorted_experts.batched_share(7 * even + 3, 7)
  assert even <= share <= min(even + 1.5 * even**0.5, 1.28 * even)
  assert (even < share) == (29 <= even < 256)
  tile = sorted_experts.tile_size(share)
  assert min(2 * share**0.5, 255) < tile <= max(8, 4 * share**0.5)
  assert tile.bit_count() == 1


def test_few_rows_are_all_computed_in_tiles():
  assert sorted_experts.batched_share(7, 8) == 0
  rows = jnp.ones((7 + sorted_experts.tile_size(0), 2))
  kernels = {'wi': jnp.ones((8, 2, 3)), 'wo': jnp.ones((8, 3, 2))}
  sizes = jnp.asarray([0, 3, 0, 1, 0, 0, 2, 1])
  outputs = sorted_experts.by_expert(
    rows,
    kernels,
    None,
    sorted_experts.Rows(sizes, jnp.arange(rows.shape[0])),
    None,
    RELU,
    0,
  )
  np.testing.assert_array_equal(outputs[:7], np.full((7, 2), 6.0))


def test_no_array_is_larger_than_rows_or_kernels():
  num_rows, num_experts = 512, 16
  share = sorted_experts.batched_share(num_rows, num_experts)
  room = num_rows + sorted_experts.tile_size(share)
  shapes = jax.eval_shape(
    lambda: {
      'wi': jnp.zeros((num_experts, 32, 64)),
      'wo': jnp.zeros((num_experts, 64, 32)),
    }
  )
  program = jax.jit(
    jax.grad(
      lambda rows, kernels, sizes: jnp.sum(
        sorted_experts.by_expert(
          rows,
          kernels,
          None,
          sorted_experts.Rows(sizes, jnp.arange(room)),
          None,
          RELU,
          share,
        )
      ),
      (0, 1),
    )
  ).lower(
    jax.ShapeDtypeStruct((room, 32), jnp.float32),
    shapes,
    jax.ShapeDtypeStruct((num_experts,), jnp.int32),
  )
  temporary = program.compile().memory_analysis().temp_size_in_bytes
  rows, kernels = 4 * room * (64 + 32), 2 * 4 * num_experts * 32 * 64
  assert temporary < 3 * rows + 2 * kernels


@pytest.mark.slow
@pytest.mark.parametrize('with_dropout', [False, True])
@pytest.mark.parametrize(
  'name', ['even', 'several full tiles', 'one takes all']
)
def test_weighted_rows_of_tokens_equal_their_copies(name, with_dropout):
  """Rows read from tokens, with weights, equal rows that were copied before."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  sizes, num_tokens, k = SHARES[name], 16, 3
  share = sorted_experts.batched_share(48, 4)
  num_slots = 48 + sorted_experts.tile_size(share)
  # Token t has the slots whose source it is; each pair has one slot.
  order = rng.permutation(48)
  empty = np.full(num_slots - 48, 48)
  slots_of_pairs = np.argsort(order)
  plan = slots.SlotPlan(
    sources=jnp.asarray(np.r_[order // k, empty * 0 + num_tokens]),
    pairs=jnp.asarray(np.r_[order, empty]),
    slots_of_pairs=jnp.asarray(slots_of_pairs),
    slots_of_tokens=jnp.asarray(slots_of_pairs.reshape(num_tokens, k)),
    group_sizes=jnp.asarray(sizes),
    num_slots=48,
  )
  tokens, weights = normal(num_tokens, EMBED), normal(num_slots)
  kernels = {
    'wi': normal(4, EMBED, EXPERT_DIM),
    'wi_bias': normal(4, EXPERT_DIM),
    'wo': normal(4, EXPERT_DIM, EMBED),
    'wo_bias': normal(4, EMBED),
  }
  dropout = None
  if with_dropout:
    masks = 2.0 * (normal(7, EXPERT_DIM) > 0)
    dropout = expert_dropout.ExpertDropout(masks, block=7)

  def ours(tokens, kernels, weights):
    rows = sorted_experts.Rows(plan.group_sizes, plan.pairs, plan)
    outputs = sorted_experts.by_expert(
      tokens, kernels, weights, rows, dropout, RELU, share
    )
    return slots.to_tokens(outputs, plan)

  def by_hand(tokens, kernels, weights):
    expert = np.repeat(np.arange(4), sizes)
    own = jax.tree.map(lambda w: w[expert], kernels)
    wi, wo = (
      lambda x, name=name: (
        jnp.einsum('rm,rmf->rf', x, own[name]) + own[f'{name}_bias']
      )
      for name in ('wi', 'wo')
    )
    hidden = jax.nn.relu(wi(tokens[order // k]))
    if dropout is not None:
      hidden *= dropout.masks[order // 7]
    outputs = wo(hidden) * weights[:48, None]
    return jnp.zeros_like(tokens).at[order // k].add(outputs)

  cotangent = normal(num_tokens, EMBED)
  arguments = tokens, kernels, weights
  outputs, backward = jax.vjp(jax.jit(ours), *arguments)
  expected, expected_backward = jax.vjp(by_hand, *arguments)
  close(outputs, expected)
  jax.tree.map(close, backward(cotangent), expected_backward(cotangent))
