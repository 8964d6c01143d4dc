"""Dropout of experts' hidden units, the same wherever a pair is computed."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertDropout:
  """Masks that depend on the key and the pair of a token and an expert alone.

  Neither the slot of a pair nor its device matters, so that results do not
  depend on the dispatch or the number of devices.

  Attributes:
    key: of this call of the layer.
    rate: share of the hidden units that are zeroed.
    num_units: hidden units of one expert.

  Call: pairs <int32>[slots], counted over all groups, to <float32>[slots,
    num_units] that hidden units are to be multiplied with.
  """

  key: jax.Array
  rate: float = dataclasses.field(metadata={'static': True})
  num_units: int = dataclasses.field(metadata={'static': True})

  def __call__(self, pairs: jax.Array) -> jax.Array:
    kept = jax.vmap(
      lambda pair: jax.random.bernoulli(
        jax.random.fold_in(self.key, pair), 1 - self.rate, (self.num_units,)
      )
    )(pairs)
    return kept / (1 - self.rate)
