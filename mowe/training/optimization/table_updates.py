"""Updating the experts of a batch in their tables, in place.

The gradient of all present experts would be as large as they are. Instead the
backward pass leaves its factors (`layers/memory/grouped.py`), the inputs and
the cotangents of every product with an expert's kernel. Here, for a few experts
at a time, the gradient over all layers that share the table is formed from
them, the row optimizer is applied, and the new rows are written back.

Source: deferred weight gradients; the sum over layers is exact, because the
gradient of a shared kernel is the sum over its uses.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers.memory import bfloat16_bits, grouped, rows_in_place
from mowe.models import parameters
from mowe.training.optimization import row_gradients, row_optimizers
from mowe.words.plans import batch_plans

# The index of an empty place in `sources`: beyond the tokens of any batch.
_NO_TOKEN = np.iinfo(np.int32).max

# Factors by kernel name, each over all tokens of both streams.
_LayerFactors = dict[str, grouped.Factors]


class TableAndState(NamedTuple):
  """A table of experts with the state of its row optimizer.

  Attributes:
    table: kernel name -> <float>[num_experts, in, out], or <uint16> where a
      table is kept as the bits of bfloat16.
    state: a tree of arrays [num_experts, ...].
  """

  table: dict[str, jax.Array]
  state: Any


class BatchFactors(NamedTuple):
  """From what the gradients of a table's experts are formed in one step.

  Attributes:
    of_layers: stream -> for each of its layers that use the table: kernel
      name -> Factors [tokens of the stream, width], one microbatch after the
      other.
    classes: the experts to update, by the room that their tokens need. Their
      `sources` count the tokens of the encoder, then those of the decoder.
    num_tokens: the numbers of tokens of the encoder and of the decoder, in all
      microbatches together.
  """

  of_layers: parameters.TableFactors
  classes: batch_plans.SizeClasses
  num_tokens: tuple[int, int]


class StepValues(NamedTuple):
  """What all updates of one step have in common.

  Attributes:
    usable: <bool>[], whether all gradients are finite; if not, no row changes.
    learning_rate_step: <int32>[], the global step, from 0.
    key: draws the rounding of tables in bfloat16.
  """

  usable: jax.Array
  learning_rate_step: jax.Array
  key: jax.Array


class _Chunk(NamedTuple):
  """A few experts of one size class.

  Attributes:
    experts: <int32>[experts], rows of the table; numbers from `num_experts` on
      stand for no expert.
    sources: <int32>[experts, room], the tokens of each; `_NO_TOKEN`, or the
      number of tokens, where a place is empty.
    is_new: <bool>[experts], False for experts of an earlier chunk, which must
      not be updated again.
  """

  experts: jax.Array
  sources: jax.Array
  is_new: jax.Array


class RowGradients(NamedTuple):
  """The gradients of some experts.

  Attributes:
    experts: <int32>[experts], rows of the table.
    changed: <bool>[experts], whether the row is to be written.
    of_kernels: kernel name -> gradients of all these experts.
  """

  experts: jax.Array
  changed: jax.Array
  of_kernels: dict[str, row_gradients.Gradient]


class _Layers(NamedTuple):
  """The layers that share a table.

  Attributes:
    factors: the factors of each layer, over the tokens of both streams.
    first: the first token of a stream with such a layer.
    last: the token after the last one of a stream with such a layer.
  """

  factors: list[_LayerFactors]
  first: int
  last: int


def gradient_bound(factors: Any) -> jax.Array:
  """A bound on the norm of the gradient of every expert, <float32>[].

  Gradients of tables are formed a few experts at a time, when rows are already
  being written, so their norm cannot be asked for before. The gradient of an
  expert is a sum of outer products over its tokens; it is at most the sum of
  the products of their norms, here over all tokens and kernels.

  Args:
    factors: a tree with the `grouped.Factors` of all layers, each
      <float>[..., width] over any axes of tokens.

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
  rows: TableAndState,
  *,
  factors: parameters.TableFactors,
  plan: batch_plans.ExpertPlan,
  step: StepValues,
) -> TableAndState:
  """Returns the table and its state after one step.

  Args:
    row_optimizer: updates the rows.
    rows: all rows of the table.
    factors: stream -> factors [tokens, width] of its layers that use the table;
      with more than one microbatch [microbatches, tokens, width].
    plan: the plan of the batch.
    step: the values of the step.
  """
  num_tokens = tuple(
    0 if stream is None else stream.slots.size
    for stream in (plan.encoder, plan.decoder)
  )
  flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), factors)
  return update_rows(
    row_optimizer,
    rows,
    factors=BatchFactors(flat, plan.updates, num_tokens),
    step=step,
  )


def update_rows(
  row_optimizer: row_optimizers.RowOptimizer,
  rows: TableAndState,
  *,
  factors: BatchFactors,
  step: StepValues,
) -> TableAndState:
  """Returns the rows after one step; see `update_table`."""
  num_before, num_after = factors.num_tokens
  of_layers = factors.of_layers
  layers = _Layers(
    _over_all_tokens(of_layers, num_before),
    first=0 if 'encoder' in of_layers else num_before,
    last=num_before + (num_after if 'decoder' in of_layers else 0),
  )
  # Most experts of a batch have one token: their gradient is an outer product,
  # which is cheaper not to write out.
  ones, others = _of_one_slot(factors.classes, len(layers.factors))
  one_key, other_key = jax.random.split(step.key)
  if ones.experts:
    rows = _update_classes(
      rows,
      ones,
      layers=layers,
      form_gradient=_outer_gradient,
      row_optimizer=row_optimizer,
      step=step._replace(key=one_key),
    )
  if others.experts:
    rows = _update_classes(
      rows,
      others,
      layers=layers,
      form_gradient=_matrix_gradient,
      row_optimizer=row_optimizer,
      step=step._replace(key=other_key),
    )
  return rows


def _update_classes(
  rows: TableAndState,
  classes: batch_plans.SizeClasses,
  *,
  layers: _Layers,
  form_gradient: Callable[..., row_gradients.Gradient],
  row_optimizer: row_optimizers.RowOptimizer,
  step: StepValues,
) -> TableAndState:
  """Updates the experts of some size classes, a chunk at a time."""
  kernels = list(rows.table.values())
  numbers_of_one = sum(kernel[0].size for kernel in kernels)
  chunks = _Chunks(classes, len(kernels[0]), numbers_of_one)
  gradients_of = functools.partial(
    _gradients_of_chunk,
    layers=layers,
    kernel_names=list(rows.table),
    form_gradient=form_gradient,
  )

  def update_chunk(number, rows):
    gradients = chunks.call(number, gradients_of)
    return write_rows(
      rows,
      gradients,
      row_optimizer=row_optimizer,
      step=step._replace(key=jax.random.fold_in(step.key, number)),
    )

  return jax.lax.fori_loop(0, chunks.number, update_chunk, rows)


def _gradients_of_chunk(
  chunk: _Chunk,
  *,
  layers: _Layers,
  kernel_names: list[str],
  form_gradient: Callable[..., row_gradients.Gradient],
) -> RowGradients:
  """Forms the gradients of the experts of one chunk."""
  sources = chunk.sources
  # A table that only one stream uses leaves alone the experts that only the
  # other stream has.
  used = ((sources >= layers.first) & (sources < layers.last)).any(axis=1)
  of_kernels = {
    name: form_gradient([layer[name] for layer in layers.factors], sources)
    for name in kernel_names
  }
  return RowGradients(chunk.experts, used & chunk.is_new, of_kernels)


def write_rows(
  rows: TableAndState,
  gradients: RowGradients,
  *,
  row_optimizer: row_optimizers.RowOptimizer,
  step: StepValues,
) -> TableAndState:
  """Reads rows of a table, updates them, and writes them in their place.

  Args:
    rows: all rows of the table.
    gradients: the gradients of some of them.
    row_optimizer: updates them.
    step: the values of the step; its key is used for these rows alone.
  """
  experts = gradients.experts
  read = lambda whole: rows_in_place.read(whole, experts)
  new_rows, new_state = row_optimizer.update(
    gradients.of_kernels,
    jax.tree.map(read, rows.state),
    {name: _to_float(read(whole)) for name, whole in rows.table.items()},
    step.learning_rate_step,
  )
  new_rows = _as_stored(new_rows, rows.table, step.key)
  # Rows that are not to change get a number beyond the table, which the scatter
  # drops. Each has a number of its own, as `unique_indices` promises.
  beyond = jnp.iinfo(jnp.int32).max - jnp.arange(experts.size)
  written = jnp.where(gradients.changed & step.usable, experts, beyond)
  write = lambda whole, some: rows_in_place.write(whole, written, some)
  return TableAndState(
    jax.tree.map(write, rows.table, new_rows),
    jax.tree.map(write, rows.state, new_state),
  )


def _matrix_gradient(
  same_kernel: list[grouped.Factors], sources: jax.Array
) -> row_gradients.Matrix:
  """Gradients of experts with any number of tokens, [experts, in, out]."""
  return row_gradients.Matrix(grouped.kernel_gradient(same_kernel, sources))


def _outer_gradient(
  same_kernel: list[grouped.Factors], sources: jax.Array
) -> row_gradients.Outer:
  """Gradients of experts with one token in one layer."""
  factors = grouped.factors_of_experts(same_kernel, sources)
  # [experts, 1, width] -> [experts, width]
  return row_gradients.Outer(*(factor[:, 0] for factor in factors))


def _of_one_slot(
  classes: batch_plans.SizeClasses, num_layers: int
) -> list[batch_plans.SizeClasses]:
  """The classes with one token in one layer, and the other classes."""
  parts = ([], [])
  for experts, sources in zip(*classes, strict=True):
    parts[sources.shape[1] * num_layers > 1].append((experts, sources))
  return [
    batch_plans.SizeClasses(*(zip(*part, strict=True) if part else ((), ())))
    for part in parts
  ]


def _to_float(rows: jax.Array) -> jax.Array:
  """Rows of a table, in float32 where they are kept as bits of bfloat16."""
  if rows.dtype == bfloat16_bits.DTYPE:
    return bfloat16_bits.to_float(rows).astype(jnp.float32)
  return rows


def _as_stored(
  rows: dict[str, jax.Array], table: dict[str, jax.Array], key: jax.Array
) -> dict[str, jax.Array]:
  """Rows in the dtypes of their table.

  Bits of bfloat16 are rounded up or down at random, without bias: rounding to
  the nearest would lose every update below half a unit in the last place.
  """
  keys = jax.random.split(key, len(rows))
  return {
    name: bfloat16_bits.stochastic(rows[name], one)
    if table[name].dtype == bfloat16_bits.DTYPE
    else rows[name]
    for name, one in zip(sorted(rows), keys, strict=True)
  }


class _Chunks:
  """Cuts the experts of all classes into chunks of one size, each of one class.

  One loop goes over all chunks, so that the row optimizer, which is the same
  for all classes, is compiled once. Chunks without any expert are left out.

  Attributes:
    number: <int32>[], chunks with at least one expert, which are the first
      ones.
  """

  def __init__(
    self,
    classes: batch_plans.SizeClasses,
    num_experts: int,
    numbers_of_one: int,
  ):
    """Cuts the classes.

    Args:
      classes: the experts to update.
      num_experts: rows of the table.
      numbers_of_one: how many numbers the kernels of one expert have together.
    """
    sizes = [experts.size for experts in classes.experts]
    # A chunk has half as many experts as a product takes at a time, because the
    # row optimizer goes several times over gradients and rows.
    cached = grouped.experts_at_once(numbers_of_one) // 2
    # It also has so few that the last chunks of the classes, which are not
    # full, cost little beside the others.
    even = -(-sum(sizes) // (2 * len(sizes)))
    # XLA compiles the update of a single expert to code 50 times slower.
    self._size = max(2, min(cached, even))
    self._classes = classes
    # Every chunk has a class, and a first place in that class.
    of_class = [-(-size // self._size) for size in sizes]
    self._class = np.repeat(np.arange(len(sizes)), of_class)
    self._first = self._size * np.concatenate(
      [np.arange(number) for number in of_class]
    )
    # Unused places come last in their class, so a chunk has an expert if its
    # first place is used.
    num_used = jnp.stack(
      [jnp.sum(experts < num_experts) for experts in classes.experts]
    )
    used = jnp.asarray(self._first) < num_used[self._class]
    (self._used,) = jnp.nonzero(used, size=len(self._class))
    self.number = jnp.sum(used)

  def call(self, number: jax.Array, function: Callable[[_Chunk], Any]) -> Any:
    """Calls `function` with the chunk of this number, under `jit`.

    Classes have different rooms, so each has a branch of its own: the function
    is compiled once for each class, and its results have the same shapes.
    """
    number = self._used[number]
    branches = [
      functools.partial(self._call_in_class, function, *same_class)
      for same_class in zip(*self._classes, strict=True)
    ]
    return jax.lax.switch(
      jnp.asarray(self._class)[number],
      branches,
      jnp.asarray(self._first)[number],
    )

  def _call_in_class(self, function, experts, sources, first):
    """Calls `function` with the chunk that begins at `first` in its class."""
    missing = max(0, self._size - experts.size)
    experts = jnp.pad(experts, (0, missing))
    sources = jnp.pad(
      sources, ((0, missing), (0, 0)), constant_values=_NO_TOKEN
    )
    # The last chunk overlaps the one before, and must not update it again.
    start = jnp.minimum(first, experts.size - self._size)
    is_new = start + jnp.arange(self._size) >= first
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, self._size)
    return function(_Chunk(cut(experts), cut(sources), is_new))


def _over_all_tokens(
  factors: parameters.TableFactors, num_before: int
) -> list[_LayerFactors]:
  """Factors of the n-th layers of both streams, joined, for each n.

  The n-th layers of encoder and decoder become one layer over the tokens of
  both, the encoder's first, as the plan counts them: so each expert's tokens of
  both streams are gathered at once. Where a stream has no n-th layer, its
  tokens are zeros before, or out of range after, those of the other stream.

  Args:
    factors: stream -> factors [tokens of the stream, width] of its layers.
    num_before: how many tokens the encoder has.
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
