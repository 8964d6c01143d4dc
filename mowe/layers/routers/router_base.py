"""What every router answers, and the weights that learned routers read.

A router only decides: it answers with `Choices`. A dispatch gives the choices
slots and moves tokens; experts only compute. Any router works with any
dispatch.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning

from mowe.layers import parameter

# Name of the parameter in the module `router`.
SELECTION_BIAS = 'selection_bias'


class Choices(NamedTuple):
  """Pairs of a token and an expert, per group, in order of priority.

  Attributes:
    tokens: <int32>[groups, pairs], position of the pair's token in its group.
    experts: <int32>[groups, pairs], the expert; the number of experts where
      the pair stands for nothing, as for padding.
    weights: <float32>[groups, pairs] of the expert's output in the token's sum.
    pairs: <int32>[groups, tokens, width], the pairs of each token; the number
      of pairs where there is none.
    probs: <float32>[groups, tokens, experts], adding up to one over the
      experts, for losses and metrics; None if nothing is learned.
  """

  tokens: jax.Array
  experts: jax.Array
  weights: jax.Array
  pairs: jax.Array
  probs: jax.Array | None


class RouterInputs(NamedTuple):
  """What a router decides from, for all groups.

  Attributes:
    is_valid: <bool>[groups, tokens], False for padding.
    logits: <float32>[groups, tokens, experts]; None where nothing is learned.
    routing_ids: <int32>[groups, tokens], or None.
    selection_bias: <float32>[experts], added to the scores when experts are
      selected and not to the weights of their outputs; or None.
    excluded: <bool>[groups, tokens, experts], True where a token may not have
      an expert this time; or None.
  """

  is_valid: jax.Array
  logits: jax.Array | None = None
  routing_ids: jax.Array | None = None
  selection_bias: jax.Array | None = None
  excluded: jax.Array | None = None


class Router(Protocol):
  """A frozen class that decides; it holds settings and no arrays.

  Attributes:
    is_learned: reads logits; otherwise it reads routing ids.
    is_balanced: needs no load-balancing loss.
    each_token_chooses: without dropout a token's experts depend on that token
      alone. Otherwise a MoeLayer makes each sequence a group of its own outside
      of training, so that no answer depends on its neighbours in the batch.
    looks_ahead: a token's experts, or whether they have room for it, may depend
      on later tokens of its group, so that a decoder would learn from the
      future.
    routes_padding: padding is given to experts, with weight zero.
  """

  is_learned: bool
  is_balanced: bool
  each_token_chooses: bool
  looks_ahead: bool
  routes_padding: bool

  def check(self, num_experts: int) -> None:
    """Raises ValueError if this router cannot serve so many experts."""

  def num_pairs(self, group_size: int, num_experts: int) -> int:
    """Pairs of one group: the slots that all its choices need."""

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
    sigmoid: scores are sigmoids of the logits instead of their softmax.
    use_bias: the projection to the logits has a bias.
    jitter: noise on the inputs of that projection in training.
    bias_rate: step of the selection bias; 0 has no such bias.
    exclusion_rate: share of the experts that a token cannot have in training.
  """

  sigmoid: bool
  use_bias: bool
  jitter: float
  bias_rate: float
  exclusion_rate: float


class Logits(Protocol):
  """How the logits of a learned router are formed; a frozen class."""

  def build(
    self,
    num_experts: int,
    use_bias: bool,
    jitter: float,
    kernel_init: parameter.Initializer,
    *,
    name: str,
  ) -> nn.Module:
    """Returns the module that makes logits of tokens.

    Args:
      num_experts: the number of logits of a token.
      use_bias: as in `LearnedRouter`.
      jitter: as in `LearnedRouter`.
      kernel_init: draws the kernel of the last projection.
      name: of the module.
    """


class RouterWeights(nn.Module):
  """Router logits, in float32: equal bfloat16 logits are frequent.

  Attributes:
    num_experts: size of the last axis of the result.
    use_bias: adds a learned bias, as flaxformer can.
    jitter: in training, inputs are multiplied by numbers drawn evenly from
      1 - jitter .. 1 + jitter, out of the `dropout` stream. Experts get the
      tokens without it.
    kernel_init: draws the kernel, <float32>[embed, experts].

  Call: tokens <float>[groups, tokens, embed] to <float32>[groups, tokens,
    experts].
  """

  num_experts: int
  use_bias: bool = False
  jitter: float = 0.0
  # 0.02, as in flaxformer: the first choices are nearly even.
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
    """Logits of tokens <float32>[groups, tokens, embed]."""
    return Projection(
      self.num_experts, self.use_bias, self.kernel_init, name='w'
    )(tokens)


class Projection(nn.Module):
  """A product in float32, in full precision.

  Attributes:
    features: size of the last axis of the result.
    use_bias: adds a learned bias.
    kernel_init: draws the kernel.

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
    # Inputs may be hidden units of the router: no axis may occur twice.
    kernel = make('kernel', self.kernel_init, shape, ('embed', 'unmodeled'))
    logits = jnp.matmul(inputs, kernel, precision=jax.lax.Precision.HIGHEST)
    if self.use_bias:
      bias = make('bias', nn.initializers.zeros, (shape[1],), ('unmodeled',))
      logits += bias[None, None, :]
    return logits


class ExcludedExperts(nn.Module):
  """Leaves experts out at random: in sigma-MoE, expert dropout.

  Source: arXiv 2310.10837, section 5. Each token loses experts of its own.

  Attributes:
    rate: share of the experts that is left out.

  Call: the shape of the logits to <bool>[groups, tokens, experts], drawn from
    the `dropout` stream.
  """

  rate: float

  @nn.compact
  def __call__(self, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(self.make_rng('dropout'), shape) < self.rate


@dataclasses.dataclass(frozen=True)
class LinearLogits:
  """Logits are one product, as everywhere but in ModuleFormer."""

  def build(self, *arguments: Any, **named: Any) -> nn.Module:
    """The RouterWeights."""
    return RouterWeights(*arguments, **named)


class LearnedRouting(nn.Module):
  """What a learned router reads: logits, selection bias, excluded experts.

  No gradient reaches the bias: it is a parameter so that it is saved and read
  with the model, and `router_losses.balanced_bias` gives its next value.

  Attributes:
    router: what decides.
    num_experts: experts to choose from.
    kernel_init: draws the kernel of the logits.
    logits: how they are formed: LinearLogits or one of `module_router`.

  Call: tokens <float>[groups, tokens, embed] to logits <float32>[groups,
    tokens, experts], the bias <float32>[experts], and <bool>[groups, tokens,
    experts]; None for each of the latter two that there is not.
  """

  router: LearnedRouter
  num_experts: int
  kernel_init: parameter.Initializer = parameter.normal(0.02)
  logits: Logits = LinearLogits()

  @nn.compact
  def __call__(
    self, tokens: jax.Array, *, deterministic: bool
  ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
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
    return logits, bias, excluded
