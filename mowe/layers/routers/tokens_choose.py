"""Each token chooses its k experts: Switch (k = 1), GShard, sigma-MoE."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mowe.layers.routers import router_base


@dataclasses.dataclass(frozen=True)
class TokensChoose:
  """The k best scores of each token; earlier tokens get slots first.

  Source: Switch, arXiv 2101.03961; batch priority: V-MoE, arXiv 2106.05974;
  sigmoid scores and excluded experts: sigma-MoE, arXiv 2310.10837; the
  selection bias: DeepSeek-V3, arXiv 2412.19437.

  Attributes:
    k: experts of a token.
    sigmoid: scores are sigmoids of the logits instead of their softmax.
    renormalize: the k weights of a token are divided by their sum.
    first_choices_first: all first choices of a group get slots before any
      second one, as in GShard, instead of all choices of a token before those
      of the next one. Encoders only: whether a second choice finds room then
      depends on later tokens.
    batch_prioritized: the same, and tokens with larger first scores get slots
      before others instead of after earlier ones. Encoders only, too.
    bias_rate: step of the selection bias that balances loads without a loss;
      0 has no bias.
    exclusion_rate: share of the experts that a token cannot have in training,
      other ones for each token (expert dropout of sigma-MoE). A token that is
      left with fewer than k has those.
    jitter: noise on the router's inputs in training.
    use_bias: the router's projection has a bias.
    routes_padding: padding chooses as other tokens do, with weight zero, as in
      flaxformer's scatter dispatch.

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
        f'k must be at least 1, but is {self.k}. Switch has 1, GShard 2.'
      )
    if self.renormalize and self.k == 1:
      raise ValueError(
        'renormalize must come with k of at least 2, but k is 1: the only '
        'weight would always be 1, and no gradient would reach the router. '
        'Leave renormalize out, or raise k.'
      )
    if not 0 <= self.exclusion_rate < 1:
      raise ValueError(
        'exclusion_rate must lie in 0..1, and below 1, or no expert would be '
        f'left, but is {self.exclusion_rate}. sigma-MoE has 0.05 or 0.1.'
      )
    if not 0 <= self.jitter < 1 or self.bias_rate < 0:
      raise ValueError(
        'jitter must lie in 0..1 and bias_rate must not be negative, but they '
        f'are {self.jitter} and {self.bias_rate}. 0.01 and 0.001 are usual.'
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
    """Pairs of one group."""
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
    logits, is_valid = inputs.logits, inputs.is_valid
    scores = jax.nn.sigmoid(logits) if self.sigmoid else jax.nn.softmax(logits)
    is_real = is_valid[:, :, None]
    is_allowed = jnp.broadcast_to(is_real, logits.shape)
    if self.routes_padding:
      # Padding has equal scores, all zero.
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
    ranks = jax.lax.stop_gradient(jnp.where(is_allowed, ranks, -jnp.inf))
    experts = jax.lax.top_k(ranks, self.k)[1]
    of_chosen = functools.partial(jnp.take_along_axis, indices=experts, axis=-1)
    is_chosen = of_chosen(is_allowed)
    own = of_chosen(scores)
    # By the scores: renormalised weights of one choice are all equal.
    priority = jax.lax.stop_gradient(own[:, :, 0] * is_valid)
    if self.renormalize:
      own = self._shares(own, of_chosen(logits), is_chosen)
    weights = jnp.where(is_chosen & is_real, own, 0)
    experts = jnp.where(is_chosen, experts, num_experts)
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
    """<float32>[groups, tokens, experts], the k largest of which are chosen."""
    del is_valid, training
    if selection_bias is not None:
      return scores + selection_bias[None, None, :]
    # Scores have the same order, but ties: large sigmoids are all 1.
    return logits

  def _shares(self, scores, logits, is_chosen):
    if self.sigmoid:
      scores = jnp.where(is_chosen, scores, 0)
      return scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    # The softmax of the chosen alone: no sum of small numbers to divide by.
    lowest = jnp.finfo(logits.dtype).min
    return jax.nn.softmax(jnp.where(is_chosen, logits, lowest))

  def _in_order(self, experts, weights, probs, priority):
    num_groups, num_tokens, k = experts.shape
    order = jnp.broadcast_to(
      jnp.arange(num_tokens, dtype=jnp.int32), (num_groups, num_tokens)
    )
    rank = order
    if self.batch_prioritized:
      order = jnp.argsort(-priority, axis=1, stable=True)
      rank = jnp.argsort(order, axis=1)
      experts = jnp.take_along_axis(experts, order[:, :, None], axis=1)
      weights = jnp.take_along_axis(weights, order[:, :, None], axis=1)
    choice = jnp.arange(k, dtype=jnp.int32)[None, None, :]
    if self.looks_ahead:
      # [groups, tokens, k] -> [groups, k * tokens]
      in_order = lambda x: x.swapaxes(1, 2).reshape(num_groups, -1)
      pairs = choice * num_tokens + rank[:, :, None]
    else:
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
