"""Sinkhorn as the code of sigma-MoE's paper has it, for comparison."""

import jax
import jax.numpy as jnp

from mowe.layers.routers import sinkhorn_choose


class PaperSinkhornChoose(sinkhorn_choose.SinkhornChoose):
  """S-BASE as it was measured in arXiv 2310.10837.

  Its updates subtract the potentials that the assignment adds, so that the
  iteration does not converge: loads are balanced loosely, and after some 20
  iterations of large logits all tokens prefer expert 0.

  Source: https://github.com/RobertCsordas/moe at 6b175aa.
  """

  def log_assignment(self, logits: jax.Array, is_valid: jax.Array) -> jax.Array:
    """Logarithms of what that code ranks experts by."""
    is_real = is_valid[:, :, None]
    num_real = jnp.sum(is_real, axis=1, keepdims=True)
    num_experts = logits.shape[-1]
    of_experts = jnp.zeros_like(logits[:, :1])
    for _ in range(self.iterations):
      of_tokens = jnp.log(num_real) - jax.nn.logsumexp(
        logits - of_experts, axis=2, keepdims=True
      )
      of_experts = jnp.log(num_experts) - jax.nn.logsumexp(
        logits - of_tokens, axis=1, keepdims=True, where=is_real
      )
    return logits + of_tokens + of_experts
