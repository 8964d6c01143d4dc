"""The contract of all routers, and the parameters of learned routers.

A router only decides: it answers with `Choices`. A dispatch gives the choices
slots and moves tokens, and experts only compute. Any router works with any
dispatch, but for combinations that `Dispatch.check` refuses.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from mowe.layers import parameter

# Name of the selection bias among the parameters of the module `router`.
SELECTION_BIAS = 'selection_bias'


class Choices(NamedTuple):
  """A router's answer: pairs of a token and an expert, for each group.

  The pairs of a group are in order of priority: where slots are limited, a pair
  gets a slot before later pairs with the same expert.

  Attributes:
    tokens: <int32>[groups, pairs], the token of each pair, by its position in
      the group.
    experts: <int32>[groups, pairs], the expert of each pair; the number of
      experts if the pair stands for nothing, as for padding.
    weights: <float32>[groups, pairs], the gate by which the output of the
      expert is multiplied before the outputs of a token are added up.
    pairs: <int32>[groups, tokens, width], the pairs of each token, where width
      is the most that a token can have; the number of pairs fills up the rest.
    probs: <float32>[groups, tokens, experts], probabilities that add up to one
      over the experts, for losses and metrics; None if nothing is learned.
  """

  tokens: jax.Array
  experts: jax.Array
  weights: jax.Array
  pairs: jax.Array
  probs: jax.Array | None


class RouterInputs(NamedTuple):
  """The arrays from which a router decides, for all groups.

  Attributes:
    is_valid: <bool>[groups, tokens], False for padding.
    logits: <float32>[groups, tokens, experts], the logits of a learned router;
      None for other routers.
    routing_ids: <int32>[groups, tokens], what hash routers read; None if the
      layer was called without ids.
    selection_bias: <float32>[experts], numbers that are added to the scores
      when experts are chosen, but not to the weights; None if there is no such
      bias.
    excluded: <bool>[groups, tokens, experts], True where a token cannot choose
      an expert in this call; None if it can choose any.
  """

  is_valid: jax.Array
  logits: jax.Array | None = None
  routing_ids: jax.Array | None = None
  selection_bias: jax.Array | None = None
  excluded: jax.Array | None = None


class Router(Protocol):
  """Decides which experts compute which tokens.

  A router is a frozen class that holds settings and no arrays.

  Attributes:
    is_learned: whether the router reads logits; otherwise it reads routing ids.
    is_balanced: whether the router needs no load-balancing loss, because its
      loads are even by construction or cannot be learned.
    each_token_chooses: whether the experts of a token depend on that token
      alone outside of training. If not, a MoeLayer makes each sequence a group
      of its own there, so that no answer depends on its neighbours in the
      batch.
    looks_ahead: whether later tokens of a group may change the experts of a
      token, or whether these have a slot for it. Decoders refuse such routers,
      which would let them learn from the future.
    routes_padding: whether padding is given to experts, with weight zero.
  """

  is_learned: bool
  is_balanced: bool
  each_token_chooses: bool
  looks_ahead: bool
  routes_padding: bool

  def check(self, num_experts: int) -> None:
    """Raises ValueError if the router cannot serve a layer.

    Args:
      num_experts: number of experts of the layer.
    """

  def num_pairs(self, group_size: int, num_experts: int) -> int:
    """Returns the number of pairs of one group, the last axis of `Choices`.

    Args:
      group_size: number of tokens of the group, padding included.
      num_experts: number of experts to choose from.
    """

  def __call__(
    self, inputs: RouterInputs, *, num_experts: int, training: bool = False
  ) -> Choices:
    """Returns the choices of all groups.

    Args:
      inputs: what the router decides from.
      num_experts: the number of experts to choose from.
      training: whether to decide as in training.
    """


class LearnedRouter(Router, Protocol):
  """A router that reads learned logits.

  Attributes:
    sigmoid: whether scores are sigmoids of the logits instead of their softmax.
    use_bias: whether the projection to the logits has a bias.
    jitter: half-width of the noise by which the inputs of that projection are
      multiplied in training; see `RouterWeights`.
    bias_rate: step of the selection bias; 0 is no such bias.
    exclusion_rate: probability with which a token cannot choose an expert in
      training.
  """

  sigmoid: bool
  use_bias: bool
  jitter: float
  bias_rate: float
  exclusion_rate: float


class Logits(Protocol):
  """Makes the module that computes a router's logits; a frozen class."""

  def build(
    self,
    num_experts: int,
    use_bias: bool,
    jitter: float,
    kernel_init: parameter.Initializer,
    *,
    name: str,
  ) -> nn.Module:
    """Returns a module that maps tokens to logits, as `RouterWeights` does.

    Args:
      num_experts: number of logits of a token.
      use_bias: whether the last projection has a bias.
      jitter: half-width of the noise by which tokens are multiplied in
        training.
      kernel_init: draws the kernel of the last projection.
      name: name of the module.
    """


class RouterWeights(nn.Module):
  """Computes router logits in float32.

  In bfloat16 equal logits would be frequent, and `top_k` gives every tie to the
  expert with the lower number.

  Attributes:
    num_experts: number of experts, the size of the last axis of the result.
    use_bias: whether a learned bias is added, as flaxformer can.
    jitter: half-width of the noise. In training, the inputs are multiplied by
      numbers drawn evenly from 1 - jitter to 1 + jitter out of the `dropout`
      stream. Experts get the tokens without noise.
    kernel_init: draws the kernel <float32>[embed, experts].

  Call: tokens <float>[groups, tokens, embed] to <float32>[groups, tokens,
    experts]. `deterministic` turns the noise off.
  """

  num_experts: int
  use_bias: bool = False
  jitter: float = 0.0
  # With 0.02, as in flaxformer, the first choices are nearly even.
  kernel_init: parameter.Initializer = parameter.normal(0.02)

  @nn.compact
  def __call__(
    self, tokens: jax.Array, *, deterministic: bool = True
  ) -> jax.Array:
    tokens = tokens.astype(jnp.float32)
    if self.jitter > 0 and not deterministic:
      tokens *= jax.random.uniform(
        self.make_rng('dropout'),
        tokens.shape,
        minval=1 - self.jitter,
        maxval=1 + self.jitter,
      )
    return self.project(tokens)

  def project(self, tokens: jax.Array) -> jax.Array:
    """Returns logits <float32>[groups, tokens, experts]; a subclass may differ.

    Args:
      tokens: <float32>[groups, tokens, embed], with noise in training.
    """
    return Projection(
      self.num_experts, self.use_bias, self.kernel_init, name='w'
    )(tokens)


class Projection(nn.Module):
  """A dense layer in float32, computed in full precision on every device.

  Attributes:
    features: size of the last axis of the result.
    use_bias: whether a learned bias is added.
    kernel_init: draws the kernel <float32>[in, features].

  Call: <float32>[groups, tokens, in] to <float32>[groups, tokens, features].
  """

  features: int
  use_bias: bool
  kernel_init: parameter.Initializer

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    make = lambda name, init, shape, axes: partitioning.param_with_axes(
      name, init, shape, jnp.float32, axes=axes
    )
    shape = (inputs.shape[-1], self.features)
    # Inputs may be the hidden units of a router, whose kernel has this layout
    # as well. The second axis has another name, as no name may occur twice.
    kernel = make('kernel', self.kernel_init, shape, ('embed', 'unmodeled'))
    logits = jnp.matmul(inputs, kernel, precision=jax.lax.Precision.HIGHEST)
    if self.use_bias:
      bias = make('bias', nn.initializers.zeros, (shape[1],), ('unmodeled',))
      logits += bias[None, None, :]
    return logits


class ExcludedExperts(nn.Module):
  """Draws which experts each token cannot choose: sigma-MoE's expert dropout.

  Source: arXiv 2310.10837, section 5. The draws of different tokens are
  independent.

  Attributes:
    rate: probability with which a token cannot choose an expert.

  Call: shape (groups, tokens, experts) to <bool>[groups, tokens, experts], True
    where a token cannot choose an expert, drawn from the `dropout` stream.
  """

  rate: float

  @nn.compact
  def __call__(self, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(self.make_rng('dropout'), shape) < self.rate


@dataclasses.dataclass(frozen=True)
class LinearLogits:
  """Logits that are one product of the tokens with a kernel."""

  def build(self, *arguments: Any, **named: Any) -> nn.Module:
    """See `Logits`."""
    return RouterWeights(*arguments, **named)


class RouterScores(NamedTuple):
  """What a learned router is given; all None for a router without parameters.

  Attributes:
    logits: <float32>[groups, tokens, num_experts].
    bias: <float32>[num_experts], the `selection_bias` of `RouterInputs`; None
      if the router has no such bias.
    excluded: the `excluded` of `RouterInputs`; None outside of training and if
      the router excludes none.
  """

  logits: jax.Array | None = None
  bias: jax.Array | None = None
  excluded: jax.Array | None = None


class LearnedRouting(nn.Module):
  """Makes the inputs of a learned router: logits, bias and excluded experts.

  The selection bias gets no gradient. It is a parameter so that it is saved and
  read with the model, and `router_losses.balanced_bias` computes its next
  value.

  Attributes:
    router: the router that will decide, of which this module reads settings.
    num_experts: number of experts to choose from.
    kernel_init: draws the last kernel of the logits.
    logits: forms the logits: LinearLogits or one of `module_router`.

  Call: tokens <float>[groups, tokens, embed] to RouterScores.
  """

  router: LearnedRouter
  num_experts: int
  kernel_init: parameter.Initializer = parameter.normal(0.02)
  logits: Logits = LinearLogits()

  @nn.compact
  def __call__(self, tokens: jax.Array, *, deterministic: bool) -> RouterScores:
    logits = self.logits.build(
      self.num_experts,
      self.router.use_bias,
      self.router.jitter,
      self.kernel_init,
      name='router_weights',
    )(tokens, deterministic=deterministic)
    bias = None
    if self.router.bias_rate > 0:
      bias = jax.lax.stop_gradient(
        partitioning.param_with_axes(
          SELECTION_BIAS,
          nn.initializers.zeros,
          (self.num_experts,),
          jnp.float32,
          axes=('unmodeled',),
        )
      )
    excluded = None
    if self.router.exclusion_rate > 0 and not deterministic:
      excluded = ExcludedExperts(self.router.exclusion_rate, name='excluded')(
        logits.shape
      )
    return RouterScores(logits, bias, excluded)
