"""A dense feed-forward of which only the largest hidden units are used."""

import jax
import jax.numpy as jnp

from mowe.layers import feed_forward, linear


class TopKFeedForward(feed_forward.DenseFeedForward):
  """DenseFeedForward that keeps the k largest hidden units of each token.

  All other hidden units are set to zero. Units that equal the k-th largest stay
  as well, so that ties may leave more than k. With ReLU a token that has fewer
  than k positive units therefore keeps them all. Dropout comes before the
  choice. The first projection is computed for all units, so that the choice
  saves no time there.

  Source: arXiv 2310.10837, section 3; https://github.com/RobertCsordas/moe.
  The layers of the paper have biases.

  Attributes:
    activations: one name, or two for a gated layer.
    k: number of units that stay.
    ranks_by_effect: whether units are ranked by their activation times the norm
      of their row of the second kernel, instead of by their activation. Ranks
      are computed in float32 in both cases.

  The other attributes and the call are those of DenseFeedForward.

  Raises:
    ValueError: k is not in 1..mlp_dim.
  """

  activations: tuple[str, ...] = ('relu',)
  k: int = 128
  ranks_by_effect: bool = False

  def __post_init__(self):
    if not 1 <= self.k <= self.mlp_dim:
      raise ValueError(
        f'k must lie in 1..{self.mlp_dim}, the hidden units, but is {self.k}. '
        'Set it to a number in this range: the paper keeps 64 to 512 of some '
        '2,000.'
      )
    super().__post_init__()

  def select(self, hidden: jax.Array, wo: linear.Dense) -> jax.Array:
    """Returns `hidden` with zeros for all units but the k largest."""
    ranks = hidden.astype(jnp.float32)
    if self.ranks_by_effect:
      kernel, _ = wo.weights(self.mlp_dim)
      norms = jnp.linalg.norm(kernel.astype(jnp.float32), axis=1)
      ranks *= norms[None, None, :]
    return strongest(hidden, ranks, self.k)


def strongest(hidden: jax.Array, ranks: jax.Array, k: int) -> jax.Array:
  """Returns `hidden` with zeros where the rank is below the k-th largest.

  No gradient flows into the ranks.

  Args:
    hidden: <float>[..., units].
    ranks: <float>[..., units], the number by which each unit is ranked.
    k: number of units that stay, in 1..units; ties with the k-th stay as well.

  Returns:
    <float>[..., units].
  """
  ranks = jax.lax.stop_gradient(ranks.astype(jnp.float32))
  return jnp.where(_is_among(ranks, k), hidden, 0)


def _is_among(ranks, k):
  """Where ranks <float32>[..., units] are at least the k-th largest: <bool>.

  The k-th largest number is the largest threshold that at least k units reach.
  It is found bit by bit from the highest on, by counting the units that reach a
  trial threshold. That is 32 passes over memory. XLA's top_k on CPU takes 20 to
  30 times as long for 128 of 1,027 units. A NaN counts as the largest number,
  so that it stays and is seen.
  """
  # The bits of a NaN may have a sign, which would make it the smallest number.
  ranks = jnp.where(jnp.isnan(ranks), jnp.inf, ranks)
  bits = jax.lax.bitcast_convert_type(ranks, jnp.int32)
  # As integers, the bits of negative floats are in falling order. With all bits
  # but the sign flipped, integers have the order of the floats.
  keys = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
  # Counts are summed in float32, which is exact for these sizes and faster than
  # a sum of integers.
  count = lambda at_least: jnp.sum(
    (keys >= at_least[..., None]).astype(jnp.float32), axis=-1
  )
  # The sign comes first: if fewer than k units are not negative, the threshold
  # is negative. Every further bit is set if k units still reach the threshold.
  smallest = jnp.full(ranks.shape[:-1], jnp.iinfo(jnp.int32).min, jnp.int32)
  zero = jnp.zeros_like(smallest)
  threshold = jnp.where(count(zero) >= k, zero, smallest)

  def narrow(number, threshold):
    larger = threshold | (1 << (30 - number))
    return jnp.where(count(larger) >= k, larger, threshold)

  threshold = jax.lax.fori_loop(0, 31, narrow, threshold)
  return keys >= threshold[..., None]
