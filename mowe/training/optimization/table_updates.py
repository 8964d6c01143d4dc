"""Updating the experts of a batch in their tables, in place.

The gradient of all present experts would be as large as they are. Instead the
backward pass leaves the factors of it (`layers/memory/grouped.py`), and for a few
experts at a time the gradient of all layers that share the table is formed, the
row optimizer applied, and the result written back.

Source: deferred weight gradients; the sum over layers is exact, because the
gradient of a shared kernel is the sum over its uses.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers.memory import bfloat16_bits, grouped
from mowe.models import parameters
from mowe.training.optimization import row_gradients, row_optimizers
from mowe.words import batch_plans

# Out of the range of all tokens.
_NO_TOKEN = np.iinfo(np.int32).max


def gradient_bound(factors: Any) -> jax.Array:
  """A bound on the norm of the gradient of every expert, <float32>[].

  Gradients of tables are formed a few experts at a time, when rows are already
  being written, so their norm cannot be asked for before. The gradient of an
  expert is a sum of outer products over its tokens; it is at most the sum of
  the products of their norms, here over all tokens and kernels.

  Args:
    factors: `grouped.Factors` of all layers, each [..., width] over any axes
      of tokens.

  Returns:
    The bound; infinite or NaN where its square, or that of a gradient, is.
  """
  norm = lambda rows: jnp.sqrt(jnp.sum(rows.astype(jnp.float32) ** 2, axis=-1))
  is_factors = lambda node: isinstance(node, grouped.Factors)
  bound = sum(
    jnp.sum(norm(one.inputs) * norm(one.cotangents))
    for one in jax.tree.leaves(factors, is_leaf=is_factors)
  )
  # Row optimizers square gradients: their squares must be finite, too.
  return jnp.sqrt(bound * bound)


def update_table(
  row_optimizer: row_optimizers.RowOptimizer,
  table: dict[str, jax.Array],
  table_state: Any,
  factors: parameters.TableFactors,
  plan: batch_plans.ExpertPlan,
  usable: jax.Array,
  learning_rate_step: jax.Array,
  key: jax.Array,
) -> tuple[dict[str, jax.Array], Any]:
  """Returns the table and its state after one step.

  Args:
    row_optimizer: of the rows.
    table: kernel name -> <float>[num_experts, in, out].
    table_state: of the whole table.
    factors: of the layers that use the table, over the tokens of their
      stream; with more than one microbatch [microbatches, tokens, width].
    plan: of the batch.
    usable: <bool>[]; without it nothing is changed.
    learning_rate_step: <int32>[], the global step, from 0.
    key: of this step, for the rounding of tables in bfloat16.
  """
  num_tokens = tuple(
    0 if stream is None else stream.slots.size
    for stream in (plan.encoder, plan.decoder)
  )
  return update_rows(
    row_optimizer,
    table,
    table_state,
    jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), factors),
    plan.updates,
    num_tokens,
    usable,
    learning_rate_step,
    key,
  )


def update_rows(
  row_optimizer: row_optimizers.RowOptimizer,
  table: dict[str, jax.Array],
  table_state: Any,
  factors: parameters.TableFactors,
  updates: batch_plans.SizeClasses,
  num_tokens: tuple[int, int],
  usable: jax.Array,
  learning_rate_step: jax.Array,
  key: jax.Array,
) -> tuple[dict[str, jax.Array], Any]:
  """As `update_table`, with factors over all tokens of their stream.

  Args:
    row_optimizer: as above, like all that is not named here.
    table: kernels.
    table_state: of the table.
    factors: each over all tokens of its stream, microbatch by microbatch.
    updates: the experts, with tokens of the encoder before the decoder's.
    num_tokens: of the encoder and of the decoder.
    usable: whether anything is changed.
    learning_rate_step: the global step.
    key: for rounding.
  """
  num_before, num_after = num_tokens
  first = 0 if 'encoder' in factors else num_before
  last = num_before + (num_after if 'decoder' in factors else 0)
  layers = _over_all_tokens(factors, num_before)
  kernels = list(table.values())
  num_experts = len(kernels[0])
  numbers_of_one = sum(kernel[0].size for kernel in kernels)

  def of_some_tokens(same_kernel, sources):
    return row_gradients.Matrix(grouped.kernel_gradient(same_kernel, sources))

  def of_one_token(same_kernel, sources):
    factors = grouped.factors_of_experts(same_kernel, sources)
    return row_gradients.Outer(*(factor[:, 0] for factor in factors))

  def update_classes(carry, classes, of_tokens, key):
    """Updates the experts of some size classes, a chunk at a time."""
    chunks = _Chunks(classes, num_experts, numbers_of_one)

    def gradients(experts, sources, is_new):
      """Experts of one chunk, those that change, and their gradients."""
      # A table of one stream leaves alone what only the other stream has.
      used = ((sources >= first) & (sources < last)).any(axis=1)
      of_kernels = {
        name: of_tokens([layer[name] for layer in layers], sources)
        for name in table
      }
      return experts, used & is_new, of_kernels

    def update_chunk(number, carry):
      experts, changed, of_kernels = chunks.call(number, gradients)
      read = lambda whole: jnp.take(whole, experts, axis=0, mode='clip')
      table, table_state = carry
      new_rows, new_state = row_optimizer.update(
        of_kernels,
        jax.tree.map(read, table_state),
        {name: _to_float(read(whole)) for name, whole in table.items()},
        learning_rate_step,
      )
      new_rows = _as_stored(new_rows, table, jax.random.fold_in(key, number))
      # Numbers beyond the table are dropped; each of its own, as promised.
      beyond = jnp.iinfo(jnp.int32).max - jnp.arange(experts.size)
      written = jnp.where(changed & usable, experts, beyond)
      write = lambda whole, rows: whole.at[written].set(
        rows, mode='drop', unique_indices=True
      )
      return (
        jax.tree.map(write, table, new_rows),
        jax.tree.map(write, table_state, new_state),
      )

    return jax.lax.fori_loop(0, chunks.number, update_chunk, carry)

  # Most experts of a batch have one token.
  ones, others = _of_one_slot(updates, len(layers))
  one_key, other_key = jax.random.split(key)
  carry = table, table_state
  if ones.experts:
    carry = update_classes(carry, ones, of_one_token, one_key)
  if others.experts:
    carry = update_classes(carry, others, of_some_tokens, other_key)
  return carry


def _of_one_slot(classes, num_layers):
  """Classes with one token and one layer, and the other classes."""
  parts = ([], [])
  for experts, sources in zip(*classes, strict=True):
    parts[sources.shape[1] * num_layers > 1].append((experts, sources))
  return [
    batch_plans.SizeClasses(*(zip(*part, strict=True) if part else ((), ())))
    for part in parts
  ]


def _to_float(rows):
  """Rows of a table, in float32 where they are kept as bits."""
  if rows.dtype == bfloat16_bits.DTYPE:
    return bfloat16_bits.to_float(rows).astype(jnp.float32)
  return rows


def _as_stored(rows, table, key):
  """Rows in the dtypes of their table."""
  keys = jax.random.split(key, len(rows))
  return {
    name: bfloat16_bits.stochastic(rows[name], one)
    if table[name].dtype == bfloat16_bits.DTYPE
    else rows[name]
    for name, one in zip(sorted(rows), keys, strict=True)
  }


class _Chunks:
  """Experts of all classes, a few of one class at a time.

  One loop goes over all, so that what the classes have in common, the row
  optimizer, is compiled once. Chunks without any expert are left out.
  """

  def __init__(
    self,
    classes: batch_plans.SizeClasses,
    num_experts: int,
    numbers_of_one: int,
  ):
    sizes = [experts.size for experts in classes.experts]
    # Half of what a product takes: the row optimizer goes several times over
    # gradients and rows.
    cached = grouped.experts_at_once(numbers_of_one) // 2
    # And few enough that the last chunks of the classes, which are not full,
    # cost little beside the others.
    even = -(-sum(sizes) // (2 * len(sizes)))
    # XLA compiles the update of a single expert to code 50 times slower.
    self._size = max(2, min(cached, even))
    self._classes = classes
    of_class = [-(-size // self._size) for size in sizes]
    self._class = np.repeat(np.arange(len(sizes)), of_class)
    self._first = self._size * np.concatenate(
      [np.arange(number) for number in of_class]
    )
    # Unused places come last in their class.
    num_used = jnp.stack(
      [jnp.sum(experts < num_experts) for experts in classes.experts]
    )
    used = jnp.asarray(self._first) < num_used[self._class]
    (self._used,) = jnp.nonzero(used, size=len(self._class))
    self.number = jnp.sum(used)

  def call(self, number: jax.Array, function: Callable[..., Any]) -> Any:
    """function(experts, sources, is_new) on a chunk of so many experts."""
    number = self._used[number]

    def of_class(experts, sources, first):
      missing = max(0, self._size - experts.size)
      experts = jnp.pad(experts, (0, missing))
      sources = jnp.pad(
        sources, ((0, missing), (0, 0)), constant_values=_NO_TOKEN
      )
      # The last chunk overlaps the one before, and must not update it again.
      start = jnp.minimum(first, experts.size - self._size)
      is_new = start + jnp.arange(self._size) >= first
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, self._size)
      return function(cut(experts), cut(sources), is_new)

    branches = [
      functools.partial(of_class, *same_class)
      for same_class in zip(*self._classes, strict=True)
    ]
    return jax.lax.switch(
      jnp.asarray(self._class)[number],
      branches,
      jnp.asarray(self._first)[number],
    )


def _over_all_tokens(factors, num_before):
  """Factors of the n-th layers of both streams, joined, for each n.

  Tokens of the encoder come before those of the decoder, as in the plan.
  Tokens of a stream without an n-th layer are out of range, or zeros.
  """
  encoder, decoder = factors.get('encoder', []), factors.get('decoder', [])
  layers = []
  for before, after in itertools.zip_longest(encoder, decoder):
    if before is None:
      before = jax.tree.map(
        lambda x: jnp.zeros((num_before, *x.shape[1:]), x.dtype), after
      )
    if after is not None:
      before = jax.tree.map(lambda *x: jnp.concatenate(x), before, after)
    layers.append(before)
  return layers
