"""Each expert chooses its tokens: balanced by construction."""

import dataclasses

import jax
import jax.numpy as jnp

from mowe.layers.routers import router_base


@dataclasses.dataclass(frozen=True)
class ExpertsChoose:
  """Every expert takes the tokens of its group that have most of it.

  A token may have any number of experts, or none. For encoders: which experts
  a token has depends on later tokens. With `SequenceGroups` it depends on its
  own sequence alone, in training as in evaluation; with larger groups, training
  lets the sequences of a group compete, and evaluation does not.

  Source: Expert Choice, arXiv 2202.09368. There, padding counts as other tokens
  do; here, how many tokens an expert takes follows from the real ones.

  Attributes:
    factor: experts of a real token on average.
    min_tokens: tokens of an expert at least.
    jitter: noise on the router's inputs in training.
    use_bias: the router's projection has a bias.
    routes_padding: padding counts as other tokens do, and may be chosen, with
      weight zero, as in flaxformer.

  Raises:
    ValueError: values that cannot work.
  """

  factor: float = 1.0
  min_tokens: int = 1
  jitter: float = 0.0
  use_bias: bool = False
  routes_padding: bool = False

  is_learned = True
  is_balanced = True
  each_token_chooses = False
  looks_ahead = True
  bias_rate = 0.0
  exclusion_rate = 0.0

  def __post_init__(self):
    if self.factor <= 0 or self.min_tokens < 1 or not 0 <= self.jitter < 1:
      raise ValueError(
        'factor must be positive, min_tokens at least 1 and jitter in 0..1, '
        f'but they are {self.factor}, {self.min_tokens}, {self.jitter}. '
        'factor 1.0 is one expert per token on average.'
      )

  def check(self, num_experts: int) -> None:
    """Accepts any number of experts."""

  def tokens_per_expert(self, group_size: int, num_experts: int) -> int:
    """Tokens that one expert takes from a group without padding."""
    tokens = round(self.factor * group_size / num_experts)
    return min(max(tokens, self.min_tokens), group_size)

  def num_pairs(self, group_size: int, num_experts: int) -> int:
    """Pairs of one group without padding: room for those of any group."""
    return num_experts * self.tokens_per_expert(group_size, num_experts)

  def __call__(
    self,
    inputs: router_base.RouterInputs,
    *,
    num_experts: int,
    training: bool = False,
  ) -> router_base.Choices:
    """Returns the choices of all groups; see `router_base.Router`."""
    del training
    logits, is_valid = inputs.logits, inputs.is_valid
    num_groups, num_tokens, _ = logits.shape
    probs = jax.nn.softmax(logits)
    if self.routes_padding:
      probs *= is_valid[:, :, None]
    # [groups, tokens, experts] -> [groups, experts, tokens]
    weights = probs.swapaxes(1, 2)
    scores = jax.lax.stop_gradient(weights)
    if not self.routes_padding:
      # Below every probability: chosen only when real tokens run out.
      scores = jnp.where(is_valid[:, None, :], scores, -1.0)
    most = self.tokens_per_expert(num_tokens, num_experts)
    best, tokens = jax.lax.top_k(scores, most)
    is_real = best >= 0
    if not self.routes_padding:
      num_real = jnp.sum(is_valid, axis=1, dtype=jnp.float32)
      taken = jnp.maximum(
        jnp.round(self.factor * num_real / num_experts), self.min_tokens
      )
      is_real &= jnp.arange(most)[None, None, :] < taken[:, None, None]
    weights = jnp.take_along_axis(weights, tokens, axis=2) * is_real
    own = jnp.arange(num_experts, dtype=jnp.int32)[None, :, None]
    experts = jnp.where(is_real, own, num_experts)
    flat = lambda x: x.reshape(num_groups, -1)
    return router_base.Choices(
      tokens=flat(tokens),
      experts=flat(experts),
      weights=flat(weights),
      pairs=_pairs_of_tokens(tokens, is_real, num_tokens),
      probs=probs,
    )


def _pairs_of_tokens(tokens, is_real, num_tokens):
  """One column per expert, the pair in which it chose the token."""
  num_groups, num_experts, room = tokens.shape
  num_pairs = num_experts * room
  pair = jnp.arange(num_pairs, dtype=jnp.int32).reshape(1, num_experts, room)
  # Out of range, so that the pair is not written.
  tokens = jnp.where(is_real, tokens, num_tokens)
  group = jnp.arange(num_groups)[:, None, None]
  expert = jnp.arange(num_experts)[None, :, None]
  table = jnp.full((num_groups, num_tokens, num_experts), num_pairs, jnp.int32)
  return table.at[group, tokens, expert].set(
    jnp.broadcast_to(pair, tokens.shape), mode='drop', unique_indices=True
  )
