"""What a mixture of experts counts in one call."""

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
  """Stats of one call of a layer.

  Args:
    logits: <float32>[groups, tokens, experts], None without weights.
    choices: the router's answer.
    plan: what was computed of it.
    router: the router.
    losses: how the losses of the router are formed.
    is_valid: <bool>[groups, tokens].
  """
  num_experts = plan.group_sizes.shape[0]
  is_routed = jnp.ones_like(is_valid) if router.routes_padding else is_valid
  count = lambda what: jnp.sum(what, dtype=jnp.float32)
  num_chosen = slots.count_choices(choices.experts, num_experts)
  num_pairs, num_slots = choices.experts.shape[1], plan.sources.size
  own_experts = jnp.take_along_axis(
    choices.experts,
    choices.pairs.reshape(choices.pairs.shape[0], -1),
    axis=1,
    mode='clip',
  ).reshape(choices.pairs.shape)
  has_choice = jnp.any(
    (choices.pairs < num_pairs) & (own_experts < num_experts), axis=-1
  )
  has_slot = jnp.any(plan.slots_of_tokens < num_slots, axis=-1)
  load = plan.group_sizes.astype(jnp.float32)
  chosen = count(num_chosen)
  zero = jnp.zeros((), jnp.float32)
  sums = dict.fromkeys(router_losses.SCALARS, zero)
  sums['total_probs'] = jnp.zeros_like(load)
  num_not_finite = zero
  if logits is not None:
    sums |= losses.sums(logits, choices.probs, num_chosen, is_valid)
    sums['entropy'] = jnp.sum(_entropy(choices.probs) * is_valid)
    num_not_finite = count(is_routed & ~jnp.all(jnp.isfinite(logits), axis=-1))
  if router.is_balanced:
    sums['load_balance'] = zero
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
  return -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)
