"""Tests routers, plans and losses with numbers worked out by hand.

Also tests `experts_choose`, `hash_routing`, `router_losses`, `sinkhorn_choose`,
and `tokens_choose`.
"""

import functools
import pathlib

import flaxformer_moe
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.dispatch import (
  capacity_dispatch,
  dropless_dispatch,
  dropless_exchange,
  slots,
  token_groups,
)
from mowe.layers.routers import (
  experts_choose,
  hash_routing,
  router_base,
  router_losses,
  tokens_choose,
)

# There is one group of four tokens, and two experts. The softmax of LOGITS
# gives PROBS again. The third token is padding.
PROBS = np.array([[[0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [0.7, 0.3]]], np.float32)
LOGITS = jnp.log(PROBS)
IS_VALID = jnp.array([[True, True, False, True]])


@functools.partial(jax.jit, static_argnums=0, static_argnames='num_experts')
def choose(
  router,
  logits=LOGITS,
  is_valid=IS_VALID,
  ids=None,
  bias=None,
  num_experts=2,
):
  return router(
    router_base.RouterInputs(
      is_valid=is_valid, logits=logits, routing_ids=ids, selection_bias=bias
    ),
    num_experts=num_experts,
  )


def test_tokens_choose_their_best_expert():
  choices = choose(tokens_choose.TokensChoose())
  np.testing.assert_array_equal(choices.tokens, [[0, 1, 2, 3]])
  # The padding has expert 2 of 2, which means none.
  np.testing.assert_array_equal(choices.experts, [[0, 0, 2, 0]])
  np.testing.assert_allclose(choices.weights, [[0.6, 0.9, 0, 0.7]], rtol=1e-6)
  np.testing.assert_array_equal(choices.pairs[0, :, 0], [0, 1, 2, 3])


def test_batch_priority_sorts_tokens_and_first_choices_come_first():
  choices = choose(tokens_choose.TokensChoose(2, batch_prioritized=True))
  # The order is 0.9, 0.7, 0.6, padding: once for the first choices, and once
  # for the second ones.
  np.testing.assert_array_equal(choices.tokens, [[1, 3, 0, 2] * 2])
  np.testing.assert_array_equal(choices.experts, [[0, 0, 0, 2, 1, 1, 1, 2]])
  np.testing.assert_array_equal(
    choices.pairs[0], [[2, 6], [0, 4], [3, 7], [1, 5]]
  )


def test_all_choices_of_a_token_come_before_those_of_the_next():
  choices = choose(tokens_choose.TokensChoose(2))
  np.testing.assert_array_equal(choices.tokens, [[0, 0, 1, 1, 2, 2, 3, 3]])
  np.testing.assert_array_equal(choices.experts, [[0, 1, 0, 1, 2, 2, 0, 1]])
  np.testing.assert_array_equal(
    choices.pairs[0], [[0, 1], [2, 3], [4, 5], [6, 7]]
  )


def test_first_choices_may_come_first():
  choices = choose(tokens_choose.TokensChoose(2, first_choices_first=True))
  np.testing.assert_array_equal(choices.tokens, [[0, 1, 2, 3] * 2])
  np.testing.assert_array_equal(choices.experts, [[0, 0, 2, 0, 1, 1, 2, 1]])
  np.testing.assert_array_equal(
    choices.pairs[0], [[0, 4], [1, 5], [2, 6], [3, 7]]
  )


def test_selection_bias_selects_and_does_not_weigh():
  bias = jnp.array([-0.3, 0.0])
  choices = choose(tokens_choose.TokensChoose(bias_rate=0.1), bias=bias)
  # Only for the first token the bias changes the choice, as 0.6 - 0.3 < 0.4.
  # Its weight is 0.4, without the bias.
  np.testing.assert_array_equal(choices.experts, [[1, 0, 2, 0]])
  np.testing.assert_allclose(choices.weights, [[0.4, 0.9, 0, 0.7]], rtol=1e-6)


def test_sigmoid_scores_renormalised():
  logits = jnp.array([[[0.0, np.log(3.0)]]])  # The sigmoids are 1/2 and 3/4.
  router = tokens_choose.TokensChoose(2, sigmoid=True, renormalize=True)
  choices = choose(router, logits, jnp.array([[True]]))
  np.testing.assert_array_equal(choices.experts, [[1, 0]])
  np.testing.assert_allclose(choices.weights, [[0.6, 0.4]], rtol=1e-6)
  np.testing.assert_allclose(choices.probs, [[[0.4, 0.6]]], rtol=1e-6)


@pytest.mark.slow
def test_experts_choose_their_tokens():
  # Three real tokens with 4/3 experts each make two tokens for each expert.
  choices = choose(experts_choose.ExpertsChoose(4 / 3))
  # Expert 0 would have room for a third token. If padding counted, with 0.5,
  # expert 1 would choose it before the token with 0.4.
  np.testing.assert_array_equal(choices.experts, [[0, 0, 2, 1, 1, 2]])
  taken = np.asarray(choices.experts[0]) < 2
  choices = choices._replace(
    tokens=choices.tokens[:, taken],
    experts=choices.experts[:, taken],
    weights=choices.weights[:, taken],
  )
  np.testing.assert_array_equal(choices.tokens, [[1, 3, 0, 3]])
  np.testing.assert_array_equal(choices.experts, [[0, 0, 1, 1]])
  np.testing.assert_allclose(choices.weights, [[0.9, 0.7, 0.4, 0.3]], rtol=1e-6)
  # Pairs 1 and 4 belong to the last token, and 6 means no pair.
  np.testing.assert_array_equal(
    choices.pairs[0], [[6, 3], [0, 6], [6, 6], [1, 4]]
  )


@pytest.mark.slow
@pytest.mark.parametrize('length', [16, 32, 48, 64])
def test_experts_follow_real_tokens_not_the_padded_length(length):
  router = experts_choose.ExpertsChoose(2.0)
  logits = np.zeros((2, length, 4), np.float32)
  real = np.random.default_rng(0).normal(size=(2, 12, 4))
  logits[:, :12] = real
  is_valid = np.arange(length)[None, :] < np.array([[12], [6]])
  choices = choose(router, logits, is_valid, num_experts=4)
  # Each expert chooses 2 x 12 / 4 or 2 x 6 / 4 tokens, with or without padding.
  counts = slots.count_choices(choices.experts, 4)
  np.testing.assert_array_equal(counts, [[6] * 4, [3] * 4])
  # Exactly these choices are computed.
  plan = jax.jit(
    lambda choices: dropless_dispatch.DroplessDispatch().plan(
      choices, router, num_experts=4
    )
  )(choices)
  assert plan.num_slots == 4 * (6 + 3)


def test_experts_leave_slots_empty_when_real_tokens_run_out():
  choices = choose(experts_choose.ExpertsChoose(2.0))
  np.testing.assert_array_equal(choices.tokens[0, :3], [1, 3, 0])
  np.testing.assert_array_equal(choices.experts, [[0, 0, 0, 2, 1, 1, 1, 2]])
  assert choices.weights[0, 3] == choices.weights[0, 7] == 0


def test_hash_router_reads_its_table():
  router = hash_routing.HashRouter(3, table=(1, 0, 1))
  # The id 3 means no expert, and padding has none either.
  ids = jnp.array([[2, 1, -1, 3]])
  choices = choose(router, None, ids >= 0, ids)
  np.testing.assert_array_equal(choices.experts, [[1, 0, 2, 2]])
  np.testing.assert_array_equal(choices.weights, [[1, 1, 0, 0]])


def test_random_hash_is_even_and_depends_on_the_seed():
  ids = jnp.arange(32_000)[None]
  experts = [
    hash_routing.HashRouter(32_000, seed)(
      router_base.RouterInputs(is_valid=ids >= 0, routing_ids=ids),
      num_experts=8,
    ).experts[0]
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(experts[0], experts[1])
  assert np.mean(experts[0] == experts[2]) < 0.2
  # Each expert has 4000 ids, give or take five standard deviations.
  np.testing.assert_allclose(np.bincount(experts[0]), 4000, atol=300)


def test_balanced_table_gives_to_the_least_busy():
  # Expert 0 gets 9. Expert 1 gets 5 and then 4. Both have 9 now, and expert 0
  # gets 3.
  table = hash_routing.balanced_table(np.array([3, 9, 4, 5]), 2)
  assert table == (0, 0, 1, 1)
  # Ids that do not occur are spread evenly as well.
  assert sorted(hash_routing.balanced_table(np.zeros(4), 2)) == [0, 0, 1, 1]


@pytest.mark.slow
def test_capacity_plan():
  router = tokens_choose.TokensChoose()
  choices = choose(router)
  # Four choices, two experts and a factor of 1 make two slots for each expert.
  # Tokens 0 and 1 take those of expert 0, token 3 is dropped, and expert 1
  # stays empty.
  plan = capacity_dispatch.CapacityDispatch(1.0, 1).plan(
    choices, router, num_experts=2
  )
  np.testing.assert_array_equal(plan.sources, [0, 1, 4, 4])
  np.testing.assert_array_equal(plan.slots_of_tokens[:, 0], [0, 1, 4, 4])
  np.testing.assert_array_equal(plan.group_sizes, [2, 0])
  tokens = jnp.array([[1.0], [2.0], [3.0], [4.0]])
  rows = slots.to_slots(tokens, plan)
  np.testing.assert_array_equal(rows[:, 0], [1, 2, 0, 0])
  np.testing.assert_array_equal(slots.to_tokens(rows, plan)[:, 0], [1, 2, 0, 0])


def test_dropless_plan():
  router = tokens_choose.TokensChoose(2)
  choices = choose(router)
  plan = dropless_dispatch.DroplessDispatch().plan(
    choices, router, num_experts=2
  )
  # The first choices of tokens 0, 1 and 3 are expert 0, and the second ones are
  # expert 1.
  np.testing.assert_array_equal(plan.sources[:6], [0, 1, 3, 0, 1, 3])
  np.testing.assert_array_equal(plan.sources[6:], 4)
  none = plan.sources.size
  np.testing.assert_array_equal(
    plan.slots_of_tokens, [[0, 3], [1, 4], [none] * 2, [2, 5]]
  )
  np.testing.assert_array_equal(plan.group_sizes, [3, 3])


def test_a_buffer_between_devices_is_filled_in_order_of_tokens():
  # There is one group of four tokens. Experts 0 and 1 are on the first device.
  router = hash_routing.HashRouter(4, table=(3, 2, 0, 2))
  choices = choose(
    router, None, np.ones((1, 4), bool), np.arange(4)[None], num_experts=4
  )
  # The even share of four pairs is two places for each device.
  exchange = dropless_exchange.DroplessExchange(2, buffer_factor=1.0)
  plan = exchange.plan(choices, router, num_experts=4)
  # Tokens 0 and 1 take the places on the second device before token 3, although
  # its expert 2 comes before expert 3 of token 0. Within the buffer the order
  # is that of experts.
  np.testing.assert_array_equal(plan.sources, [2, 4, 1, 0])
  np.testing.assert_array_equal(plan.slots_of_tokens[:, 0], [3, 2, 0, 4])
  np.testing.assert_array_equal(plan.group_sizes, [1, 0, 1, 1])
  # Outside of training there is room for all pairs.
  plan = exchange.without_drops().plan(choices, router, num_experts=4)
  np.testing.assert_array_equal(plan.group_sizes, [1, 0, 2, 1])


def test_capacity_grows_with_k_but_for_flaxformer():
  ours = capacity_dispatch.CapacityDispatch(min_capacity=1)
  theirs = flaxformer_moe.FlaxformerCapacity(min_capacity=1)
  capacity = lambda rule, k: rule.capacity(tokens_choose.TokensChoose(k), 64, 8)
  assert [capacity(ours, k) for k in (1, 2, 4)] == [10, 20, 40]
  assert [capacity(theirs, k) for k in (1, 2, 4)] == [10, 10, 10]
  # An expert cannot get a token twice, so it needs no more slots than tokens.
  assert capacity(ours, 8) == 64


@pytest.mark.slow
@pytest.mark.parametrize('k', [1, 2])
def test_load_balance_is_one_at_balance(k):
  probs = jnp.full((3, 8, 4), 0.25)
  chosen = jnp.full((3, 4), 8 * k // 4)
  is_valid = jnp.ones((3, 8), bool)
  both = {}
  for rule in (router_losses.RouterLosses(), flaxformer_moe.FlaxformerLosses()):
    sums = jax.jit(rule.sums)(jnp.log(probs), probs, chosen, is_valid)
    both[type(rule).__name__] = sums['load_balance'] / sums['num_loss_tokens']
    np.testing.assert_allclose(sums['importance'], 0, atol=1e-6)
    # The probabilities sum to one, so the log-sum-exp of their logarithms is
    # zero.
    np.testing.assert_allclose(sums['z_loss'], 0, atol=1e-6)
  np.testing.assert_allclose(both['RouterLosses'], 1.0, rtol=1e-6)
  np.testing.assert_allclose(both['FlaxformerLosses'], k, rtol=1e-6)


def test_losses_by_hand():
  sums = router_losses.RouterLosses().sums(
    LOGITS, jnp.asarray(PROBS), jnp.array([[3, 0]]), IS_VALID
  )
  # All three tokens chose expert 0, whose probabilities 0.6 + 0.9 + 0.7 sum to
  # 2.2 of 3.
  np.testing.assert_allclose(sums['load_balance'], 2 * 2.2, rtol=1e-6)
  # The totals are 2.2 and 0.8 with the mean 1.5. So the squared variation is
  # 0.49 / 2.25, which counts for three tokens.
  np.testing.assert_allclose(sums['importance'], 3 * 0.49 / 2.25, rtol=1e-5)
  assert sums['num_loss_tokens'] == 3


def test_bias_moves_against_the_load():
  zeros = dict.fromkeys(router_losses.RouterStats._fields, jnp.zeros(()))
  stats = router_losses.RouterStats(
    **zeros
    | {'load': jnp.array([5.0, 3.0, 1.0]), 'dropped': jnp.array([1.0, 0, 0])}
  )
  # The experts were chosen 6, 3 and 1 times; the mean is 10 / 3.
  bias = router_losses.balanced_bias(jnp.array([0.5, 0, 0]), stats, 0.1)
  np.testing.assert_allclose(bias, [0.4, 0.1, 0.1], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(2, 5), (4, 6), (1, 1), (3, 15)])
@pytest.mark.parametrize(
  'groups',
  [
    token_groups.TokenGroups(4),
    token_groups.TokenGroups(100),
    flaxformer_moe.FlaxformerGroups(4, 2),
  ],
)
def test_groups_are_split_and_merged(shape, groups):
  tokens = jax.random.normal(jax.random.key(0), (*shape, 3))
  split = groups.split(tokens, 0)
  np.testing.assert_array_equal(groups.merge(split, *shape), tokens)
  if type(groups) is token_groups.TokenGroups:
    assert split.shape[1] <= max(groups.size, shape[1])
    # What is added is less than one sequence for each group.
    missing = split.shape[0] * split.shape[1] - shape[0] * shape[1]
    assert 0 <= missing < split.shape[0] * shape[1]


def test_load_concentration_is_the_entropy_of_the_mean():
  """The value must be that of the authors' formula for their probabilities."""
  folder = pathlib.Path(__file__).resolve().parents[2] / 'golden'
  with np.load(folder / 'moduleformer.npz') as arrays:
    probs = arrays['gate_probs']
  zeros = dict.fromkeys(router_losses.RouterStats._fields, jnp.zeros(()))
  sums = {'total_probs': probs.sum(0), 'num_loss_tokens': len(probs)}
  stats = router_losses.RouterStats(**(zeros | sums))
  total, count = router_losses.losses(stats)['load_concentration_loss']
  assert float(total / count) == pytest.approx(1.461092, abs=1e-6)
