"""Routing with modules that were added to a trained layer.

What was published of ModuleFormer does not say how a router is extended, so the
rule here is ours. Old modules are chosen and weighted by the old logits alone,
as before. In addition, each token chooses `k` of the new modules, and their
weights are their probabilities among all modules, old and new. New modules
start with output kernels of zero. It follows that:

- the outputs of the layer do not change when modules are added, whatever the
  new columns of the router are;
- a new module gets a gradient from the first step, because it is chosen and
  weighted;
- whatever new modules learn, no old module loses a choice to them, and its
  weight does not change.

A softmax over all modules, followed by a choice of k among all, would have none
of these three properties. The price is that each token meets k more modules.
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
  """Chooses old modules by the old router, and k new modules for each token.

  Attributes:
    router: the router of the old modules: TokensChoose, another AddedChoose, or
      a KeptChoose of `pruned_modules`.
    num_old: number of old modules, which are numbered before the new ones.
    k: number of new modules that a token chooses.

  Raises:
    ValueError: modules cannot be added to the router, or a number is not
      positive.
  """

  router: Any
  num_old: int
  k: int = 1

  def __post_init__(self):
    is_known = self.router.is_learned and self.router.each_token_chooses
    if not is_known or self.router.routes_padding:
      raise ValueError(
        'Modules can only be added to a router in which each token chooses by '
        'learned logits and padding is not routed, but the router is '
        f'{self.router}. Train the model with TokensChoose.'
      )
    if self.k < 1 or self.num_old < 1:
      raise ValueError(
        'k and num_old of AddedChoose must be at least 1, but they are '
        f'{self.k} and {self.num_old}. Set k to the number of new modules that '
        'a token chooses, and num_old to the number of old modules.'
      )

  def check(self, num_experts: int) -> None:
    """Raises ValueError if there are too few modules, old or new.

    Args:
      num_experts: number of old and new modules together.
    """
    self.router.check(self.num_old)
    if self.k > num_experts - self.num_old:
      raise ValueError(
        'k must be at most the number of new modules, '
        f'{num_experts - self.num_old}, but is {self.k}. Lower k of '
        'AddedChoose, or add more modules.'
      )

  def num_pairs(self, group_size: int, num_experts: int) -> int:
    """See `router_base.Router`."""
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
    """Returns the choices of all groups; see `router_base.Router`.

    The logits of `inputs` are <float32>[groups, tokens, columns], where the
    columns of the new modules are the last ones. If the old router is a
    KeptChoose, it has a column for each removed module too, so that there are
    more columns than modules.
    """
    logits, excluded = inputs.logits, inputs.excluded
    columns = logits.shape[-1]
    old_columns = columns - (num_experts - self.num_old)
    is_old = jnp.arange(columns) < old_columns
    old_bias = bias = None
    if inputs.selection_bias is not None:
      # The bias counts modules, not columns. Old columns cannot be chosen
      # below, so their bias does not matter there.
      old_bias, new_bias = jnp.split(inputs.selection_bias, [self.num_old])
      bias = jnp.pad(new_bias, (old_columns, 0))
    # The old router does not see the new logits: it decides as before.
    old = self.router(
      inputs._replace(
        logits=logits[:, :, :old_columns],
        selection_bias=old_bias,
        excluded=None if excluded is None else excluded[:, :, :old_columns],
      ),
      num_experts=self.num_old,
      training=training,
    )
    # The second choice sees all logits, so that its softmax is over all
    # modules, but only new modules can be chosen.
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
      # Probabilities are needed for modules, not for columns: what all old
      # columns have is shared out among the old modules that are left.
      # [groups, tokens, columns] -> [groups, tokens, num_experts]
      share = jnp.sum(probs[:, :, :old_columns], axis=-1, keepdims=True)
      probs = jnp.concatenate(
        [share * old.probs, probs[:, :, old_columns:]], axis=-1
      )
    # Columns become numbers of modules. `columns`, which stands for no choice,
    # becomes `num_experts`, as it must.
    new = new._replace(
      experts=new.experts - (old_columns - self.num_old), probs=probs
    )
    # In the answer of the old router `num_old` stands for no choice.
    old = old._replace(
      experts=jnp.where(old.experts < self.num_old, old.experts, num_experts)
    )
    return _joined(old, new)


@dataclasses.dataclass(frozen=True)
class AddedLosses(router_losses.RouterLosses):
  """Router losses, and one that keeps new modules from taking over.

  The additional loss is the Kullback-Leibler divergence of the old router, the
  softmax over the old modules, from the softmax over all modules. It equals
  -log of the probability that the old modules keep.

  Attributes:
    losses: forms the sums of all other losses.
    num_new: number of modules that were added last.
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
    """See `RouterLosses.sums`; the field `takeover` is returned as well."""
    sums = self.losses.sums(logits, probs, num_chosen, is_valid)
    # The probability of the old modules is the ratio of two sums of exp(logit).
    # [groups, tokens]
    old = jax.nn.logsumexp(logits[:, :, : -self.num_new], axis=-1)
    taken = jax.nn.logsumexp(logits, axis=-1) - old
    return sums | {'takeover': jnp.sum(jnp.where(is_valid, taken, 0))}


def _joined(old, new):
  """Joins two choices of the same tokens: the pairs of `old`, then of `new`.

  The experts of both must be numbered alike, and the probabilities of `new`
  must be those of all experts.
  """
  num_old, num_new = old.tokens.shape[1], new.tokens.shape[1]
  # The pairs of `new` are numbered after those of `old`. In each of the two,
  # its own number of pairs stands for no pair; in the result their sum does.
  none = num_old + num_new
  both = lambda name, axis: jnp.concatenate(
    [getattr(old, name), getattr(new, name)], axis
  )
  # [groups, tokens, width of old + width of new]
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
