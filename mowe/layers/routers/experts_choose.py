"""Each expert chooses its tokens, which balances loads by construction."""

import dataclasses

import jax
import jax.numpy as jnp

from mowe.layers.routers import router_base


@dataclasses.dataclass(frozen=True)
class ExpertsChoose:
  """Each expert takes those tokens of a group that give it most probability.

  A token may be taken by any number of experts, or by none. The router is for
  encoders, because later tokens decide which experts take a token. With
  `SequenceGroups` these are tokens of the same sequence, in training as in
  evaluation. With larger groups, the sequences of a group compete in training,
  but not in evaluation.

  Source: Expert Choice, arXiv 2202.09368. The source counts padding as other
  tokens; here, the number of tokens that an expert takes follows from the
  number of real tokens.

  Attributes:
    factor: number of experts that take a real token, on average.
    min_tokens: least number of tokens that an expert takes from a group.
    jitter: half-width of the noise by which the router's inputs are multiplied
      in training; see `router_base.RouterWeights`.
    use_bias: whether the router's projection has a bias.
    routes_padding: whether padding counts as other tokens do and may be taken,
      with weight zero, as in flaxformer.

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
        'factor must be positive, min_tokens at least 1 and jitter at least 0 '
        f'and below 1, but they are {self.factor}, {self.min_tokens} and '
        f'{self.jitter}. Use factor 1.0 for one expert per token on average.'
      )

  def check(self, num_experts: int) -> None:
    """Accepts any number of experts."""

  def tokens_per_expert(self, group_size: int, num_experts: int) -> int:
    """Returns how many tokens an expert takes from a group without padding."""
    tokens = round(self.factor * group_size / num_experts)
    return min(max(tokens, self.min_tokens), group_size)

  def num_pairs(self, group_size: int, num_experts: int) -> int:
    """See `router_base.Router`; with padding, some pairs stand for nothing."""
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
    # The choice itself has no gradient; the weights below have one.
    scores = jax.lax.stop_gradient(weights)
    if not self.routes_padding:
      # This is below every probability, so that padding is taken only when
      # there are no real tokens left.
      scores = jnp.where(is_valid[:, None, :], scores, -1.0)
    most = self.tokens_per_expert(num_tokens, num_experts)
    # [groups, experts, tokens] -> [groups, experts, most], best first
    best, tokens = jax.lax.top_k(scores, most)
    is_real = best >= 0
    if not self.routes_padding:
      # Shapes are static, so every expert has room for `most` tokens, its share
      # of a group without padding. Its share of the real tokens may be smaller:
      # pairs beyond it stand for nothing.
      num_real = jnp.sum(is_valid, axis=1, dtype=jnp.float32)
      taken = jnp.maximum(
        jnp.round(self.factor * num_real / num_experts), self.min_tokens
      )
      is_real &= jnp.arange(most)[None, None, :] < taken[:, None, None]
    weights = jnp.take_along_axis(weights, tokens, axis=2) * is_real
    own = jnp.arange(num_experts, dtype=jnp.int32)[None, :, None]
    experts = jnp.where(is_real, own, num_experts)
    # [groups, experts, most] -> [groups, experts * most]
    flat = lambda x: x.reshape(num_groups, -1)
    return router_base.Choices(
      tokens=flat(tokens),
      experts=flat(experts),
      weights=flat(weights),
      pairs=_pairs_of_tokens(tokens, is_real, num_tokens),
      probs=probs,
    )


def _pairs_of_tokens(tokens, is_real, num_tokens):
  """Returns the pairs of each token, <int32>[groups, tokens, experts].

  The entry for a token and an expert is the pair in which this expert took this
  token, or the number of pairs if it did not.

  Args:
    tokens: <int32>[groups, experts, room], the tokens that each expert took.
    is_real: <bool>[groups, experts, room], False for pairs that stand for
      nothing.
    num_tokens: number of tokens of a group.
  """
  num_groups, num_experts, room = tokens.shape
  num_pairs = num_experts * room
  pair = jnp.arange(num_pairs, dtype=jnp.int32).reshape(1, num_experts, room)
  # This token is out of range, so that the scatter below drops the pair.
  tokens = jnp.where(is_real, tokens, num_tokens)
  group = jnp.arange(num_groups)[:, None, None]
  expert = jnp.arange(num_experts)[None, :, None]
  table = jnp.full((num_groups, num_tokens, num_experts), num_pairs, jnp.int32)
  return table.at[group, tokens, expert].set(
    jnp.broadcast_to(pair, tokens.shape), mode='drop', unique_indices=True
  )
