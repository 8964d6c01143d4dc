"""The parts in which flaxformer's mixture of experts differs, for comparison.

Source: google/flaxformer at 399ea3a, architectures/moe. With these classes a
MoeLayer gives flaxformer's numbers. `TokensChoose.routes_padding` and
`ExpertsChoose.routes_padding` do the rest of what it does with padding.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mowe.layers.dispatch import capacity_dispatch
from mowe.layers.routers import router_losses


@dataclasses.dataclass(frozen=True)
class FlaxformerCapacity(capacity_dispatch.CapacityDispatch):
  """A capacity that does not grow with the number of choices of a token.

  In flaxformer experts choose as many tokens as they have slots. For this case,
  give ExpertsChoose the same factor.
  """

  def check(self, router, groups) -> None:
    """Accepts any router, as flaxformer does."""

  def capacity(self, router, group_size, num_experts) -> int:
    """Slots of one expert in one group."""
    del router
    share = group_size / num_experts
    return max(round(self.factor * share), self.min_capacity)


@dataclasses.dataclass(frozen=True)
class FlaxformerLosses(router_losses.RouterLosses):
  """Losses that are divided by the number of all tokens; the best balance is k.

  In the z-loss padding counts as a token with equal logits.
  """

  def sums(self, logits, probs, num_chosen, is_valid) -> dict[str, jax.Array]:
    """The seven loss fields of `RouterStats`."""
    num_groups, num_tokens, num_experts = probs.shape
    probs = probs * is_valid[:, :, None]
    logits = logits * is_valid[:, :, None]
    shares = num_chosen / num_tokens
    ours = super().sums(logits, probs, num_chosen, is_valid)
    return ours | {
      'load_balance': num_experts * jnp.sum(shares * jnp.sum(probs, axis=1)),
      'z_loss': jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2),
      'num_loss_tokens': jnp.asarray(num_groups * num_tokens, jnp.float32),
    }


@dataclasses.dataclass(frozen=True)
class FlaxformerGroups:
  """Makes at least as many groups as experts; tokens that fill them are routed.

  Attributes:
    size: maximum number of tokens of a group.
    num_experts: number of experts of the layer, times their copies on other
      devices.

  Raises:
    ValueError: no number of groups divides the tokens.
  """

  size: int = 4096
  num_experts: int = 1

  routes_filling = True

  def num_groups(self, batch: int, length: int) -> int:
    """The number of groups for [batch, length] tokens and those added."""
    num_tokens = math.prod(self._padded(batch, length))
    least = max(num_tokens // self.size, self.num_experts)
    for number in range(least, num_tokens + 1):
      if num_tokens % number == 0 and number % self.num_experts == 0:
        return number
    raise ValueError(
      f'The groups must be a multiple of {self.num_experts} and divide '
      f'{num_tokens} tokens, but no number from {least} on does. Give more '
      'tokens or a larger size.'
    )

  def split(self, array: jax.Array, fill: int | bool | float) -> jax.Array:
    """[batch, length, ...] to [groups, tokens, ...], rows or columns added."""
    batch, length = self._padded(*array.shape[:2])
    missing = ((0, batch - array.shape[0]), (0, length - array.shape[1]))
    rest = ((0, 0),) * (array.ndim - 2)
    padded = jnp.pad(array, missing + rest, constant_values=fill)
    num_groups = self.num_groups(batch, length)
    return padded.reshape(num_groups, -1, *array.shape[2:])

  def merge(self, groups: jax.Array, batch: int, length: int) -> jax.Array:
    """Inverse of `split`; what was added is removed."""
    padded = groups.reshape(*self._padded(batch, length), *groups.shape[2:])
    return padded[:batch, :length]

  def single(self) -> 'FlaxformerGroups':
    """Returns itself, as flaxformer also joins sequences in evaluation."""
    return self

  def _padded(self, batch, length):
    fits = lambda rows, columns: rows * columns % self.num_experts == 0
    more = range(self.num_experts)
    rows = next(i for i in more if fits(batch + i, length))
    columns = next(i for i in more if fits(batch, length + i))
    if rows * length < columns * batch:
      return batch + rows, length
    return batch, length + columns
