"""Rows sorted by expert, each computed by its own: one batch, then the rest.

The first rows of every expert, up to an even share, are computed as one batch,
which reads each kernel where it lies. What experts have beyond that share
follows in tiles, one after another, as many as there are: a router that
balances leaves few. However uneven the shares are, no more than twice the rows
are computed, but for what fills up tiles, and no array is larger than the rows
or the kernels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mowe.layers import expert_dropout

# More rows in a tile are no faster.
_LARGEST_TILE = 256

Arrays = dict[str, jax.Array]

# What one expert does: rows <float>[..., rows, in], its kernels, and what to
# multiply its hidden units with or None, to <float>[..., rows, out]. A function
# or a frozen class; `experts` has some.
Expert = Callable[[jax.Array, Arrays, jax.Array | None], jax.Array]


def even_share(num_rows: int, num_experts: int) -> int:
  """Rows of each expert in the batched product; none if they are few."""
  return num_rows // num_experts


def tile_size(share: int) -> int:
  """Rows of a tile beyond a share: few, as an expert's last tile is not full."""
  # Multiples of 8: whole vectors.
  return min(max(-(-share // 32) * 8, 8), _LARGEST_TILE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def by_expert(
  rows: jax.Array,
  kernels: Arrays,
  group_sizes: jax.Array,
  dropout: expert_dropout.ExpertDropout | None,
  pairs: jax.Array,
  expert: Expert,
  share: int,
) -> jax.Array:
  """Every row, computed by its own expert.

  Args:
    rows: <float>[rows, in], those of expert 0 first, then of expert 1, ...; at
      least `tile_size(share)` further rows follow that no expert owns.
    kernels: <float>[expert, ...] each, as `expert` takes them.
    group_sizes: <int32>[expert], rows of each expert; zero is allowed.
    dropout: of hidden units, or None. Masks are read where they are used:
      written for all rows they would be as large as the hidden units.
    pairs: <int32>[rows], for the dropout.
    expert: static, computes the rows of one.
    share: static, rows of each expert in the batched product.

  Returns:
    <float>[rows, out]; meaningless beyond the last row of the last expert.
  """
  return _forward(rows, kernels, group_sizes, dropout, pairs, expert, share)[0]


def _forward(rows, kernels, group_sizes, dropout, pairs, expert, share):
  index, inverse = _windows(group_sizes, share, rows.shape[0])
  # Only projections are kept for the backward pass.
  checkpointed = jax.checkpoint(
    expert,
    policy=jax.checkpoint_policies.dots_saveable,
    prevent_cse=False,
  )
  keep = functools.partial(_keep, dropout, dtype=rows.dtype)
  kept = keep(jnp.take(pairs, index, mode='clip'))
  outputs, pull = jax.vjp(
    lambda rows, kernels: jax.vmap(checkpointed)(rows, kernels, kept),
    _take(rows, index),
    kernels,
  )

  def tile(outputs, number, start, is_own):
    cut = functools.partial(_slice, start=start, size=is_own.shape[0])
    computed = expert(cut(rows), _at(kernels, number), keep(cut(pairs)))
    return _write(outputs, jnp.where(is_own, computed, cut(outputs)), start)

  outputs = _take(outputs.reshape(-1, outputs.shape[-1]), inverse)
  outputs = _for_each_tile(tile, outputs, group_sizes, share)
  return outputs, (pull, rows, kernels, group_sizes, dropout, pairs)


def _backward(expert, share, residuals, cotangent):
  pull, rows, kernels, group_sizes, dropout, pairs = residuals
  index, inverse = _windows(group_sizes, share, rows.shape[0])
  # Where an expert has fewer rows than the share, others were computed with it.
  is_own = index[:, :, None] < rows.shape[0]
  d_windows, d_kernels = pull(jnp.where(is_own, _take(cotangent, index), 0))

  def tile(carry, number, start, is_own):
    d_rows, d_kernels = carry
    cut = functools.partial(_slice, start=start, size=is_own.shape[0])
    kept = _keep(dropout, cut(pairs), rows.dtype)
    _, pull = jax.vjp(
      lambda rows, own: expert(rows, own, kept),
      cut(rows),
      _at(kernels, number),
    )
    d_own_rows, d_own = pull(jnp.where(is_own, cut(cotangent), 0))
    d_own_rows = jnp.where(is_own, d_own_rows, cut(d_rows))
    add = lambda whole, own, more: jax.lax.dynamic_update_index_in_dim(
      whole, own + more, number, 0
    )
    d_kernels = jax.tree.map(add, d_kernels, _at(d_kernels, number), d_own)
    return _write(d_rows, d_own_rows, start), d_kernels

  d_rows = _take(d_windows.reshape(-1, rows.shape[1]), inverse)
  d_rows, d_kernels = _for_each_tile(
    tile, (d_rows, d_kernels), group_sizes, share
  )
  return d_rows, d_kernels, None, None, None


by_expert.defvjp(_forward, _backward)


def _windows(group_sizes, share, num_rows):
  """Rows of the batched product <int32>[expert, share], and the inverse.

  Out of range for what an expert has too little of, and for rows in tiles.
  """
  num_experts = group_sizes.shape[0]
  ends = jnp.cumsum(group_sizes)
  starts = ends - group_sizes
  slot = jnp.arange(share, dtype=jnp.int32)[None, :]
  index = jnp.where(
    slot < group_sizes[:, None], starts[:, None] + slot, num_rows
  )
  row = jnp.arange(num_rows, dtype=jnp.int32)
  expert = jnp.searchsorted(ends, row, side='right').astype(jnp.int32)
  position = row - jnp.take(starts, expert, mode='clip')
  inverse = jnp.where(
    (expert < num_experts) & (position < share),
    expert * share + position,
    num_experts * share,
  )
  return index, inverse


def _for_each_tile(
  tile: Callable[..., Any], carry: Any, group_sizes: jax.Array, share: int
) -> Any:
  """Carries something through the tiles of all rows beyond the share.

  `tile` takes it, the expert, the tile's first row, and which of the rows are
  the expert's, <bool>[tile, 1].
  """
  size = tile_size(share)
  rest = jnp.maximum(group_sizes - share, 0)
  firsts = jnp.cumsum(group_sizes) - group_sizes + share
  num_tiles = -(-rest // size)
  ends = jnp.cumsum(num_tiles)

  def visit(i, carry):
    number = jnp.searchsorted(ends, i, side='right')
    done = (i - (ends[number] - num_tiles[number])) * size
    is_own = jnp.arange(size)[:, None] < rest[number] - done
    return tile(carry, number, firsts[number] + done, is_own)

  return jax.lax.fori_loop(0, ends[-1], visit, carry)


def _keep(dropout, pairs, dtype):
  return None if dropout is None else dropout(pairs).astype(dtype)


def _take(rows, index):
  if not rows.shape[0]:  # No batched product; jnp.take refuses to read nothing.
    return jnp.zeros_like(rows, shape=(index.shape[0], rows.shape[1]))
  # What is out of range reads any row: filling it costs another pass.
  return jnp.take(rows, index, axis=0, mode='clip')


def _at(arrays, number):
  one = lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False)
  return jax.tree.map(one, arrays)


def _slice(array, start, size):
  return jax.lax.dynamic_slice_in_dim(array, start, size)


def _write(array, part, start):
  return jax.lax.dynamic_update_slice_in_dim(array, part, start, 0)
