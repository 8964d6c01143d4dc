"""Self-attention of a decoder, with several ways to encode positions.

All of them depend only on the distance between a query and a key. So positions
may be counted from any place: rows may be packed, padded on the left, or
continue other rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers.attention import multi_head, relative_position


class Positions(NamedTuple):
  """The positions of queries and of keys, counted from one common place.

  Attributes:
    queries: <int32>[query], a numpy array where it is known before the program
      runs, otherwise a JAX array.
    keys: <int32>[key], a numpy or JAX array in the same way.
  """

  queries: Any
  keys: Any


class SelfAttention(multi_head.MultiHeadAttention):
  """Self-attention without positions; its subclasses add them.

  The attributes are those of MultiHeadAttention.

  Call: queries <float>[batch, query, embed], memory <float>[batch, key, embed]
    (the same tokens, perhaps with earlier ones before them), positions, and
    mask <bool>[batch, 1, query, key], to <dtype>[batch, query, embed]. With
    `decode=True` the memory must be the queries. Their keys and values are
    appended to the `cache`, and the keys of `positions` and of `mask` are those
    of the whole cache.
  """

  def __call__(
    self,
    queries: jax.Array,
    memory: jax.Array,
    *,
    positions: Positions,
    mask: jax.Array,
    decode: bool = False,
    deterministic: bool = True,
  ) -> jax.Array:
    keys, values = self.project_memory(memory)
    # The positions of the keys that were projected here. In decoding these are
    # the new keys only, as the cache holds the others.
    new = positions.queries if decode else positions.keys
    projected, keys, bias = self._place(
      self._split_heads(self.query(queries)),
      keys,
      new,
      positions,
      queries.shape[-1],
    )
    if decode:
      keys, values = self._append(keys, values)
    attended = self._attend(
      projected,
      keys,
      values,
      positions=positions,
      bias=bias,
      mask=mask,
      deterministic=deterministic,
    )
    # [batch, query, heads, kv] -> [batch, query, joined_kv]
    attended = attended.reshape(*attended.shape[:2], -1)
    return self._out(attended, queries.shape[-1])

  def _attend(
    self, queries, keys, values, *, positions, bias, mask, deterministic
  ):
    """Weighted sums of values for each query, [batch, query, heads, kv]."""
    del positions
    return multi_head.dot_product_attention(
      queries,
      keys,
      values,
      bias=bias,
      mask=mask,
      dropout=lambda weights: self.weights_dropout(
        weights, deterministic=deterministic
      ),
    )

  def _place(self, queries, keys, key_positions, positions, embed_dim):
    """Encodes positions in queries, keys or a bias.

    Returns queries and keys [batch, length, heads, kv], and the bias [1 or
    batch, heads, query, key] or None.
    """
    del key_positions, positions, embed_dim
    return queries, keys, None

  def _append(self, keys, values):
    """Appends to the cache, and returns all its keys and values."""
    if not self.has_variable('cache', 'cached_key'):
      # The first pass only makes the cache, with the length of that pass.
      self.put_variable('cache', 'cached_key', jnp.zeros_like(keys))
      self.put_variable('cache', 'cached_value', jnp.zeros_like(values))
      self.put_variable('cache', 'cache_index', jnp.zeros((), jnp.int32))
      return keys, values
    index = self.get_variable('cache', 'cache_index')

    def append(name, new):
      cached = jax.lax.dynamic_update_slice(
        self.get_variable('cache', name), new, (0, index, 0, 0)
      )
      self.put_variable('cache', name, cached)
      return cached

    self.put_variable('cache', 'cache_index', index + keys.shape[1])
    return append('cached_key', keys), append('cached_value', values)


class T5Attention(SelfAttention):
  """Self-attention with T5's relative position bias, shared by all blocks.

  Attributes:
    relpos_bias: the shared RelativePositionBias, which the stack passes in.

  The other attributes and the call are those of SelfAttention.
  """

  relpos_bias: nn.Module | None = None

  def make_shared(self) -> dict[str, nn.Module]:
    return {
      'relpos_bias': relative_position.RelativePositionBias(
        self.num_heads, bidirectional=False, dtype=self.dtype, parent=None
      )
    }

  def with_shared(self, shared: dict[str, nn.Module]) -> 'T5Attention':
    return self.clone(parent=None, relpos_bias=shared['relpos_bias'])

  def _place(self, queries, keys, key_positions, positions, embed_dim):
    del key_positions, embed_dim
    return queries, keys, self.relpos_bias(*positions)


class RotaryAttention(SelfAttention):
  """Self-attention with rotary position embeddings.

  Source: RoFormer, arXiv 2104.09864. Each number of the first half of a head is
  paired with one of the second half, as in GPT-NeoX and LLaMA.

  Attributes:
    max_wavelength: wavelength of the slowest rotation, in tokens, divided by
      2 pi.

  The other attributes and the call are those of SelfAttention.
  """

  max_wavelength: float = 10_000.0

  def _place(self, queries, keys, key_positions, positions, embed_dim):
    del embed_dim
    turn = lambda vectors, places: rotate(vectors, places, self.max_wavelength)
    return turn(queries, positions.queries), turn(keys, key_positions), None


def rotate(
  vectors: jax.Array, positions: jax.Array, max_wavelength: float = 10_000.0
) -> jax.Array:
  """Rotates each pair of numbers by an angle proportional to the position.

  Pair i of a head of size d is (x[i], x[i + d/2]). It is rotated by position *
  max_wavelength^(-2i/d).

  Args:
    vectors: <float>[batch, length, heads, kv].
    positions: <int32>[length].
    max_wavelength: see `RotaryAttention`.

  Returns:
    <float>[batch, length, heads, kv], in the dtype of `vectors`.

  Raises:
    ValueError: the size of a head is odd.
  """
  size = vectors.shape[-1]
  if size % 2:
    raise ValueError(
      'Rotary positions need a head_dim that is even, as they turn pairs of '
      f'numbers, but it is {size}. Make it {size + 1}.'
    )
  frequencies = max_wavelength ** (-jnp.arange(0, size, 2) / size)
  # In float32, because bfloat16 cannot tell positions beyond 256 apart.
  angles = positions[:, None].astype(jnp.float32) * frequencies[None, :]
  # [length, kv / 2] -> [1, length, 1, kv / 2]
  sin, cos = jnp.sin(angles)[None, :, None], jnp.cos(angles)[None, :, None]
  first, second = jnp.split(vectors.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(vectors.dtype)
