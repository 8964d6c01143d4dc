"""Counts what the router and the dispatch of a mixture did in one call."""

import jax
import jax.numpy as jnp

from mowe.layers.dispatch import slots
from mowe.layers.routers import router_base, router_losses


def measure(
  logits: jax.Array | None,
  choices: router_base.Choices,
  plan: slots.SlotPlan,
  *,
  router: router_base.Router,
  losses: router_losses.RouterLosses,
  is_valid: jax.Array,
) -> router_losses.RouterStats:
  """Returns the stats of one call of a layer, all of them sums.

  Gradients flow through the fields that `RouterLosses.sums` returns, and
  through no others.

  Args:
    logits: <float32>[groups, tokens, experts], the router's logits; None if the
      router has none.
    choices: what the router chose.
    plan: the plan that gave the choices slots, or dropped them.
    router: the router that made the choices.
    losses: forms the sums from which the router's losses are computed.
    is_valid: <bool>[groups, tokens], False for padding.
  """
  num_experts = plan.group_sizes.shape[0]
  is_routed = jnp.ones_like(is_valid) if router.routes_padding else is_valid
  count = lambda what: jnp.sum(what, dtype=jnp.float32)
  # [groups, experts]: choices of each expert, whether or not they got a slot.
  num_chosen = slots.count_choices(choices.experts, num_experts)
  # These two numbers stand for "no pair" and for "no slot".
  num_pairs, num_slots = choices.experts.shape[1], plan.sources.size
  # A token was skipped if none of its pairs names an expert. It was left behind
  # if some pair does, but none has a slot.
  # [groups, tokens, width]: the expert in each pair of a token; where there is
  # no pair, `clip` reads any expert, and the comparison below ignores it.
  own_experts = jnp.take_along_axis(
    choices.experts,
    choices.pairs.reshape(choices.pairs.shape[0], -1),
    axis=1,
    mode='clip',
  ).reshape(choices.pairs.shape)
  has_choice = jnp.any(
    (choices.pairs < num_pairs) & (own_experts < num_experts), axis=-1
  )
  # [groups * tokens]
  has_slot = jnp.any(plan.slots_of_tokens < num_slots, axis=-1)
  load = plan.group_sizes.astype(jnp.float32)
  chosen = count(num_chosen)
  zero = jnp.zeros((), jnp.float32)
  # Every router gives every field, so that stats of all layers add up alike.
  # Without logits the fields of the losses are zero.
  sums = dict.fromkeys(router_losses.SCALARS, zero)
  sums['total_probs'] = jnp.zeros_like(load)
  num_not_finite = zero
  if logits is not None:
    sums |= losses.sums(logits, choices.probs, num_chosen, is_valid)
    entropy = _entropy(choices.probs)
    sums['entropy'] = jnp.sum(jnp.where(is_valid, entropy, 0))
    num_not_finite = count(is_routed & ~jnp.all(jnp.isfinite(logits), axis=-1))
  if router.is_balanced:
    # Such a router needs no load-balancing loss.
    sums['load_balance'] = zero
  # Weights of the pairs that were computed.
  weights = jnp.where(
    plan.slots_of_pairs < num_slots, choices.weights.reshape(-1), 0
  )
  return router_losses.RouterStats(
    num_tokens=jnp.asarray(is_valid.size, jnp.float32),
    num_padding=count(~is_routed),
    num_skipped=count(is_routed & ~has_choice),
    num_left_behind=count(has_choice & ~has_slot.reshape(is_valid.shape)),
    num_choices=chosen,
    load=load,
    dropped=jnp.sum(num_chosen, axis=0).astype(jnp.float32) - load,
    num_slots=jnp.asarray(plan.num_slots, jnp.float32),
    weight=jax.lax.stop_gradient(jnp.sum(weights)),
    num_not_finite=num_not_finite,
    **(sums | {'entropy': jax.lax.stop_gradient(sums['entropy'])}),
  )


def _entropy(probs):
  # [groups, tokens, experts] -> [groups, tokens]. `xlogy` is 0 at 0.
  return -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)
