"""Tokens choose by logits that Sinkhorn iterations have balanced: S-BASE."""

import dataclasses

import jax
import jax.numpy as jnp

from mowe.layers.routers import tokens_choose


@dataclasses.dataclass(frozen=True)
class SinkhornChoose(tokens_choose.TokensChoose):
  """TokensChoose whose choices in training are balanced over the experts.

  In training, tokens choose by logits that Sinkhorn iterations have balanced
  within each group; use SequenceGroups for the paper's baseline. Outside of
  training, they choose by the logits themselves. The weights are always the
  scores of the router, as in TokensChoose. Because the router looks ahead in
  any case, all first choices of a group get slots before any second one.

  Source: S-BASE, arXiv 2202.01169, as a baseline of arXiv 2310.10837. The code
  of the latter has other updates, which do not converge; see
  `tests/helpers/paper_sinkhorn.py`.

  Attributes:
    iterations: number of Sinkhorn iterations, each of which normalises the
      tokens and then the experts. The other attributes are those of
      TokensChoose.

  Raises:
    ValueError: `iterations` is below 1, or there is a selection bias.
  """

  iterations: int = 3

  def __post_init__(self):
    super().__post_init__()
    if self.iterations < 1 or self.bias_rate:
      raise ValueError(
        'iterations must be at least 1, and bias_rate 0 because SinkhornChoose '
        f'balances already, but they are {self.iterations} and '
        f'{self.bias_rate}. Leave out bias_rate, or use TokensChoose.'
      )

  @property
  def looks_ahead(self) -> bool:
    """True, because in training later tokens of a group change the choices."""
    return True

  def ranks(
    self, logits, scores, selection_bias, *, is_valid, training
  ) -> jax.Array:
    """See `TokensChoose.ranks`."""
    if not training:
      return super().ranks(
        logits, scores, selection_bias, is_valid=is_valid, training=training
      )
    return self.log_assignment(logits, is_valid)

  def log_assignment(self, logits: jax.Array, is_valid: jax.Array) -> jax.Array:
    """Returns the logarithms of an assignment of tokens to experts.

    The assignment is r = exp(logits + u + v), with one u for each token and one
    v for each expert. Summed over the tokens of a group, every expert has the
    same share. Summed over the experts, every token has 1 once the iterations
    have converged.

    Args:
      logits: <float32>[groups, tokens, experts].
      is_valid: <bool>[groups, tokens], False for padding, which does not count
        in the sums of the experts.

    Returns:
      <float32>[groups, tokens, experts].
    """
    is_real = is_valid[:, :, None]
    num_real = jnp.sum(is_real, axis=1, keepdims=True)
    # The logarithm of the share of each expert, [groups, 1, 1].
    share = jnp.log(num_real / logits.shape[-1])
    # Sums of exponentials are formed in the logarithm, so that none overflows.
    # `of_tokens` is u, [groups, tokens, 1]; `of_experts` is v, [groups, 1,
    # experts].
    of_experts = jnp.zeros_like(logits[:, :1])
    for _ in range(self.iterations):
      of_tokens = -jax.nn.logsumexp(logits + of_experts, axis=2, keepdims=True)
      of_experts = share - jax.nn.logsumexp(
        logits + of_tokens, axis=1, keepdims=True, where=is_real
      )
    return logits + of_tokens + of_experts
