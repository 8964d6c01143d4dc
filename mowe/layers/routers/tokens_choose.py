"""Each token chooses its k experts: Switch (k = 1), GShard, sigma-MoE."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mowe.layers.routers import router_base


@dataclasses.dataclass(frozen=True)
class TokensChoose:
  """Each token chooses the k experts for which it has the best scores.

  By default, earlier tokens of a group get slots before later ones.

  Source: Switch, arXiv 2101.03961; batch priority: V-MoE, arXiv 2106.05974;
  sigmoid scores and excluded experts: sigma-MoE, arXiv 2310.10837; the
  selection bias: DeepSeek-V3, arXiv 2412.19437.

  Attributes:
    k: number of experts that a token chooses.
    sigmoid: whether scores are sigmoids of the logits instead of their softmax.
    renormalize: whether the k weights of a token are divided by their sum.
    first_choices_first: whether all first choices of a group get slots before
      any second choice does, as in GShard. Otherwise all choices of a token get
      slots before those of the next token. This is for encoders only, because
      later tokens then decide whether a second choice finds a slot.
    batch_prioritized: whether first choices get slots before second choices,
      and among these tokens with a larger first score before others, whatever
      their positions. This is for encoders only, for the same reason.
    bias_rate: step of the selection bias, which balances loads without a loss;
      0 is no such bias.
    exclusion_rate: probability with which a token cannot choose an expert in
      training, drawn for each token and expert (expert dropout of sigma-MoE). A
      token that is left with fewer than k experts chooses all of them.
    jitter: half-width of the noise by which the router's inputs are multiplied
      in training; see `router_base.RouterWeights`.
    use_bias: whether the router's projection has a bias.
    routes_padding: whether padding chooses as other tokens do and takes slots,
      with weight zero, as in flaxformer's scatter dispatch.

  Raises:
    ValueError: values that cannot work, alone or together.
  """

  k: int = 1
  sigmoid: bool = False
  renormalize: bool = False
  first_choices_first: bool = False
  batch_prioritized: bool = False
  bias_rate: float = 0.0
  exclusion_rate: float = 0.0
  jitter: float = 0.0
  use_bias: bool = False
  routes_padding: bool = False

  is_learned = True
  is_balanced = False
  each_token_chooses = True

  def __post_init__(self):
    if self.k < 1:
      raise ValueError(
        f'k must be at least 1, but is {self.k}. Set it to the number of '
        'experts that a token chooses: Switch has 1, GShard 2.'
      )
    if self.renormalize and self.k == 1:
      raise ValueError(
        'renormalize needs k of at least 2, but k is 1: the only weight of a '
        'token would always be 1, and no gradient would reach the router. '
        'Leave renormalize out, or raise k.'
      )
    if not 0 <= self.exclusion_rate < 1:
      raise ValueError(
        'exclusion_rate must be at least 0, and below 1 so that experts are '
        f'left, but is {self.exclusion_rate}. sigma-MoE has 0.05 or 0.1.'
      )
    if not 0 <= self.jitter < 1 or self.bias_rate < 0:
      raise ValueError(
        'jitter must be at least 0 and below 1, and bias_rate must not be '
        f'negative, but they are {self.jitter} and {self.bias_rate}. Usual '
        'values are 0.01 and 0.001.'
      )

  @property
  def looks_ahead(self) -> bool:
    """See `router_base.Router`."""
    return self.first_choices_first or self.batch_prioritized

  def check(self, num_experts: int) -> None:
    """Raises ValueError if there are fewer than k experts."""
    if self.k > num_experts:
      raise ValueError(
        f'k must be at most the number of experts, {num_experts}, but is '
        f'{self.k}. Lower k of TokensChoose or raise num_experts.'
      )

  def num_pairs(self, group_size: int, num_experts: int) -> int:
    """See `router_base.Router`."""
    del num_experts
    return group_size * self.k

  def __call__(
    self,
    inputs: router_base.RouterInputs,
    *,
    num_experts: int,
    training: bool = False,
  ) -> router_base.Choices:
    """Returns the choices of all groups; see `router_base.Router`."""
    # Logits, scores, ranks and is_allowed: [groups, tokens, experts].
    logits, is_valid = inputs.logits, inputs.is_valid
    scores = jax.nn.sigmoid(logits) if self.sigmoid else jax.nn.softmax(logits)
    is_real = is_valid[:, :, None]
    is_allowed = jnp.broadcast_to(is_real, logits.shape)
    if self.routes_padding:
      # Scores and logits of padding are zero for all experts, so padding
      # chooses without regard to what its vectors hold.
      scores *= is_real
      logits = jnp.where(is_real, logits, 0)
      is_allowed = jnp.ones_like(is_allowed)
    if inputs.excluded is not None:
      is_allowed &= ~inputs.excluded
    ranks = self.ranks(
      logits,
      scores,
      inputs.selection_bias,
      is_valid=is_valid,
      training=training,
    )
    # The choice itself has no gradient; the weights below have one.
    ranks = jax.lax.stop_gradient(jnp.where(is_allowed, ranks, -jnp.inf))
    # [groups, tokens, experts] -> [groups, tokens, k], best first
    experts = jax.lax.top_k(ranks, self.k)[1]
    of_chosen = functools.partial(jnp.take_along_axis, indices=experts, axis=-1)
    # top_k always returns k experts. If fewer are allowed, as for padding, the
    # others are no choices.
    is_chosen = of_chosen(is_allowed)
    own = of_chosen(scores)
    # The priority of a token is its first score before renormalisation: after
    # it, a token that may choose one expert alone has weight 1 at any score.
    priority = jax.lax.stop_gradient(own[:, :, 0] * is_valid)
    if self.renormalize:
      own = self._shares(own, of_chosen(logits), is_chosen)
    weights = jnp.where(is_chosen & is_real, own, 0)
    experts = jnp.where(is_chosen, experts, num_experts)
    # Losses and metrics need probabilities, which sigmoids are not. The small
    # number is for tokens all of whose sigmoids are zero.
    probs = scores
    if self.sigmoid:
      probs /= jnp.sum(scores, axis=-1, keepdims=True) + 1e-20
    return self._in_order(experts, weights, probs, priority)

  def ranks(
    self,
    logits: jax.Array,
    scores: jax.Array,
    selection_bias: jax.Array | None,
    *,
    is_valid: jax.Array,
    training: bool,
  ) -> jax.Array:
    """Returns the numbers by which each token ranks the experts.

    Args:
      logits: <float32>[groups, tokens, experts], the router's logits.
      scores: <float32>[groups, tokens, experts], sigmoids or softmax of the
        logits.
      selection_bias: <float32>[experts], or None.
      is_valid: <bool>[groups, tokens], False for padding.
      training: whether to decide as in training.

    Returns:
      <float32>[groups, tokens, experts]; a token chooses the k experts with the
      largest numbers.
    """
    del is_valid, training
    if selection_bias is not None:
      return scores + selection_bias[None, None, :]
    # Logits have the same order as scores, without their ties: the sigmoids of
    # all large logits are 1.
    return logits

  def _shares(self, scores, logits, is_chosen):
    """Returns weights that add up to one over the chosen experts.

    All arrays are [groups, tokens, k].
    """
    if self.sigmoid:
      scores = jnp.where(is_chosen, scores, 0)
      return scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    # This softmax over the chosen logits equals the chosen probabilities over
    # their sum, but does not divide by a sum that may be close to zero. The
    # lowest number is finite, because a softmax of -inf alone would be NaN.
    lowest = jnp.finfo(logits.dtype).min
    return jax.nn.softmax(jnp.where(is_chosen, logits, lowest))

  def _in_order(self, experts, weights, probs, priority):
    """Lists the pairs of each group in the order in which they get slots.

    Args:
      experts: <int32>[groups, tokens, k], the chosen experts, best first.
      weights: <float32>[groups, tokens, k], the gates of the chosen experts.
      probs: <float32>[groups, tokens, experts].
      priority: <float32>[groups, tokens], the larger the earlier if batches are
        prioritized.
    """
    num_groups, num_tokens, k = experts.shape
    # `order` is the token at each place of the order, `rank` the place of each
    # token, its inverse. Both are [groups, tokens].
    order = jnp.broadcast_to(
      jnp.arange(num_tokens, dtype=jnp.int32), (num_groups, num_tokens)
    )
    rank = order
    if self.batch_prioritized:
      order = jnp.argsort(-priority, axis=1, stable=True)
      # The second argsort inverts the permutation.
      rank = jnp.argsort(order, axis=1)
      experts = jnp.take_along_axis(experts, order[:, :, None], axis=1)
      weights = jnp.take_along_axis(weights, order[:, :, None], axis=1)
    # `pairs` [groups, tokens, k] says where `in_order` puts each choice of each
    # token.
    choice = jnp.arange(k, dtype=jnp.int32)[None, None, :]
    if self.looks_ahead:
      # All first choices, then all second ones.
      # [groups, tokens, k] -> [groups, k * tokens]
      in_order = lambda x: x.swapaxes(1, 2).reshape(num_groups, -1)
      pairs = choice * num_tokens + rank[:, :, None]
    else:
      # All choices of the first token, then those of the second one.
      # [groups, tokens, k] -> [groups, tokens * k]
      in_order = lambda x: x.reshape(num_groups, -1)
      pairs = rank[:, :, None] * k + choice
    return router_base.Choices(
      tokens=in_order(jnp.broadcast_to(order[:, :, None], experts.shape)),
      experts=in_order(experts),
      weights=in_order(weights),
      pairs=pairs,
      probs=probs,
    )
