"""Rows sorted by expert, each computed by its own: one batch, then the rest.

The first rows of every expert, up to a share, are computed as one batch, which
reads each kernel where it lies. What experts have beyond that share follows in
tiles, one after another, as many as there are: a router that balances leaves
few. The share is an even one; a small one has at most 0.28 of it more, for
loads differ. However uneven they are, no more than 2.28 times the rows are
computed, but for what fills up tiles, and no array is larger than 1.28 times
the rows or than the kernels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mowe.layers.dispatch import expert_dropout, slots

# Whole vectors; and more rows in a tile are no faster.
_SMALLEST_TILE, _LARGEST_TILE = 8, 256
# A share of so many rows is left as it is.
_LARGE_SHARE = 256

Arrays = dict[str, jax.Array]

# What one expert does: rows <float>[..., rows, in], its kernels, what to multiply
# its hidden units with or None, and what to multiply its outputs with,
# <float32>[..., rows, 1] or None, to <float>[..., rows, out]. A function or a
# frozen class; `experts` has some.
Expert = Callable[
  [jax.Array, Arrays, jax.Array | None, jax.Array | None], jax.Array
]


def batched_share(num_rows: int, num_experts: int) -> int:
  """Rows of each expert in the batched product; none if they are few."""
  even = num_rows // num_experts
  if even >= _LARGE_SHARE:
    # Every expert computes a row more in the batch, few need it.
    return even
  # Loads of experts chosen at random differ by the root of an even share. A tile
  # of few rows takes as long as the reading of its kernel.
  more = int(1.5 * math.sqrt(even))
  return even + more // _SMALLEST_TILE * _SMALLEST_TILE


def tile_size(share: int) -> int:
  """Rows of a tile beyond a share, a power of two.

  About what some experts have too much of: a tile reads all of a kernel, and
  the last one of an expert is not full.
  """
  size = min(max(int(4 * math.sqrt(share)), _SMALLEST_TILE), _LARGEST_TILE)
  return 1 << (size.bit_length() - 1)


class Rows(NamedTuple):
  """What the rows of `by_expert` are.

  Attributes:
    group_sizes: <int32>[expert], rows of each expert; zero is allowed.
    pairs: <int32>[rows], for the dropout.
    plan: rows are tokens in the slots of this plan: they are read from the
      tokens where they are used, so that no copy of a token is kept. None: they
      are given, those of expert 0 first, then of expert 1, ...; at least
      `tile_size(share)` further rows follow that no expert owns.
  """

  group_sizes: jax.Array
  pairs: jax.Array
  plan: slots.SlotPlan | None = None

  def cut(self, array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """A few rows, of tokens <float>[tokens, in] if there is a plan."""
    if self.plan is None:
      return _slice(array, start, size)
    return _take(array, _slice(self.plan.sources, start, size))

  def windows(self, array: jax.Array, index: jax.Array) -> jax.Array:
    """Rows at `index` <int32>[expert, share]."""
    if self.plan is not None:
      index = jnp.take(self.plan.sources, index, mode='clip')
    return _take(array, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def by_expert(
  inputs: jax.Array,
  kernels: Arrays,
  weights: jax.Array | None,
  rows: Rows,
  dropout: expert_dropout.ExpertDropout | None,
  expert: Expert,
  share: int,
) -> jax.Array:
  """Every row, computed by its own expert.

  Args:
    inputs: <float>[rows, in], or [tokens, in] with a plan.
    kernels: <float>[expert, ...] each, as `expert` takes them.
    weights: <float32>[rows], that outputs are multiplied with, or None.
    rows: where they are.
    dropout: of hidden units, or None. Masks are read where they are used:
      written for all rows they would be as large as the hidden units.
    expert: static, computes the rows of one.
    share: static, rows of each expert in the batched product.

  Returns:
    <float>[rows, out]; meaningless beyond the last row of the last expert.
  """
  return _forward(inputs, kernels, weights, rows, dropout, expert, share)[0]


def _forward(inputs, kernels, weights, rows, dropout, expert, share):
  num_rows = rows.pairs.shape[0]
  index, inverse = _windows(rows.group_sizes, share, num_rows)
  keep = functools.partial(_keep, dropout, dtype=inputs.dtype)

  # Only projections are kept for the backward pass, which reads inputs again.
  @functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable
  )
  def batched(inputs, offset, kernels, weights, rows, dropout):
    kept = _keep(
      dropout, jnp.take(rows.pairs, index, mode='clip'), inputs.dtype
    )
    own = None if weights is None else _take(weights[:, None], index)
    read = _tap(offset, rows.windows(inputs, index))
    return jax.vmap(expert)(read, kernels, kept, own)

  offset = jnp.zeros_like(inputs, shape=(*index.shape, inputs.shape[1]))
  outputs, pull = jax.vjp(
    lambda *wanted: batched(inputs, *wanted, rows, dropout),
    offset,
    kernels,
    weights,
  )

  def tile(outputs, number, start, is_own):
    size = is_own.shape[0]
    computed = expert(
      rows.cut(inputs, start, size),
      _at(kernels, number),
      keep(_slice(rows.pairs, start, size)),
      _column(weights, start, size),
    )
    old = _slice(outputs, start, size)
    return _write(outputs, jnp.where(is_own, computed, old), start)

  outputs = _take(outputs.reshape(-1, outputs.shape[-1]), inverse)
  outputs = _for_each_tile(tile, outputs, rows.group_sizes, share)
  return outputs, (pull, inputs, kernels, weights, rows, dropout)


@jax.custom_vjp
def _tap(offset, values):
  """The values, with their gradient as that of `offset`.

  So the gradient of rows is had before those of one token are added up.
  """
  del offset
  return values


_tap.defvjp(
  lambda offset, values: (values, None), lambda _, cotangent: (cotangent, None)
)


def _backward(expert, share, residuals, cotangent):
  pull, inputs, kernels, weights, rows, dropout = residuals
  num_rows = rows.pairs.shape[0]
  index, inverse = _windows(rows.group_sizes, share, num_rows)
  # Where an expert has fewer rows than the share, others were computed with it.
  is_own = index[:, :, None] < num_rows
  d_windows, d_kernels, d_weights = pull(
    jnp.where(is_own, _take(cotangent, index), 0)
  )

  def tile(carry, number, start, is_own):
    d_rows, d_kernels, d_weights = carry
    size = is_own.shape[0]
    kept = _keep(dropout, _slice(rows.pairs, start, size), inputs.dtype)
    _, pull = jax.vjp(
      lambda rows, own, weights: expert(rows, own, kept, weights),
      rows.cut(inputs, start, size),
      _at(kernels, number),
      _column(weights, start, size),
    )
    d_own_rows, d_own, d_own_weights = pull(
      jnp.where(is_own, _slice(cotangent, start, size), 0)
    )
    put = lambda whole, part: _write(
      whole, jnp.where(is_own, part, _slice(whole, start, size)), start
    )
    add = lambda whole, own, more: jax.lax.dynamic_update_index_in_dim(
      whole, own + more, number, 0
    )
    d_kernels = jax.tree.map(add, d_kernels, _at(d_kernels, number), d_own)
    d_weights = jax.tree.map(put, d_weights, d_own_weights)
    return put(d_rows, d_own_rows), d_kernels, d_weights

  d_rows = _take(d_windows.reshape(-1, inputs.shape[1]), inverse)
  if weights is not None:
    d_weights = d_weights[:, None]
  d_rows, d_kernels, d_weights = _for_each_tile(
    tile, (d_rows, d_kernels, d_weights), rows.group_sizes, share
  )
  d_inputs = d_rows
  if rows.plan is not None:
    d_inputs = slots.to_tokens(d_rows, rows.plan)
  if weights is not None:
    d_weights = d_weights[:, 0]
  return d_inputs, d_kernels, d_weights, None, None


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


def _column(weights, start, size):
  return None if weights is None else _slice(weights, start, size)[:, None]


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
