"""Feed-forward of tokens with their own experts, without a plan.

Tokens are cut into tiles of one expert each, and a few tiles are computed at a
time: their kernels are read, and a tile is one matrix product of a batch. A few
tokens, as in decoding, are a tile each. More of them are sorted by expert, so
that a tile holds several. Temporary memory does not grow with tokens times
kernels, and time follows from the tiles that are there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers import feed_forward
from mowe.layers.memory import bfloat16_bits, grouped

Arrays = dict[str, jax.Array]

# Up to this many tokens, sorting costs more than it saves.
_FEW_TOKENS = 256

# Rows of a tile: whole vectors, and no faster beyond.
_SMALLEST_TILE, _LARGEST_TILE = 8, 256

# Of experts, and of slots.
_OUT_OF_RANGE = np.iinfo(np.int32).max


class TableRows(NamedTuple):
  """Reads the kernels of experts from tables on the device.

  What reads them from elsewhere is a pytree with the same members; without
  gradients it needs neither `add` nor `is_bits`.

  Attributes:
    kernels: kernel name -> <float>[num_experts, in, out].
  """

  kernels: Arrays

  @property
  def at_once(self) -> int:
    """How many experts to read in one call, at most."""
    return grouped.experts_at_once(
      sum(kernel[0].size for kernel in self.kernels.values())
    )

  @property
  def is_bits(self) -> bool:
    """Whether the tables are bits of bfloat16, which have no gradient."""
    kernels = self.kernels.values()
    return any(kernel.dtype == bfloat16_bits.DTYPE for kernel in kernels)

  def __call__(self, experts: jax.Array) -> Arrays:
    """Kernel name -> <float>[n, in, out] of experts <int32>[n].

    Equal experts are neighbours where tokens were sorted. Experts out of range
    have zeros.
    """
    # Negative numbers would count from the end.
    experts = jnp.where(experts < 0, _OUT_OF_RANGE, experts)
    return {
      name: bfloat16_bits.to_float(grouped.rows(kernel, experts))
      for name, kernel in self.kernels.items()
    }

  def add(self, experts: jax.Array, rows: Arrays) -> 'TableRows':
    """Adds to the rows of some experts: how gradients are collected."""
    return TableRows(
      {
        name: kernel.at[experts].add(rows[name], mode='drop')
        for name, kernel in self.kernels.items()
      }
    )


class _Tiles(NamedTuple):
  """Tokens in tiles of one expert each.

  Rows are the tokens in the order of tiles, slots are the places in tiles.

  Attributes:
    experts: <int32>[tiles], of each tile.
    sources: <int32>[tiles, room], the token in each slot; the number of tokens
      if it is empty.
    first_rows: <int32>[tiles], the row in the first slot of each tile.
    slots: <int32>[tokens], the slot of each row.
    rows: <int32>[tokens], the row of each token.
    number: <int32>[], tiles in use; they are the first.
  """

  experts: jax.Array
  sources: jax.Array
  first_rows: jax.Array
  slots: jax.Array
  rows: jax.Array
  number: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def feed_forward_by_tiles(
  tokens: jax.Array,
  experts: jax.Array,
  read: TableRows,
  keep: jax.Array | None,
  num_experts: int,
  activations: tuple[str, ...],
) -> jax.Array:
  """Two-layer feed-forward in which every token meets its own expert.

  Args:
    tokens: <float>[tokens, embed].
    experts: <int32>[tokens]; out of range: none.
    read: reads the kernels of experts.
    keep: <float>[tokens, expert_mlp] that hidden units are multiplied with, the
      mask of dropout; None is all ones.
    num_experts: experts that there are.
    activations: as in the dense feed-forward.

  Returns:
    <float>[tokens, embed], zeros for tokens without an expert.
  """
  return _forward(tokens, experts, read, keep, num_experts, activations)[0]


def _forward(tokens, experts, read, keep, num_experts, activations):
  tiles = _cut(experts, num_experts)

  chunks = _Chunks(tiles, read.at_once)

  def some_tiles(number, outputs):
    experts, sources = chunks.cut(number)
    mask = None if keep is None else grouped.rows(keep, sources)
    computed = _expert(
      grouped.rows(tokens, sources), read(experts), mask, activations
    )
    return chunks.write(number, outputs, computed)

  outputs = jax.lax.fori_loop(
    0, chunks.number, some_tiles, chunks.empty_rows(tokens)
  )
  return grouped.rows(outputs, tiles.rows), (tokens, read, keep, tiles)


def _backward(num_experts, activations, residuals, cotangents):
  del num_experts
  tokens, read, keep, tiles = residuals
  chunks = _Chunks(tiles, read.at_once)

  def some_tiles(number, carry):
    d_tokens, d_read = carry
    experts, sources = chunks.cut(number)
    mask = None if keep is None else grouped.rows(keep, sources)
    _, pull = jax.vjp(
      lambda rows, kernels: _expert(rows, kernels, mask, activations),
      grouped.rows(tokens, sources),
      read(experts),
    )
    d_rows, d_kernels = pull(grouped.rows(cotangents, sources))
    if not read.is_bits:
      d_read = d_read.add(experts, d_kernels)
    return chunks.write(number, d_tokens, d_rows), d_read

  d_tokens, d_read = jax.lax.fori_loop(
    0,
    chunks.number,
    some_tiles,
    (chunks.empty_rows(tokens), jax.tree.map(jnp.zeros_like, read)),
  )
  if read.is_bits:
    d_read = None
  return grouped.rows(d_tokens, tiles.rows), None, d_read, None


feed_forward_by_tiles.defvjp(_forward, _backward)


def _expert(tokens, kernels, mask, activations):
  """Feed-forward of tiles: tokens [tiles, room, embed], a kernel for each."""
  product = lambda x, name: jnp.einsum(
    'tcm,tmf->tcf', x, kernels[name].astype(x.dtype)
  )
  names = feed_forward.kernel_names(activations)
  hidden = feed_forward.activate(
    [product(tokens, name) for name in names], activations
  )
  return product(hidden if mask is None else hidden * mask, 'wo')


def _cut(experts, num_experts):
  """Tiles of tokens with these experts."""
  num_tokens = experts.shape[0]
  routed = (experts >= 0) & (experts < num_experts)
  experts = jnp.where(routed, experts, num_experts)
  if num_tokens <= _FEW_TOKENS:
    return _tile_per_token(experts)
  room = -(-num_tokens // num_experts // 8) * 8
  room = min(max(room, _SMALLEST_TILE), _LARGEST_TILE)
  return _sorted_tiles(experts, num_experts, room)


def _tile_per_token(experts):
  num_tokens = experts.shape[0]
  every = jnp.arange(num_tokens, dtype=jnp.int32)
  return _Tiles(
    experts=experts,
    sources=every[:, None],
    first_rows=every,
    slots=every,
    rows=every,
    number=jnp.int32(num_tokens),
  )


def _sorted_tiles(experts, num_experts, room):
  """Tiles with room for so many tokens, in the order of experts."""
  num_tokens = experts.shape[0]
  most = min(num_tokens, num_experts) + num_tokens // room
  order = jnp.argsort(experts, stable=True).astype(jnp.int32)
  every = jnp.arange(num_tokens, dtype=jnp.int32)
  owners = experts[order]
  is_first = jnp.append(True, owners[1:] != owners[:-1])
  within = every - jax.lax.cummax(jnp.where(is_first, every, 0))
  starts = (within % room == 0) & (owners < num_experts)
  tile = jnp.cumsum(starts, dtype=jnp.int32) - 1
  slots = jnp.where(
    owners < num_experts, tile * room + within % room, most * room
  )
  (first_rows,) = jnp.nonzero(starts, size=most, fill_value=num_tokens)
  return _Tiles(
    experts=jnp.take(owners, first_rows, mode='fill', fill_value=num_experts),
    sources=jnp.full(most * room, num_tokens, jnp.int32)
    .at[slots]
    .set(order, mode='drop')
    .reshape(most, room),
    first_rows=first_rows.astype(jnp.int32),
    slots=slots,
    rows=jnp.zeros_like(order).at[order].set(every),
    number=tile[-1] + 1,
  )


class _Chunks:
  """A few tiles at a time.

  Args:
    tiles: all of them.
    at_once: tiles in a chunk.
  """

  def __init__(self, tiles: _Tiles, at_once: int):
    most, room = tiles.sources.shape
    self._size = min(at_once, most)
    self._slots_at_once = self._size * room
    missing = -most % self._size
    num_tokens = tiles.rows.shape[0]
    pad = lambda array, fill: jnp.pad(
      array,
      [(0, missing)] + [(0, 0)] * (array.ndim - 1),
      constant_values=fill,
    )
    self._experts = pad(tiles.experts, _OUT_OF_RANGE)
    self._sources = pad(tiles.sources, num_tokens)
    self._first_rows = tiles.first_rows
    self._slots = jnp.pad(
      tiles.slots,
      (0, self._slots_at_once),
      constant_values=_OUT_OF_RANGE,
    )
    self.number = -(-tiles.number // self._size)

  def cut(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Experts <int32>[n] and sources <int32>[n, room] of a chunk."""
    return tuple(
      jax.lax.dynamic_slice_in_dim(array, number * self._size, self._size)
      for array in (self._experts, self._sources)
    )

  def empty_rows(self, tokens: jax.Array) -> jax.Array:
    """Zeros for the rows of all tokens, and for writing beyond them."""
    num_rows = tokens.shape[0] + self._slots_at_once
    return jnp.zeros((num_rows, tokens.shape[1]), tokens.dtype)

  def write(
    self, number: jax.Array, rows: jax.Array, computed: jax.Array
  ) -> jax.Array:
    """Writes what was computed in the slots of a chunk to its rows."""
    start = self._first_rows[number * self._size]
    slots = jax.lax.dynamic_slice_in_dim(
      self._slots, start, self._slots_at_once
    )
    # Rows beyond the chunk get zeros, and then their own from the next chunk.
    part = grouped.rows(
      computed.reshape(-1, computed.shape[-1]),
      slots - number * self._slots_at_once,
    )
    return jax.lax.dynamic_update_slice_in_dim(rows, part, start, 0)
