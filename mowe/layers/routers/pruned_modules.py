"""Layers whose removed modules still count in the softmax of the router.

The other way to prune needs no class: without their columns, the softmax of a
smaller router shares out what removed modules had.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.layers.routers import router_base, router_losses, wrapped_router


@dataclasses.dataclass(frozen=True)
class KeptChoose(wrapped_router.WrappedRouter):
  """A router of all modules, of which only the kept ones can be chosen.

  Gates are those of the whole model with removed modules masked after the
  softmax: a token that never chose a removed one has the same outputs. The
  router keeps a column for each removed module.

  Attributes:
    router: of all modules that there were: TokensChoose or AddedChoose.
    kept: columns of the modules that are left, in their order.
    num_columns: modules that there were.

  Raises:
    ValueError: `kept` is not in order, or names others than the columns.
  """

  router: Any
  kept: tuple[int, ...]
  num_columns: int

  def __post_init__(self):
    _check_kept(self.kept, self.num_columns)
    self.router.check(self.num_columns)

  def check(self, num_experts: int) -> None:
    """Raises ValueError unless there are as many modules as were kept."""
    if num_experts != len(self.kept):
      raise ValueError(
        f'There must be as many modules as were kept, {len(self.kept)}, but '
        f'there are {num_experts}. Set num_experts to the length of kept.'
      )

  def num_pairs(self, group_size: int, num_experts: int) -> int:
    """Pairs of one group."""
    del num_experts
    return self.router.num_pairs(group_size, self.num_columns)

  def __call__(
    self,
    inputs: router_base.RouterInputs,
    *,
    num_experts: int,
    training: bool = False,
  ) -> router_base.Choices:
    """Returns the choices of all groups; see `router_base.Router`.

    The logits are <float32>[groups, tokens, columns], those of removed modules
    among them.
    """
    selection_bias, excluded = inputs.selection_bias, inputs.excluded
    kept = np.asarray(self.kept)
    # The last entry is of pairs that stand for nothing.
    numbers = np.full(self.num_columns + 1, num_experts, np.int32)
    numbers[kept] = np.arange(num_experts)
    is_removed = np.ones(self.num_columns, bool)
    is_removed[kept] = False
    removed = jnp.asarray(is_removed)[None, None, :]
    if selection_bias is not None:
      zeros = jnp.zeros(self.num_columns, selection_bias.dtype)
      selection_bias = zeros.at[kept].set(selection_bias)
    choices = self.router(
      inputs._replace(
        selection_bias=selection_bias,
        excluded=removed if excluded is None else removed | excluded,
      ),
      num_experts=self.num_columns,
      training=training,
    )
    probs = choices.probs[:, :, kept]
    total = jnp.sum(probs, axis=-1, keepdims=True)
    return choices._replace(
      experts=jnp.asarray(numbers)[choices.experts],
      probs=probs / jnp.maximum(total, jnp.finfo(probs.dtype).tiny),
    )


@dataclasses.dataclass(frozen=True)
class KeptLogits:
  """Logits of kept and removed modules.

  Attributes:
    logits: how they are formed: LinearLogits or one of `module_router`.
    num_removed: modules that were removed.
  """

  logits: Any
  num_removed: int

  def build(self, num_experts: int, *arguments: Any, **named: Any) -> nn.Module:
    """The router's weights, with a column for each of all modules."""
    return self.logits.build(
      num_experts + self.num_removed, *arguments, **named
    )


@dataclasses.dataclass(frozen=True)
class KeptLosses(router_losses.RouterLosses):
  """Losses over the modules that are left.

  Attributes:
    losses: how they are formed.
    kept: see `KeptChoose`.
    num_columns: likewise; columns beyond it are of modules added later.
  """

  losses: Any
  kept: tuple[int, ...]
  num_columns: int

  def sums(
    self,
    logits: jax.Array,
    probs: jax.Array,
    num_chosen: jax.Array,
    is_valid: jax.Array,
  ) -> dict[str, jax.Array]:
    """See `RouterLosses`."""
    later = np.arange(self.num_columns, logits.shape[-1])
    columns = np.concatenate([np.asarray(self.kept), later])
    return self.losses.sums(logits[:, :, columns], probs, num_chosen, is_valid)


def _check_kept(kept, num_columns):
  is_within = bool(kept) and 0 <= kept[0] and kept[-1] < num_columns
  in_order = all(a < b for a, b in zip(kept, kept[1:], strict=False))
  if not (is_within and in_order):
    raise ValueError(
      f'kept must be columns from 0 to {num_columns - 1} in their order, at '
      f'least one, but is {kept}. Name each module that is left once.'
    )
