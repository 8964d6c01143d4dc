"""Losses and statistics of a router, as sums that can be added up.

Every number is a sum over tokens or groups. Stats of microbatches, devices and
steps are added, and only then divided, by `losses` and `metrics`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Fields that a router without weights leaves at zero.
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

# The collection that a layer sows its stats into, and their name there.
COLLECTION = 'router_stats'
NAME = 'stats'


class RouterStats(NamedTuple):
  """Sums of one layer; all <float32>[] but for the three per expert.

  tokens = padding + skipped + left behind + computed, and
  choices = sum(load) + sum(dropped).

  Attributes:
    num_tokens: all positions.
    num_padding: those that are not routed.
    num_skipped: routed tokens that chose no expert, or that none chose.
    num_left_behind: tokens all of whose choices were dropped.
    num_choices: pairs of a token and an expert.
    load: <float32>[experts], choices that were computed.
    dropped: <float32>[experts], choices without a slot.
    num_slots: slots that were computed, filled or not.
    weight: combine weights of computed choices.
    entropy: of the routed tokens' probabilities, in nats.
    load_balance: load-balancing loss times `num_loss_tokens`.
    importance: squared coefficient of variation of the experts' probabilities,
      times `num_loss_tokens`.
    z_loss: squared log-sum-exp of the logits.
    total_probs: <float32>[experts], softmax of the logits, whose mean over all
      tokens the entropy regulariser is of.
    group_information: negative entropy of the mean softmax of each group, times
      its tokens, where the regulariser is of groups.
    conditional_entropy: of each token's softmax of the logits, in nats.
    takeover: -log of the probability that old modules keep beside added ones;
      see `added_modules.AddedLosses`.
    num_loss_tokens: what all of these are to be divided by.
    num_not_finite: routed tokens with an infinite or NaN logit. A trainer
      refuses to go on if there is one.
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
  """Stats of both."""
  return jax.tree.map(jnp.add, first, second)


def losses(stats: RouterStats) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Sum and count of each loss; only these have gradients."""
  count = stats.num_loss_tokens
  # Of the mean over everything that was added up: devices, not only groups.
  mean_probs = stats.total_probs / jnp.maximum(count, 1)
  information = count * _information(mean_probs) + stats.group_information
  return {
    'load_balance_loss': (stats.load_balance, count),
    'router_z_loss': (stats.z_loss, count),
    'importance_loss': (stats.importance, count),
    'entropy_regularizer': (information, count),
    'load_concentration_loss': (-information, count),
    # Minus the mutual information of a token and its expert.
    'mutual_information_loss': (information + stats.conditional_entropy, count),
    'takeover_loss': (stats.takeover, count),
  }


def metrics(stats: RouterStats) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Sum and count of each metric; `load` has one of each per expert.

  `load` and `dropped` are shares of all choices and of an expert's choices;
  `usage` is the share of slots that are filled.
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
  """Next selection bias: experts above the mean load become less likely.

  Source: loss-free balancing, arXiv 2408.15664. Called once per step, with the
  stats of the whole batch.

  Args:
    bias: <float32>[experts], `router_base.SELECTION_BIAS`.
    stats: of the layer; dropped choices count, as they were chosen.
    rate: `TokensChoose.bias_rate`.
  """
  chosen = stats.load + stats.dropped
  return bias + rate * jnp.sign(jnp.mean(chosen, keepdims=True) - chosen)


@dataclasses.dataclass(frozen=True)
class RouterLosses:
  """Losses over real tokens, one at perfect balance for any k.

  The entropy regulariser is at least -log(experts), and its probabilities are
  the mean over all tokens of the batch. The mutual-information loss adds the
  mean entropy of a token's own probabilities.

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
    """The seven loss fields of `RouterStats`.

    Args:
      logits: <float32>[groups, tokens, experts].
      probs: likewise, adding up to one.
      num_chosen: <int32>[groups, experts], choices before any is dropped.
      is_valid: <bool>[groups, tokens].
    """
    num_experts = probs.shape[-1]
    num_valid = jnp.sum(is_valid, axis=1).astype(jnp.float32)
    # [groups, experts]; groups weigh as much as they have real tokens.
    total_probs = jnp.sum(probs * is_valid[:, :, None], axis=1)
    shares = ratio(num_chosen, jnp.sum(num_chosen, axis=1, keepdims=True))
    squares = num_experts * jnp.sum(total_probs**2, axis=1)
    z = jax.nn.logsumexp(logits, axis=-1)
    # `probs` may be sigmoids.
    log_softmax = jax.nn.log_softmax(logits)
    softmax = jnp.where(is_valid[:, :, None], jnp.exp(log_softmax), 0)
    # [groups, experts]
    total_softmax = jnp.sum(softmax, axis=1)
    # Padding may have any logits, infinite ones too.
    finite = jnp.where(is_valid[:, :, None], log_softmax, 0)
    return self._regularizer(total_softmax, num_valid) | {
      'load_balance': num_experts * jnp.sum(shares * total_probs),
      'importance': jnp.sum(ratio(squares, num_valid) - num_valid),
      'z_loss': jnp.sum(jnp.where(is_valid, z**2, 0)),
      'conditional_entropy': -jnp.sum(softmax * finite),
      'num_loss_tokens': jnp.sum(num_valid),
    }

  def _regularizer(self, total_softmax, num_valid):
    del num_valid
    return {
      'total_probs': jnp.sum(total_softmax, axis=0),
      'group_information': jnp.zeros(()),
    }


@dataclasses.dataclass(frozen=True)
class GroupEntropyLosses(RouterLosses):
  """The same, but the entropy regulariser is of each group by itself.

  With SequenceGroups it is of each sequence. Groups weigh as much as they have
  real tokens.
  """

  def _regularizer(self, total_softmax, num_valid):
    mean = total_softmax / jnp.maximum(num_valid, 1)[:, None]
    return {
      'total_probs': jnp.zeros_like(total_softmax[0]),
      'group_information': jnp.sum(num_valid * _information(mean)),
    }


def ratio(total, count):
  """total / count, zero where nothing was counted."""
  return jnp.where(count > 0, total / jnp.maximum(count, 1), 0)


def _information(probs):
  """Negative entropy; its gradient is finite where a probability is zero."""
  smallest = jnp.finfo(probs.dtype).tiny
  return jnp.sum(probs * jnp.log(jnp.maximum(probs, smallest)), axis=-1)
