"""The id of a token fixes its expert: nothing to learn, nothing to balance."""

import dataclasses
import heapq

import jax.numpy as jnp
import numpy as np

from mowe.layers.routers import router_base


def balanced_table(counts: np.ndarray, num_experts: int) -> tuple[int, ...]:
  """Gives ids to experts, frequent ones first, each to the least busy expert.

  Source: Hash layers, arXiv 2106.04426, balanced assignment.

  Args:
    counts: <int>[ids], how often each id occurs in the training data.
    num_experts: experts.

  Returns:
    The expert of each id, for `HashRouter.table`.
  """
  counts = np.asarray(counts)
  table = np.zeros(counts.size, np.int64)
  loads = [(0, expert) for expert in range(num_experts)]
  for i in np.argsort(-counts, kind='stable'):
    load, table[i] = loads[0]
    # An id that never occurs counts as one, or all of them would go to one.
    heapq.heapreplace(loads, (load + max(int(counts[i]), 1), int(table[i])))
  return tuple(table.tolist())


@dataclasses.dataclass(frozen=True)
class HashRouter:
  """The token id names the expert, by a table or by a fixed hash.

  Source: Hash layers, arXiv 2106.04426. The expert's output has weight one.

  Attributes:
    num_ids: ids that have an expert: 0 .. num_ids - 1. Others have none, and
      the layer gives them zero.
    seed: of the hash; another seed is another assignment.
    table: the expert of each id instead of a hash; see `balanced_table`.

  Raises:
    ValueError: the table has not one entry for each id.
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
    """Raises ValueError if the table names an expert that is not there."""
    if self.table and not 0 <= min(self.table) <= max(self.table) < num_experts:
      raise ValueError(
        f'table must name experts in 0..{num_experts - 1}, but has numbers '
        f'from {min(self.table)} to {max(self.table)}. Make it with '
        'balanced_table for this number of experts.'
      )

  def num_pairs(self, group_size: int, num_experts: int) -> int:
    """Pairs of one group."""
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
        'Give the layer ids <int32>[batch, length], -1 for padding.'
      )
    has_expert = is_valid & (routing_ids >= 0) & (routing_ids < self.num_ids)
    experts = jnp.where(
      has_expert, self._assigned(routing_ids, num_experts), num_experts
    )
    num_groups, num_tokens = experts.shape
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
  """The same by word: the ids are those of a RoutingVocabulary."""

  reads_words = True


def _mixed(ids, seed):
  """MurmurHash3's finaliser: every bit of an id moves every bit of the hash."""
  x = ids.astype(jnp.uint32) ^ jnp.uint32((seed * 0x9E3779B9) & 0xFFFFFFFF)
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
