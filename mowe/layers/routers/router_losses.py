"""Losses and statistics of a router, as sums that can be added up.

Every number is a sum over tokens or groups. The stats of microbatches, devices
and steps are first added; only then `losses` and `metrics` divide them. The
result is therefore that of the whole batch, however it was split.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The scalar fields of `RouterStats` that are zero if a router has no logits.
SCALARS = (
  'load_balance',
  'importance',
  'z_loss',
  'group_information',
  'conditional_entropy',
  'num_loss_tokens',
  'entropy',
  'takeover',
)

# The collection into which a layer sows its stats, and their name there.
COLLECTION = 'router_stats'
NAME = 'stats'


class RouterStats(NamedTuple):
  """Sums over the tokens of one layer.

  All fields are <float32>[], except for the three that have one number for each
  expert. Two equations always hold:
    num_tokens = num_padding + num_skipped + num_left_behind + computed tokens;
    num_choices = sum(load) + sum(dropped).

  Attributes:
    num_tokens: number of tokens, including padding and what fills groups up.
    num_padding: number of tokens that are not routed.
    num_skipped: number of routed tokens that chose no expert, or that no expert
      chose.
    num_left_behind: number of tokens all of whose choices were dropped.
    num_choices: number of choices, pairs of a token and an expert.
    load: <float32>[experts], number of computed choices of each expert.
    dropped: <float32>[experts], number of choices of each expert that found no
      slot.
    num_slots: number of computed slots, filled or empty.
    weight: sum of the gates of computed choices.
    entropy: sum of the entropies of real tokens' probabilities, in nats.
    load_balance: load-balancing loss, times `num_loss_tokens`.
    importance: squared coefficient of variation of the experts' total
      probabilities, times `num_loss_tokens`.
    z_loss: sum over tokens of the squared log-sum-exp of the logits.
    total_probs: <float32>[experts], sum over tokens of the softmax of the
      logits, from which the entropy regulariser of the whole batch is computed;
      zero if the regulariser is computed for each group.
    group_information: sum over groups of the negative entropy of a group's mean
      softmax, times its number of tokens, in nats; zero if the regulariser is
      computed for the whole batch.
    conditional_entropy: sum of the entropies of tokens' softmax, in nats.
    takeover: sum over tokens of -log of the probability that old modules keep
      beside added ones; see `added_modules.AddedLosses`.
    num_loss_tokens: number of tokens over which the losses are means, usually
      the real ones.
    num_not_finite: number of routed tokens with an infinite or NaN logit. A
      trainer stops if there is one.
  """

  num_tokens: jax.Array
  num_padding: jax.Array
  num_skipped: jax.Array
  num_left_behind: jax.Array
  num_choices: jax.Array
  load: jax.Array
  dropped: jax.Array
  num_slots: jax.Array
  weight: jax.Array
  entropy: jax.Array
  load_balance: jax.Array
  importance: jax.Array
  z_loss: jax.Array
  total_probs: jax.Array
  group_information: jax.Array
  conditional_entropy: jax.Array
  takeover: jax.Array
  num_loss_tokens: jax.Array
  num_not_finite: jax.Array


def add(first: RouterStats, second: RouterStats) -> RouterStats:
  """Returns the stats of both together, the sum of each field."""
  return jax.tree.map(jnp.add, first, second)


def losses(stats: RouterStats) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns the sum and the count of each loss; the loss is their ratio.

  Gradients flow through these sums alone; the other metrics have none.

  Args:
    stats: the stats of a layer, added up over all parts of the batch.
  """
  count = stats.num_loss_tokens
  # The mean is over all tokens that were added up. The entropy of a mean is not
  # a sum over tokens, so it can be computed only here. One of the two terms is
  # zero, depending on whether the regulariser is for the batch or for groups.
  mean_probs = stats.total_probs / jnp.maximum(count, 1)
  information = count * _information(mean_probs) + stats.group_information
  return {
    'load_balance_loss': (stats.load_balance, count),
    'router_z_loss': (stats.z_loss, count),
    'importance_loss': (stats.importance, count),
    'entropy_regularizer': (information, count),
    'load_concentration_loss': (-information, count),
    # This is minus the mutual information of a token and its expert, which is
    # the entropy of the mean less the mean of the entropies.
    'mutual_information_loss': (information + stats.conditional_entropy, count),
    'takeover_loss': (stats.takeover, count),
  }


def metrics(stats: RouterStats) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns the sum and the count of each metric; the metric is their ratio.

  The metrics are those of `losses`, and:
    load: each expert's share of the computed choices, <float32>[experts];
    dropped_by_expert: the share of each expert's choices that were dropped,
      <float32>[experts];
    dropped: the share of all choices that were dropped;
    left_behind, skipped: shares of the routed tokens;
    padding: share of all tokens;
    usage: the share of computed slots that were filled;
    confidence: the mean gate of a computed choice;
    entropy: the mean entropy of a routed token's probabilities, in nats, where
      padding that is routed counts as 0;
    not_finite: the share of routed tokens with an infinite or NaN logit.

  Args:
    stats: the stats of a layer, added up over all parts of the batch.
  """
  routed = stats.num_tokens - stats.num_padding
  load = jnp.sum(stats.load)
  return {
    'load': (stats.load, jnp.broadcast_to(load, stats.load.shape)),
    'dropped_by_expert': (stats.dropped, stats.load + stats.dropped),
    'dropped': (jnp.sum(stats.dropped), stats.num_choices),
    'left_behind': (stats.num_left_behind, routed),
    'skipped': (stats.num_skipped, routed),
    'padding': (stats.num_padding, stats.num_tokens),
    'usage': (load, stats.num_slots),
    'confidence': (stats.weight, load),
    'entropy': (stats.entropy, routed),
    'not_finite': (stats.num_not_finite, routed),
  } | losses(stats)


def balanced_bias(
  bias: jax.Array, stats: RouterStats, rate: float
) -> jax.Array:
  """Returns the next selection bias, <float32>[experts].

  The bias of an expert that was chosen more often than the mean falls by
  `rate`, so that the expert will be chosen less often; that of others rises.
  The function is called once for each step, with the stats of the whole batch.

  Source: loss-free balancing, arXiv 2408.15664.

  Args:
    bias: <float32>[experts], the parameter `router_base.SELECTION_BIAS`.
    stats: the stats of the layer in this step.
    rate: the step of the bias, `TokensChoose.bias_rate`.
  """
  # Dropped choices count as well: the bias balances what is chosen.
  chosen = stats.load + stats.dropped
  return bias + rate * jnp.sign(jnp.mean(chosen, keepdims=True) - chosen)


@dataclasses.dataclass(frozen=True)
class RouterLosses:
  """Forms the sums of a router's losses over real tokens.

  The load-balancing loss is 1 at perfect balance, for any number of choices of
  a token. The entropy regulariser is the negative entropy of the mean
  probabilities of all tokens of the batch; its least value is -log(experts).
  The mutual-information loss is this regulariser plus the mean entropy of the
  tokens' own probabilities.

  Source: load balance: Switch, arXiv 2101.03961, equation 4; z-loss: ST-MoE,
  arXiv 2202.08906; importance: arXiv 1701.06538, equation 7; entropy: arXiv
  2310.10837, section 5; mutual information: ModuleFormer, arXiv 2306.04640.
  """

  def sums(
    self,
    logits: jax.Array,
    probs: jax.Array,
    num_chosen: jax.Array,
    is_valid: jax.Array,
  ) -> dict[str, jax.Array]:
    """Returns the seven fields of `RouterStats` that losses are made of.

    Args:
      logits: <float32>[groups, tokens, experts], the router's logits.
      probs: <float32>[groups, tokens, experts], probabilities that add up to
        one over the experts; those of padding count with weight zero.
      num_chosen: <int32>[groups, experts], the number of choices of each expert
        before any is dropped.
      is_valid: <bool>[groups, tokens], False for padding.

    Returns:
      The fields by name.
    """
    num_experts = probs.shape[-1]
    # [groups]
    num_valid = jnp.sum(is_valid, axis=1).astype(jnp.float32)
    # [groups, experts]. The sum over the experts is num_valid, so that a group
    # weighs as much as it has real tokens.
    # Padding may have logits that are infinite or NaN, and so probabilities.
    total_probs = jnp.sum(jnp.where(is_valid[:, :, None], probs, 0), axis=1)
    # [groups, experts], the share of each expert in the choices of its group.
    # It does not grow with the number of choices of a token.
    shares = ratio(num_chosen, jnp.sum(num_chosen, axis=1, keepdims=True))
    # The squared coefficient of variation of total_probs over the experts is
    # mean(p^2) / mean(p)^2 - 1. As the mean is num_valid / num_experts, it is
    # squares / num_valid^2 - 1; below it is multiplied by num_valid.
    squares = num_experts * jnp.sum(total_probs**2, axis=1)
    z = jax.nn.logsumexp(logits, axis=-1)
    # The entropies are those of the softmax, also if `probs` are normalised
    # sigmoids.
    log_softmax = jax.nn.log_softmax(logits)
    softmax = jnp.where(is_valid[:, :, None], jnp.exp(log_softmax), 0)
    # [groups, experts]
    total_softmax = jnp.sum(softmax, axis=1)
    # Logits of padding may be infinite or NaN, and 0 * inf below would be NaN.
    finite = jnp.where(is_valid[:, :, None], log_softmax, 0)
    return self._regularizer(total_softmax, num_valid) | {
      'load_balance': num_experts * jnp.sum(shares * total_probs),
      'importance': jnp.sum(ratio(squares, num_valid) - num_valid),
      'z_loss': jnp.sum(jnp.where(is_valid, z**2, 0)),
      'conditional_entropy': -jnp.sum(softmax * finite),
      'num_loss_tokens': jnp.sum(num_valid),
    }

  def _regularizer(self, total_softmax, num_valid):
    """Returns the two fields that `losses` makes the regulariser of.

    Args:
      total_softmax: <float32>[groups, experts], sums over the real tokens.
      num_valid: <float32>[groups], numbers of real tokens.
    """
    del num_valid
    return {
      'total_probs': jnp.sum(total_softmax, axis=0),
      'group_information': jnp.zeros(()),
    }


@dataclasses.dataclass(frozen=True)
class GroupEntropyLosses(RouterLosses):
  """RouterLosses whose entropy regulariser is computed for each group alone.

  With SequenceGroups it is computed for each sequence. The loss is the mean
  over the groups, where each weighs as much as it has real tokens.
  """

  def _regularizer(self, total_softmax, num_valid):
    # [groups, experts]
    mean = total_softmax / jnp.maximum(num_valid, 1)[:, None]
    return {
      'total_probs': jnp.zeros_like(total_softmax[0]),
      'group_information': jnp.sum(num_valid * _information(mean)),
    }


def ratio(total, count):
  """Returns total / count, and zero where nothing was counted."""
  return jnp.where(count > 0, total / jnp.maximum(count, 1), 0)


def _information(probs):
  """Returns the negative entropy of probabilities [..., experts], in nats."""
  # The maximum keeps the logarithm and its gradient finite at probability zero.
  smallest = jnp.finfo(probs.dtype).tiny
  return jnp.sum(probs * jnp.log(jnp.maximum(probs, smallest)), axis=-1)
