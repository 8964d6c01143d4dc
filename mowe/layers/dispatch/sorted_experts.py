"""Computes rows that are sorted by expert: one batch, then the rest in tiles.

How many rows an expert has is not known when the program is compiled. So there
are two parts:

1. The first `share` rows of every expert are one batched product, [experts,
   share, in] x [experts, in, out]. It reads each kernel where it lies.
2. The rows that an expert has beyond the share follow in tiles, in a loop over
   as many tiles as there are. A router that balances the load leaves few.

The share is about an even one, rows / experts. A small share is enlarged by up
to 28 %, as the loads of experts differ. However uneven the loads are, this
bounds the work to 2.28 times the rows, apart from unused rows of tiles, and
each array to the size of the kernels or to 1.28 times the size of the rows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mowe.layers.dispatch import expert_dropout, slots

# Rows of a tile. Fewer than 8 would not fill the vector registers, and products
# of more than 256 rows are no faster.
_SMALLEST_TILE, _LARGEST_TILE = 8, 256
# A share of at least so many rows is not enlarged.
_LARGE_SHARE = 256

Arrays = dict[str, jax.Array]

# The computation of one expert: a function or a frozen class, such as those of
# `mixtures/experts.py`. Its arguments are the rows <float>[..., rows, in], the
# kernels of the expert by name, the dropout masks of the hidden units or None,
# and the gates of the outputs <float32>[..., rows, 1] or None. It returns
# <float>[..., rows, out].
Expert = Callable[
  [jax.Array, Arrays, jax.Array | None, jax.Array | None], jax.Array
]


def batched_share(num_rows: int, num_experts: int) -> int:
  """Returns how many rows of each expert the batched product has.

  It is 0 if there are fewer rows than experts; then all rows are in tiles.

  Args:
    num_rows: number of rows of all experts.
    num_experts: number of experts.
  """
  even = num_rows // num_experts
  if even >= _LARGE_SHARE:
    # If the share grows by one row, every expert computes one more, but few
    # experts have a row there.
    return even
  # If experts are chosen at random, the standard deviation of their loads is
  # the root of an even share. A share enlarged by 1.5 deviations leaves few
  # experts with rows for a tile. That pays for small shares: a tile of few rows
  # still takes the time to read its kernel.
  more = int(1.5 * math.sqrt(even))
  return even + more // _SMALLEST_TILE * _SMALLEST_TILE


def tile_size(share: int) -> int:
  """Returns the number of rows of a tile, a power of two.

  It is about the number of rows that a busy expert has beyond the share. With
  smaller tiles, a kernel would be read for several tiles of one expert. With
  larger ones, most rows of an expert's last tile would be unused.

  Args:
    share: number of rows of each expert in the batched product.
  """
  size = min(max(int(4 * math.sqrt(share)), _SMALLEST_TILE), _LARGEST_TILE)
  return 1 << (size.bit_length() - 1)


class Rows(NamedTuple):
  """Where the rows of `by_expert` come from, and whose they are.

  Rows are in the order of experts: those of expert 0, then those of expert 1,
  and so on. At least `tile_size(share)` further rows follow that no expert
  owns, so that a tile never ends beyond the last row. (XLA would move such a
  tile back, onto rows of other experts.)

  Attributes:
    group_sizes: <int32>[expert], number of rows of each expert; may be zero.
    pairs: <int32>[rows], the pair of each row, which its dropout depends on.
    plan: the plan whose slots are the rows. Inputs are then tokens, and a row
      is read from its token where it is used, so that no copies of tokens are
      kept for the gradient. With None, inputs are the rows themselves.
  """

  group_sizes: jax.Array
  pairs: jax.Array
  plan: slots.SlotPlan | None = None

  def cut(self, array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns the inputs <float>[size, in] of some consecutive rows.

    Args:
      array: <float>[rows, in], or <float>[tokens, in] if there is a plan.
      start: <int32>[], the first row.
      size: number of rows.
    """
    if self.plan is None:
      return _slice(array, start, size)
    return _take(array, _slice(self.plan.sources, start, size))

  def windows(self, array: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the inputs <float>[expert, share, in] of the batched product.

    Args:
      array: <float>[rows, in], or <float>[tokens, in] if there is a plan.
      index: <int32>[expert, share], the rows. One out of range reads any row.
    """
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
  """Computes every row by its own expert.

  The gradient is defined here, because JAX has no reverse-mode gradient of a
  loop over a number of tiles that is not static.

  Args:
    inputs: <float>[rows, in], or <float>[tokens, in] if the rows have a plan.
    kernels: arrays <float>[expert, ...] by name, as `expert` takes them.
    weights: <float32>[rows], by which outputs are multiplied; or None.
    rows: where the rows come from, and how many each expert has.
    dropout: dropout of the hidden units; None without dropout. Masks are read
      where they are used: an array with the masks of all rows would be as large
      as the hidden units.
    expert: computes rows of one expert; static.
    share: number of rows of each expert in the batched product; static.

  Returns:
    <float>[rows, out]. Rows that no expert owns hold arbitrary numbers.
  """
  return _forward(inputs, kernels, weights, rows, dropout, expert, share)[0]


def _forward(inputs, kernels, weights, rows, dropout, expert, share):
  num_rows = rows.pairs.shape[0]
  index, inverse = _windows(rows.group_sizes, share, num_rows)
  keep = functools.partial(_keep, dropout, dtype=inputs.dtype)

  # The results of products are kept for the backward pass. The rows that were
  # read are not: it reads them from the inputs again.
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

  # [expert, share, in]. No one reads these zeros; see `_tap`.
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

  # [expert, share, out] -> [rows, out]. Rows that are in tiles read any number
  # here, and their tiles overwrite it.
  outputs = _take(outputs.reshape(-1, outputs.shape[-1]), inverse)
  outputs = _for_each_tile(tile, outputs, rows.group_sizes, share)
  return outputs, (pull, inputs, kernels, weights, rows, dropout)


@jax.custom_vjp
def _tap(offset, values):
  """Returns the values, and gives their gradient to `offset`.

  The backward pass needs the gradient of every row [expert, share, in], to put
  it together with that of the rows in tiles. If it went on to the inputs, JAX
  would transpose the gather of rows to a scatter-add over the inputs.
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
  # Where an expert has fewer rows than the share, the batch computed rows of
  # other experts with it. They get no gradient.
  is_own = index[:, :, None] < num_rows
  d_windows, d_kernels, d_weights = pull(
    jnp.where(is_own, _take(cotangent, index), 0)
  )

  # d_windows is [expert, share, in], and d_kernels are the gradients of the
  # batched product, to which each tile adds its part. d_weights is [rows].
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

  # [expert, share, in] -> [rows, in]
  d_rows = _take(d_windows.reshape(-1, inputs.shape[1]), inverse)
  if weights is not None:
    d_weights = d_weights[:, None]
  d_rows, d_kernels, d_weights = _for_each_tile(
    tile, (d_rows, d_kernels, d_weights), rows.group_sizes, share
  )
  # Only now are the gradients of the rows of one token added up, by gathers:
  # [rows, in] -> [tokens, in].
  d_inputs = d_rows
  if rows.plan is not None:
    d_inputs = slots.to_tokens(d_rows, rows.plan)
  if weights is not None:
    d_weights = d_weights[:, 0]
  return d_inputs, d_kernels, d_weights, None, None


by_expert.defvjp(_forward, _backward)


def _windows(group_sizes, share, num_rows):
  """The rows of the batched product, and the place of each row in it.

  Returns:
    index: <int32>[expert, share], the row in each place of the product; out of
      range where an expert has fewer rows than the share.
    inverse: <int32>[rows], the place of each row in [expert * share]; out of
      range for a row in a tile or without an expert.
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
  """Calls `tile` for the tiles of all rows beyond the share, in a loop.

  `tile` takes the carry of the loop, the number of the expert, the first row of
  the tile, and a mask <bool>[tile, 1] of the rows that the expert owns. It
  returns the new carry. The loop has as many steps as there are tiles, and step
  i finds its expert by the ends of the experts' tiles.
  """
  size = tile_size(share)
  rest = jnp.maximum(group_sizes - share, 0)
  firsts = jnp.cumsum(group_sizes) - group_sizes + share
  num_tiles = -(-rest // size)
  ends = jnp.cumsum(num_tiles)

  def visit(i, carry):
    number = jnp.searchsorted(ends, i, side='right')
    # The number of rows that earlier tiles of this expert have.
    done = (i - (ends[number] - num_tiles[number])) * size
    is_own = jnp.arange(size)[:, None] < rest[number] - done
    return tile(carry, number, firsts[number] + done, is_own)

  return jax.lax.fori_loop(0, ends[-1], visit, carry)


def _column(weights, start, size):
  return None if weights is None else _slice(weights, start, size)[:, None]


def _keep(dropout, pairs, dtype):
  return None if dropout is None else dropout(pairs).astype(dtype)


def _take(rows, index):
  if not rows.shape[0]:
    # The share is 0, so there is no batched product, and jnp.take refuses to
    # read from an empty array.
    return jnp.zeros_like(rows, shape=(index.shape[0], rows.shape[1]))
  # An index out of range reads any row, because callers ignore it. To fill in
  # zeros would take another pass over memory.
  return jnp.take(rows, index, axis=0, mode='clip')


def _at(arrays, number):
  one = lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False)
  return jax.tree.map(one, arrays)


def _slice(array, start, size):
  return jax.lax.dynamic_slice_in_dim(array, start, size)


def _write(array, part, start):
  return jax.lax.dynamic_update_slice_in_dim(array, part, start, 0)
