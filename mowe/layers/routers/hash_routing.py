"""Routers without parameters: the id of a token determines its expert."""

import dataclasses
import heapq

import jax.numpy as jnp
import numpy as np

from mowe.layers.routers import router_base


def balanced_table(counts: np.ndarray, num_experts: int) -> tuple[int, ...]:
  """Assigns ids to experts so that the experts are about equally busy.

  In the order of falling counts, each id goes to the expert that has the
  smallest load so far.

  Source: Hash layers, arXiv 2106.04426, balanced assignment.

  Args:
    counts: <int>[ids], how often each id occurs in the training data.
    num_experts: number of experts.

  Returns:
    The expert of each id, to be used as `HashRouter.table`.
  """
  counts = np.asarray(counts)
  table = np.zeros(counts.size, np.int64)
  # A heap of (load, expert), whose first entry is the least busy expert.
  loads = [(0, expert) for expert in range(num_experts)]
  for i in np.argsort(-counts, kind='stable'):
    load, table[i] = loads[0]
    # Ids that never occur count as one each. With a load of zero, all of them
    # would go to the same expert.
    heapq.heapreplace(loads, (load + max(int(counts[i]), 1), int(table[i])))
  return tuple(table.tolist())


@dataclasses.dataclass(frozen=True)
class HashRouter:
  """Chooses one expert for each token by its id, by a table or a fixed hash.

  The output of the expert has weight one.

  Source: Hash layers, arXiv 2106.04426.

  Attributes:
    num_ids: number of ids that have an expert, which are 0 .. num_ids - 1.
      Tokens with other ids have no expert and get zero from the layer.
    seed: seed of the hash; another seed gives another assignment.
    table: the expert of each id, which replaces the hash; see `balanced_table`.

  Raises:
    ValueError: the table does not have one entry for each id.
  """

  num_ids: int
  seed: int = 0
  table: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

  is_learned = False
  is_balanced = True
  each_token_chooses = True
  looks_ahead = False
  routes_padding = False
  reads_words = False

  def __post_init__(self):
    if self.table is not None and len(self.table) != self.num_ids:
      raise ValueError(
        f'table must have one entry for each of the {self.num_ids} ids, but '
        f'has {len(self.table)}. Make it with balanced_table from the counts '
        'of the same vocabulary.'
      )

  def check(self, num_experts: int) -> None:
    """Raises ValueError if the table names an expert that does not exist."""
    if self.table and not 0 <= min(self.table) <= max(self.table) < num_experts:
      raise ValueError(
        f'table must name experts from 0 to {num_experts - 1}, but has numbers '
        f'from {min(self.table)} to {max(self.table)}. Make it with '
        'balanced_table for this number of experts.'
      )

  def num_pairs(self, group_size: int, num_experts: int) -> int:
    """See `router_base.Router`."""
    del num_experts
    return group_size

  def __call__(
    self,
    inputs: router_base.RouterInputs,
    *,
    num_experts: int,
    training: bool = False,
  ) -> router_base.Choices:
    """Returns the choices of all groups; see `router_base.Router`."""
    del training
    routing_ids, is_valid = inputs.routing_ids, inputs.is_valid
    if routing_ids is None:
      raise ValueError(
        'HashRouter needs the ids of its tokens as routing_ids, but got None. '
        'Give the layer ids <int32>[batch, length], with -1 for padding.'
      )
    has_expert = is_valid & (routing_ids >= 0) & (routing_ids < self.num_ids)
    experts = jnp.where(
      has_expert, self._assigned(routing_ids, num_experts), num_experts
    )
    num_groups, num_tokens = experts.shape
    # Each token has one pair, in the order of the tokens: the number of the
    # pair is the position of the token.
    positions = jnp.broadcast_to(
      jnp.arange(num_tokens, dtype=jnp.int32), (num_groups, num_tokens)
    )
    return router_base.Choices(
      tokens=positions,
      experts=experts,
      weights=has_expert.astype(jnp.float32),
      pairs=positions[:, :, None],
      probs=None,
    )

  def _assigned(self, ids, num_experts):
    if self.table is not None:
      table = jnp.asarray(self.table, jnp.int32)
      return jnp.take(table, ids, mode='clip')
    return (_mixed(ids, self.seed) % num_experts).astype(jnp.int32)


class WordHashRouter(HashRouter):
  """HashRouter whose ids come from a RoutingVocabulary: it routes by word."""

  reads_words = True


def _mixed(ids, seed):
  """Hashes ids <int32>[...] to <uint32>[...] by the finaliser of MurmurHash3.

  Every bit of an id may change every bit of the hash, so that the hash modulo
  the number of experts spreads neighbouring ids evenly.
  """
  # The constant is 2^32 over the golden ratio. The product makes neighbouring
  # seeds differ in many bits.
  x = ids.astype(jnp.uint32) ^ jnp.uint32((seed * 0x9E3779B9) & 0xFFFFFFFF)
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
