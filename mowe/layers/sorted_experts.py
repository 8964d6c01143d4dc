"""Feed-forward of rows sorted by expert, one expert after another.

Nothing here depends on how even the experts' shares are: an expert computes
its own rows, rounded up to a rung of a short ladder of sizes. No array is
larger than the rows or the kernels. All steps of one expert stay in the cache,
which on CPU pays for the copy of its kernels.

A tile may reach into the rows of the next expert. What it computes there is
overwritten when that expert's turn comes, and masked in gradients of kernels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mowe.layers import feed_forward

# Sizes of a tile relative to an even share. Routers are trained to balance,
# so the rungs are closest around one; a larger share takes several tiles.
_RUNGS = (1 / 4, 1 / 2, 3 / 4, 7 / 8, 1, 9 / 8, 5 / 4, 3 / 2)

# More rows in a tile are no faster, and it would no longer fit in the cache.
_LARGEST_SHARE = 1024

Arrays = dict[str, jax.Array]


def tile_sizes(num_rows: int, num_experts: int) -> tuple[int, ...]:
  """Rows of a tile, ascending, for `num_rows` rows of all experts."""
  share = min(max(num_rows // num_experts, 1), _LARGEST_SHARE)
  # Multiples of 8: whole vectors.
  return tuple(sorted({max(8, -(-int(share * r) // 8) * 8) for r in _RUNGS}))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def feed_forward_by_expert(
  rows: jax.Array,
  kernels: Arrays,
  group_sizes: jax.Array,
  keep: jax.Array | None,
  activations: tuple[str, ...],
  tiles: tuple[int, ...],
) -> jax.Array:
  """Two-layer feed-forward in which every row meets its own expert.

  Args:
    rows: <float>[rows, embed], those of expert 0 first, then of expert 1, ...;
      at least `tiles[-1]` further rows follow that no expert owns.
    kernels: `wi` or `wi_0`, `wi_1` <float>[expert, embed, expert_mlp] and `wo`
      <float>[expert, expert_mlp, embed].
    group_sizes: <int32>[expert], rows of each expert; zero is allowed.
    keep: <float>[rows, expert_mlp] that hidden units are multiplied with, the
      mask of dropout; None is all ones.
    activations: as in the dense feed-forward.
    tiles: static sizes, ascending, as `tile_sizes` gives them.

  Returns:
    <float>[rows, embed]; meaningless beyond the last row of the last expert.
  """
  return _forward(rows, kernels, group_sizes, keep, activations, tiles)[0]


def _forward(rows, kernels, group_sizes, keep, activations, tiles):
  arrays = {'rows': rows} | ({} if keep is None else {'keep': keep})

  def tile(own, inputs, is_own):
    del is_own
    projections = {
      name: inputs['rows'] @ own[name]
      for name in feed_forward.kernel_names(activations)
    }
    hidden = _hidden(projections, inputs, activations)
    return projections | {'outputs': hidden @ own['wo']}, {}

  found, _ = _for_each_expert(tile, arrays, kernels, group_sizes, tiles)
  outputs = found.pop('outputs')
  return outputs, (arrays | found, kernels, group_sizes)


def _backward(activations, tiles, residuals, cotangent):
  arrays, kernels, group_sizes = residuals
  names = feed_forward.kernel_names(activations)

  def tile(own, inputs, is_own):
    d_outputs = jnp.where(is_own, inputs['cotangent'], 0)
    hidden, pull = jax.vjp(
      lambda projections: _hidden(projections, inputs, activations),
      {name: inputs[name] for name in names},
    )
    (d_projections,) = pull(_times_transposed(d_outputs, own['wo']))
    d_kernels = {
      name: _transposed_times(inputs['rows'], d_projections[name])
      for name in names
    } | {'wo': _transposed_times(hidden, d_outputs)}
    d_rows = sum(
      _times_transposed(d_projections[name], own[name]) for name in names
    )
    return {'rows': d_rows}, d_kernels

  arrays = arrays | {'cotangent': cotangent}
  d_arrays, d_kernels = _for_each_expert(
    tile, arrays, kernels, group_sizes, tiles
  )
  return d_arrays['rows'], d_kernels, None, None


feed_forward_by_expert.defvjp(_forward, _backward)


def _hidden(projections, inputs, activations):
  hidden = feed_forward.activate(list(projections.values()), activations)
  return hidden * inputs['keep'] if 'keep' in inputs else hidden


def _for_each_expert(
  tile: Callable[..., tuple[Arrays, Arrays]],
  arrays: Arrays,
  kernels: Arrays,
  group_sizes: jax.Array,
  tiles: tuple[int, ...],
) -> tuple[Arrays, Arrays]:
  """Runs `tile` over the rows of every expert.

  `tile` takes the expert's kernels, some rows of `arrays` and which of them are
  its own, and gives rows, which are put together, and sums, which are added
  up over the tiles of an expert.
  """
  largest = tiles[-1]
  starts = jnp.cumsum(group_sizes) - group_sizes

  def run(size, own, start, num_rows):
    inputs = _slice(arrays, start, size)
    is_own = jnp.arange(size)[:, None] < num_rows
    rows, sums = tile(own, inputs, is_own)
    pad = lambda x: jnp.pad(x, ((0, largest - size), (0, 0)))
    return jax.tree.map(pad, rows), sums

  def expert(number, carry):
    all_rows, all_sums = carry
    own = jax.tree.map(lambda w: _at(w, number), kernels)
    start, num_rows = starts[number], group_sizes[number]
    # The last tile first: only further ones have to be added to its sums.
    num_full = jnp.maximum(num_rows - 1, 0) // largest
    done = num_full * largest
    rows, sums = jax.lax.switch(
      jnp.searchsorted(jnp.asarray(tiles), num_rows - done),
      [functools.partial(run, size) for size in tiles],
      own,
      start + done,
      num_rows - done,
    )
    all_rows = _write(all_rows, rows, start + done)

    def full_tile(i, carry):
      all_rows, sums = carry
      at = start + i * largest
      rows, more = run(largest, own, at, largest)
      return _write(all_rows, rows, at), jax.tree.map(jnp.add, sums, more)

    all_rows, sums = jax.lax.fori_loop(0, num_full, full_tile, (all_rows, sums))
    put = lambda whole, one: jax.lax.dynamic_update_index_in_dim(
      whole, one, number, 0
    )
    return all_rows, jax.tree.map(put, all_sums, sums)

  rows, sums = jax.eval_shape(
    functools.partial(run, largest),
    jax.tree.map(lambda w: w[0], kernels),
    0,
    0,
  )
  num_rows = next(iter(arrays.values())).shape[0]
  num_experts = group_sizes.shape[0]
  # Zeros like something: on a mesh, they vary over devices as it does.
  zeros = (
    jax.tree.map(
      lambda x: jnp.zeros_like(x, shape=(num_rows, x.shape[1])), rows
    ),
    jax.tree.map(
      lambda x: jnp.zeros_like(x, shape=(num_experts, *x.shape)), sums
    ),
  )
  return jax.lax.fori_loop(0, num_experts, expert, zeros)


def _at(array: Any, number):
  return jax.lax.dynamic_index_in_dim(array, number, keepdims=False)


def _slice(arrays, start, size):
  cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
  return jax.tree.map(cut, arrays)


def _write(arrays, parts, start):
  put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(
    whole, part, start, 0
  )
  return jax.tree.map(put, arrays, parts)


def _times_transposed(left, right):
  return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())))


def _transposed_times(left, right):
  return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())))
