"""Feed-forward in which each token has its own expert, without a plan.

Tokens are cut into tiles. All tokens of a tile have the same expert, so that a
tile is one matrix product with one kernel. A few tiles at a time, a *chunk*,
are computed: their kernels are read, and their products are one batched
product. So temporary memory holds the kernels of one chunk, and not a kernel
for each token.

Where there are only a few tokens, as in decoding, each token is a tile. More
tokens are first sorted by expert, so that a tile holds several and a kernel is
read less often. The arrays have room for as many tiles as there could ever be.
The loop visits only the chunks that are in use, so that the time depends on the
tiles of this batch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers import feed_forward
from mowe.layers.memory import bfloat16_bits, grouped, rows_in_place

Arrays = dict[str, jax.Array]

# For up to this many tokens, sorting takes longer than it saves.
_FEW_TOKENS = 256

# Slots of a tile. Fewer than 8 would not fill the vector registers, and
# products of more than 256 rows are no faster.
_SMALLEST_TILE, _LARGEST_TILE = 8, 256

# A number that is out of range both as an expert and as a slot.
_OUT_OF_RANGE = np.iinfo(np.int32).max


class TableRows(NamedTuple):
  """Reads the kernels of experts from tables on the device.

  A class that reads them from elsewhere must be a pytree with the same members.
  If it is never differentiated, it needs neither `add` nor `is_bits`.

  Attributes:
    kernels: the table <float>[num_experts, in, out] of each kernel, by name; or
      its bits <uint16>, see `bfloat16_bits`.
  """

  kernels: Arrays

  @property
  def at_once(self) -> int:
    """Largest number of experts to read in one call."""
    return grouped.experts_at_once(
      sum(kernel[0].size for kernel in self.kernels.values())
    )

  @property
  def is_bits(self) -> bool:
    """Whether the tables hold bits of bfloat16, which have no gradient."""
    kernels = self.kernels.values()
    return any(kernel.dtype == bfloat16_bits.DTYPE for kernel in kernels)

  def __call__(self, experts: jax.Array) -> Arrays:
    """Returns the kernels of some experts.

    Args:
      experts: <int32>[n]. An expert may occur several times; after sorting,
        equal experts stand next to each other. Experts out of range have zeros.

    Returns:
      The kernels <float>[n, in, out], by name.
    """
    some = {}
    for name, kernel in self.kernels.items():
      is_known = (experts >= 0) & (experts < kernel.shape[0])
      read = rows_in_place.read(kernel, jnp.where(is_known, experts, 0))
      read = jnp.where(is_known[:, None, None], read, 0)
      some[name] = bfloat16_bits.to_float(read)
    return some

  def add(self, experts: jax.Array, rows: Arrays) -> 'TableRows':
    """Returns tables to whose rows something was added.

    The backward pass collects the gradients of the kernels in this way.

    Args:
      experts: <int32>[n]; experts out of range are ignored.
      rows: what is added, <float>[n, in, out] by the name of the kernel.
    """
    return TableRows(
      {
        name: kernel.at[experts].add(rows[name], mode='drop')
        for name, kernel in self.kernels.items()
      }
    )


class _Tiles(NamedTuple):
  """Tokens that were cut into tiles, each of one expert.

  A *row* is a token in sorted order: by expert, so by tile. A *slot* is a place
  in a tile, counted over all tiles. Rows have no gaps; slots have, as the last
  tile of an expert is rarely full. The number of tiles is an upper bound, and
  the tiles in use come first.

  Attributes:
    experts: <int32>[tiles], the expert of each tile; out of range for a tile
      that is not in use.
    sources: <int32>[tiles, room], the token in each slot; the number of tokens
      for an empty slot.
    first_rows: <int32>[tiles], the row in the first slot of each tile.
    slots: <int32>[tokens], the slot of each row; out of range for a row without
      an expert.
    rows: <int32>[tokens], the row of each token.
    number: <int32>[], number of tiles in use.
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

  Its gradient is defined here, because JAX has no reverse-mode gradient of a
  loop whose number of steps is not static. The backward pass computes the
  hidden units of a chunk again, so that none are kept.

  Args:
    tokens: <float>[tokens, embed].
    experts: <int32>[tokens], the expert of each token; a number out of range
      for a token without an expert.
    read: reads the kernels of experts.
    keep: <float>[tokens, expert_mlp], the dropout mask that hidden units are
      multiplied with; None for no dropout.
    num_experts: number of experts.
    activations: one name, or two for a gated layer, as in `DenseFeedForward`.

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
  """Feed-forward of tiles [tiles, room, embed], with one expert for each."""
  product = lambda x, name: jnp.einsum(
    'tcm,tmf->tcf', x, kernels[name].astype(x.dtype)
  )
  names = feed_forward.kernel_names(activations)
  hidden = feed_forward.activate(
    [product(tokens, name) for name in names], activations
  )
  return product(hidden if mask is None else hidden * mask, 'wo')


def _cut(experts, num_experts):
  """Cuts the tokens with these experts into tiles."""
  num_tokens = experts.shape[0]
  routed = (experts >= 0) & (experts < num_experts)
  experts = jnp.where(routed, experts, num_experts)
  if num_tokens <= _FEW_TOKENS:
    return _tile_per_token(experts)
  # An even share of the tokens, rounded up to a multiple of 8. Larger tiles
  # would mostly be empty, smaller ones would read each kernel more often.
  room = -(-num_tokens // num_experts // 8) * 8
  room = min(max(room, _SMALLEST_TILE), _LARGEST_TILE)
  return _sorted_tiles(experts, num_experts, room)


def _tile_per_token(experts):
  """Tiles with one slot each, in the order of tokens."""
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
  """Tiles with `room` slots each, in the order of experts.

  The arrays below have one number for each row, <int32>[tokens].
  """
  num_tokens = experts.shape[0]
  # An expert has at most one tile that is not full.
  most = min(num_tokens, num_experts) + num_tokens // room
  order = jnp.argsort(experts, stable=True).astype(jnp.int32)
  every = jnp.arange(num_tokens, dtype=jnp.int32)
  owners = experts[order]
  # The number of a row within its expert is its distance from the expert's
  # first row. A tile starts at every `room`-th row of an expert.
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
  """Cuts tiles into chunks, and writes the rows of a chunk.

  The rows of a chunk follow each other without gaps. So a chunk writes one
  contiguous part of the result in place, and no scatter is needed.

  Args:
    tiles: the tiles of all tokens.
    at_once: largest number of tiles in a chunk.
  """

  def __init__(self, tiles: _Tiles, at_once: int):
    most, room = tiles.sources.shape
    self._size = min(at_once, most)
    self._slots_at_once = self._size * room
    # All arrays are padded so that the slice of the last chunk ends within
    # them. XLA would move a slice that reaches beyond an array.
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
    """Returns the experts <int32>[n] and sources <int32>[n, room] of a chunk.

    Args:
      number: <int32>[], which chunk.
    """
    return tuple(
      jax.lax.dynamic_slice_in_dim(array, number * self._size, self._size)
      for array in (self._experts, self._sources)
    )

  def empty_rows(self, tokens: jax.Array) -> jax.Array:
    """Returns zeros [tokens + slots of a chunk, embed], to write rows into.

    `write` writes as many rows as a chunk has slots, so that the last chunk may
    write beyond the last token.

    Args:
      tokens: <float>[tokens, embed], for its shape and dtype.
    """
    num_rows = tokens.shape[0] + self._slots_at_once
    return jnp.zeros((num_rows, tokens.shape[1]), tokens.dtype)

  def write(
    self, number: jax.Array, rows: jax.Array, computed: jax.Array
  ) -> jax.Array:
    """Returns `rows` with the results of one chunk.

    Args:
      number: <int32>[], which chunk.
      rows: <float>[tokens + slots of a chunk, embed], as `empty_rows` made it.
      computed: <float>[n, room, embed], the results in the slots of the chunk.
    """
    # How many rows the chunk has is not static. At most it has one for each of
    # its slots, so that many are written.
    start = self._first_rows[number * self._size]
    slots = jax.lax.dynamic_slice_in_dim(
      self._slots, start, self._slots_at_once
    )
    # Rows beyond the chunk have slots out of its range and get zeros here. The
    # next chunk overwrites them with their results.
    part = grouped.rows(
      computed.reshape(-1, computed.shape[-1]),
      slots - number * self._slots_at_once,
    )
    return jax.lax.dynamic_update_slice_in_dim(rows, part, start, 0)
