"""Sinkhorn as in the code of sigma-MoE's paper, for comparison."""

import jax
import jax.numpy as jnp

from mowe.layers.routers import sinkhorn_choose


class PaperSinkhornChoose(sinkhorn_choose.SinkhornChoose):
  """S-BASE as the paper measured it, arXiv 2310.10837.

  Its updates subtract the potentials that the assignment adds. So the iteration
  does not converge: loads are balanced loosely, and with large logits all
  tokens prefer expert 0 after some 20 iterations.

  Source: https://github.com/RobertCsordas/moe at 6b175aa.
  """

  def log_assignment(self, logits: jax.Array, is_valid: jax.Array) -> jax.Array:
    """The logarithms by which that code ranks the experts."""
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
