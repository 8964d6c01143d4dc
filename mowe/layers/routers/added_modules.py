"""Routing with modules that were added to a trained layer.

What was published of ModuleFormer does not say how a router is extended; the
rule here is ours. Old modules are chosen and weighted by the old logits alone,
as before. Besides, each token meets `k` of the new modules, weighted by their
probability among all modules, old and new. New modules begin with output
kernels of zero. So:

- the layer's outputs are the same when modules are added, whatever the new
  columns of the router are;
- a new module has a gradient from the first step, as it is chosen and weighted;
- an old module is never displaced, and its weight never changes, whatever new
  modules learn.

A softmax over all modules before the choice of k among all would have none of
these three. The price is k modules more per token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mowe.layers.routers import (
  router_base,
  router_losses,
  tokens_choose,
  wrapped_router,
)


@dataclasses.dataclass(frozen=True)
class AddedChoose(wrapped_router.WrappedRouter):
  """The old router for the old modules, and k of the new ones for each token.

  Attributes:
    router: of the old modules: TokensChoose, another AddedChoose, or a
      KeptChoose of `pruned_modules`.
    num_old: old modules; they come first.
    k: new modules of a token.

  Raises:
    ValueError: a router that modules cannot be added to.
  """

  router: Any
  num_old: int
  k: int = 1

  def __post_init__(self):
    is_known = self.router.is_learned and self.router.each_token_chooses
    if not is_known or self.router.routes_padding:
      raise ValueError(
        'Modules can be added where each token chooses by learned logits, and '
        f'padding chooses none, but the router is {self.router}. Train the '
        'model with TokensChoose.'
      )
    if self.k < 1 or self.num_old < 1:
      raise ValueError(
        'k and num_old must be at least 1, but are '
        f'{self.k} and {self.num_old}. k is the number of new modules that a '
        'token meets.'
      )

  def check(self, num_experts: int) -> None:
    """Raises ValueError if there are fewer than k new modules."""
    self.router.check(self.num_old)
    if self.k > num_experts - self.num_old:
      raise ValueError(
        'k must be at most the number of new modules, '
        f'{num_experts - self.num_old}, but is {self.k}. Lower k of '
        'AddedChoose, or add more modules.'
      )

  def num_pairs(self, group_size: int, num_experts: int) -> int:
    """Pairs of one group."""
    del num_experts
    old = self.router.num_pairs(group_size, self.num_old)
    return old + self.k * group_size

  def __call__(
    self,
    inputs: router_base.RouterInputs,
    *,
    num_experts: int,
    training: bool = False,
  ) -> router_base.Choices:
    """Returns the choices of all groups; see `router_base.Router`."""
    logits, excluded = inputs.logits, inputs.excluded
    # Of a router with kept gates the columns are more than the modules.
    columns = logits.shape[-1]
    old_columns = columns - (num_experts - self.num_old)
    is_old = jnp.arange(columns) < old_columns
    old_bias = bias = None
    if inputs.selection_bias is not None:
      old_bias, new_bias = jnp.split(inputs.selection_bias, [self.num_old])
      bias = jnp.pad(new_bias, (old_columns, 0))
    old = self.router(
      inputs._replace(
        logits=logits[:, :, :old_columns],
        selection_bias=old_bias,
        excluded=None if excluded is None else excluded[:, :, :old_columns],
      ),
      num_experts=self.num_old,
      training=training,
    )
    not_new = is_old[None, None, :]
    new = tokens_choose.TokensChoose(self.k, sigmoid=self.sigmoid)(
      inputs._replace(
        selection_bias=bias,
        excluded=not_new if excluded is None else not_new | excluded,
      ),
      num_experts=columns,
      training=training,
    )
    probs = new.probs
    if columns > num_experts:
      share = jnp.sum(probs[:, :, :old_columns], axis=-1, keepdims=True)
      probs = jnp.concatenate(
        [share * old.probs, probs[:, :, old_columns:]], axis=-1
      )
    new = new._replace(
      experts=new.experts - (old_columns - self.num_old), probs=probs
    )
    old = old._replace(
      experts=jnp.where(old.experts < self.num_old, old.experts, num_experts)
    )
    return _joined(old, new)


@dataclasses.dataclass(frozen=True)
class AddedLosses(router_losses.RouterLosses):
  """Losses, with one against new modules that take over.

  It is the divergence of the router from what it was: of the softmax over old
  modules from that over all, which is -log of what is left to the old ones.

  Attributes:
    losses: how the others are formed.
    num_new: modules that were added last.
  """

  losses: Any
  num_new: int

  def sums(
    self,
    logits: jax.Array,
    probs: jax.Array,
    num_chosen: jax.Array,
    is_valid: jax.Array,
  ) -> dict[str, jax.Array]:
    """See `RouterLosses`."""
    sums = self.losses.sums(logits, probs, num_chosen, is_valid)
    old = jax.nn.logsumexp(logits[:, :, : -self.num_new], axis=-1)
    taken = jax.nn.logsumexp(logits, axis=-1) - old
    return sums | {'takeover': jnp.sum(jnp.where(is_valid, taken, 0))}


def _joined(old, new):
  """Pairs of both, the old first; probabilities of all are those of `new`."""
  num_old, num_new = old.tokens.shape[1], new.tokens.shape[1]
  none = num_old + num_new
  both = lambda name, axis: jnp.concatenate(
    [getattr(old, name), getattr(new, name)], axis
  )
  pairs = jnp.concatenate(
    [
      jnp.where(old.pairs < num_old, old.pairs, none),
      jnp.where(new.pairs < num_new, new.pairs + num_old, none),
    ],
    axis=-1,
  )
  return router_base.Choices(
    tokens=both('tokens', 1),
    experts=both('experts', 1),
    weights=both('weights', 1),
    pairs=pairs,
    probs=new.probs,
  )
