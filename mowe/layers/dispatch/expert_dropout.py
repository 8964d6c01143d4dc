"""Dropout of experts' hidden units, the same wherever a pair is computed."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertDropout:
  """Masks that depend on the key and the pair of a token and an expert alone.

  Neither the slot of a pair nor its device matters, so that results do not
  depend on the dispatch or the number of devices. Pairs that follow each other,
  usually those of one sequence, share a mask, as tokens of a sequence do in the
  dense feed-forward.

  Attributes:
    masks: <float32>[blocks, units], zeros where units are dropped.
    block: pairs that share a mask.

  Call: pairs <int32>[...], counted over all groups, to <float32>[..., units]
    that hidden units are to be multiplied with.
  """

  masks: jax.Array
  block: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def draw(
    cls, key: jax.Array, rate: float, num_pairs: int, block: int, num_units: int
  ) -> 'ExpertDropout':
    """Draws the masks of `num_pairs` pairs; `rate` of the units are dropped."""
    shape = (-(-num_pairs // block), num_units)
    kept = jax.random.bernoulli(key, 1 - rate, shape)
    return cls(kept / (1 - rate), block)

  def __call__(self, pairs: jax.Array) -> jax.Array:
    return jnp.take(self.masks, pairs // self.block, axis=0, mode='clip')
