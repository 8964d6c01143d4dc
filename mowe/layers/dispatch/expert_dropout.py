"""Dropout of experts' hidden units that depends on the pair alone."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertDropout:
  """Dropout masks for the hidden units of experts.

  The mask of a pair of a token and an expert depends on the random key and on
  the number of the pair, but not on its slot or device. So results do not
  depend on the dispatch or on the number of devices. Each block of consecutive
  pairs shares one mask, as the tokens of a sequence do in the dense
  feed-forward.

  Attributes:
    masks: <float32>[blocks, units]; 0 where a unit is dropped, and 1 / (1 -
      rate) where it is kept.
    block: number of consecutive pairs that share a mask.

  Call: pairs <int32>[...], counted over all groups, to the masks
    <float32>[..., units] that hidden units are multiplied with.
  """

  masks: jax.Array
  block: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def draw(
    cls, key: jax.Array, rate: float, num_pairs: int, block: int, num_units: int
  ) -> 'ExpertDropout':
    """Draws the masks.

    Args:
      key: random key.
      rate: probability with which a unit is dropped.
      num_pairs: number of pairs of all groups.
      block: number of consecutive pairs that share a mask.
      num_units: number of hidden units of one expert.
    """
    shape = (-(-num_pairs // block), num_units)
    kept = jax.random.bernoulli(key, 1 - rate, shape)
    return cls(kept / (1 - rate), block)

  def __call__(self, pairs: jax.Array) -> jax.Array:
    return jnp.take(self.masks, pairs // self.block, axis=0, mode='clip')
