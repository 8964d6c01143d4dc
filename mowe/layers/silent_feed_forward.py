"""A feed-forward that adds nothing, for measuring a model without its own."""

from typing import Any

import jax
import jax.numpy as jnp

from mowe.layers import feed_forward_base


class SilentFeedForward(feed_forward_base.FeedForward):
  """Returns zeros, so that the residual connection passes tokens on.

  Attributes:
    dropout_rate: ignored.
    dtype: dtype of the zeros.

  Call: tokens <float>[batch, length, embed] and any routing_ids, to
    <dtype>[batch, length, embed].
  """

  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    del routing_ids, deterministic
    return jnp.zeros_like(tokens, self.dtype)
