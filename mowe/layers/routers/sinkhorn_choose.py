"""Tokens choose by logits that Sinkhorn's iteration has balanced: S-BASE."""

import dataclasses

import jax
import jax.numpy as jnp

from mowe.layers.routers import tokens_choose


@dataclasses.dataclass(frozen=True)
class SinkhornChoose(tokens_choose.TokensChoose):
  """In training, tokens are assigned so that experts have about as many.

  Only which experts are chosen differs from TokensChoose: weights are the
  scores of the router. Without dropout tokens choose by their own logits.
  Balance is within groups: give SequenceGroups for the paper's baseline.

  Source: S-BASE, arXiv 2202.01169, as a baseline of arXiv 2310.10837; the
  latter's code iterates otherwise, see `paper_sinkhorn.py`.

  Attributes:
    iterations: updates of tokens and experts.

  Raises:
    ValueError: there are none, or there is a selection bias as well.
  """

  iterations: int = 3

  def __post_init__(self):
    super().__post_init__()
    if self.iterations < 1 or self.bias_rate:
      raise ValueError(
        'iterations must be at least 1, and bias_rate 0, as one way to balance '
        f'is enough, but they are {self.iterations} and {self.bias_rate}. '
        'Leave out bias_rate, or use TokensChoose.'
      )

  @property
  def looks_ahead(self) -> bool:
    """True: in training, later tokens of a group change what is chosen."""
    return True

  def ranks(
    self, logits, scores, selection_bias, *, is_valid, training
  ) -> jax.Array:
    """<float32>[groups, tokens, experts], the k largest of which are chosen."""
    if not training:
      return super().ranks(
        logits, scores, selection_bias, is_valid=is_valid, training=training
      )
    return self.log_assignment(logits, is_valid)

  def log_assignment(self, logits: jax.Array, is_valid: jax.Array) -> jax.Array:
    """Logarithms of r = exp(logits + u + v), balanced within each group.

    Every expert has as much as every other, and every token 1 when the
    iteration has converged.

    Args:
      logits: <float32>[groups, tokens, experts].
      is_valid: <bool>[groups, tokens]; padding takes no part.
    """
    is_real = is_valid[:, :, None]
    num_real = jnp.sum(is_real, axis=1, keepdims=True)
    share = jnp.log(num_real / logits.shape[-1])
    of_experts = jnp.zeros_like(logits[:, :1])
    for _ in range(self.iterations):
      of_tokens = -jax.nn.logsumexp(logits + of_experts, axis=2, keepdims=True)
      of_experts = share - jax.nn.logsumexp(
        logits + of_tokens, axis=1, keepdims=True, where=is_real
      )
    return logits + of_tokens + of_experts
