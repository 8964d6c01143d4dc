"""Layers as users write them in a module of their own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers import feed_forward_base


class PlainFeedForward(nn.Module):
  """A Linen module that does not use this package."""

  hidden: int = 9
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array, *, deterministic: bool) -> jax.Array:
    hidden = nn.relu(nn.Dense(self.hidden, dtype=self.dtype)(tokens))
    hidden = nn.Dropout(self.dropout_rate)(hidden, deterministic=deterministic)
    return nn.Dense(tokens.shape[-1], dtype=self.dtype)(hidden)


class ByParity(feed_forward_base.FeedForward):
  """Adds one of two vectors to a token, one for odd ids and one for even."""

  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  reads_token_ids = True

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    del deterministic
    table = nn.Embed(2, tokens.shape[-1], dtype=self.dtype)
    return table(routing_ids % 2) * (routing_ids >= 0)[:, :, None]


class LooksAhead(ByParity):
  """A layer that declares that it looks ahead."""

  looks_ahead = True
