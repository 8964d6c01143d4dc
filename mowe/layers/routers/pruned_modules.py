"""Parts of pruned layers whose gates stay what they were.

The router keeps the columns of the removed modules, so that these still count
in its softmax. The other way to prune needs no class: there the columns are
removed too, and the softmax of the smaller router shares out the probability of
the removed modules.
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
  """The router before pruning, of which only kept modules can be chosen.

  Removed modules are masked when modules are chosen, after the softmax. So the
  gates are those of the model before pruning, and a token that chose no removed
  module has the same outputs as before.

  Attributes:
    router: the router before pruning, TokensChoose or AddedChoose.
    kept: columns of the modules that are left, in increasing order.
    num_columns: number of columns, one for each module before pruning.

  Raises:
    ValueError: `kept` is not in increasing order, or names columns that do not
      exist.
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
    """See `router_base.Router`."""
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

    The logits of `inputs` are <float32>[groups, tokens, columns], with those of
    removed modules among them. The choices name kept modules by their numbers
    in the pruned layer, and the probabilities are those of kept modules.
    """
    selection_bias, excluded = inputs.selection_bias, inputs.excluded
    kept = np.asarray(self.kept)
    # The number of each column's module in the pruned layer. `num_experts`
    # stands for none: for removed modules, and in the last entry for pairs that
    # stand for nothing.
    numbers = np.full(self.num_columns + 1, num_experts, np.int32)
    numbers[kept] = np.arange(num_experts)
    is_removed = np.ones(self.num_columns, bool)
    is_removed[kept] = False
    removed = jnp.asarray(is_removed)[None, None, :]
    if selection_bias is not None:
      # The bias counts kept modules, and the inner router counts columns.
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
    # The weights stay those of the inner router, while the probabilities, which
    # losses and metrics read, must add up to one over the kept modules.
    probs = choices.probs[:, :, kept]
    total = jnp.sum(probs, axis=-1, keepdims=True)
    return choices._replace(
      experts=jnp.asarray(numbers)[choices.experts],
      probs=probs / jnp.maximum(total, jnp.finfo(probs.dtype).tiny),
    )


@dataclasses.dataclass(frozen=True)
class KeptLogits:
  """Logits of all columns, those of removed modules included.

  Attributes:
    logits: forms the logits: LinearLogits or one of `module_router`.
    num_removed: number of modules that were removed.
  """

  logits: Any
  num_removed: int

  def build(self, num_experts: int, *arguments: Any, **named: Any) -> nn.Module:
    """See `router_base.Logits`; there are more logits than `num_experts`."""
    return self.logits.build(
      num_experts + self.num_removed, *arguments, **named
    )


@dataclasses.dataclass(frozen=True)
class KeptLosses(router_losses.RouterLosses):
  """Router losses over the modules that are left.

  Attributes:
    losses: forms the sums of the losses.
    kept: columns of the modules that are left, in increasing order.
    num_columns: number of columns when the layer was pruned. Columns from this
      one on belong to modules that were added later, which count as well.
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
      f'kept must be columns from 0 to {num_columns - 1} in increasing order, '
      f'at least one, but is {kept}. Name each module that is left once.'
    )
