"""Compiles the work on tables for chips that are not there.

  pip install '.[compile]'
  JAX_PLATFORMS=cpu python -m benchmarks.compiled_sizes

Tables of word experts have the widths of mowe_base and an eighth of its
experts, or narrow ones; the rows of a memory are vectors. It prints what memory
a product with its gradient, and an update, need besides their arguments,
relative to one kernel's table. A copy of a table would make that at least 1.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers import platforms
from mowe.layers.memory import grouped, row_table
from mowe.training import table_layouts
from mowe.training.compiling import compile_ahead, program_facts
from mowe.training.optimization import (
  memory_rows,
  row_optimizers,
  table_updates,
  vector_row_optimizers,
)
from mowe.words.plans import batch_plans, row_plans, step_plans

_CHIPS = ('v5e:2x2', 'v5p:2x2x1', 'h100:1x1x1')
_DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.uint16}
_NUM_TOKENS = 2048


class Experts(NamedTuple):
  """The sizes of a table of word experts."""

  number: int
  embed_dim: int
  expert_dim: int


# The widths of mowe_base, and widths of which none is a multiple of 128.
EXPERTS = {'base': Experts(4096, 768, 408), 'narrow': Experts(32768, 64, 88)}
# Rows, and blocks that read a row, each a part of 64 numbers.
_MEMORY_ROWS, _MEMORY_PARTS, _MEMORY_DIM = 2**18, 2, 64


def _shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def _plan(num_experts: int) -> batch_plans.ExpertPlan:
  rng = np.random.default_rng(0)
  ids = rng.integers(0, num_experts, (8, _NUM_TOKENS // 8), np.int32)
  ids = {'encoder': ids}
  (profile, *_) = batch_plans.profile_ladder([ids], num_experts)
  return batch_plans.make_plan(ids, profile, num_experts)


class Compiled(NamedTuple):
  """Work on a table that was compiled for a chip.

  Attributes:
    program: the compiled program.
    table_bytes: the bytes of one kernel's table.
    held_bytes: the bytes of all tables and states that are donated.
    table_size: how many numbers one kernel's table has.
  """

  program: jax.stages.Compiled
  table_bytes: int
  held_bytes: int
  table_size: int


def compile_product(topology: str, dtype: str, experts: Experts) -> Compiled:
  """A product of tokens with their experts' kernels, and its gradient.

  Args:
    topology: the chip, see `compile_ahead.Topology`.
    dtype: 'float32' or 'bfloat16', the dtype of the table.
    experts: the sizes of the table.
  """
  table = _shape(*experts, dtype=_DTYPES[dtype])
  tokens = _shape(_NUM_TOKENS, experts.embed_dim, dtype=jnp.bfloat16)
  outputs = _shape(_NUM_TOKENS, experts.expert_dim, dtype=jnp.bfloat16)

  def step(table, tokens, plan, cotangents):
    zeros = grouped.Factors(jnp.zeros_like(tokens), jnp.zeros_like(cotangents))
    product = lambda tokens, factors: grouped.expert_product(
      tokens, table, plan, factors
    )
    value, backward = jax.vjp(product, tokens, zeros)
    return value, backward(cotangents)

  others = tokens, _plan(experts.number).encoder, outputs
  program = _compile(step, topology, table, others, is_update=False)
  return Compiled(program, _num_bytes(table), 0, table.size)


def compile_update(topology: str, dtype: str, experts: Experts) -> Compiled:
  """An update of the experts of a batch by Adafactor.

  Arguments are those of `compile_product`.
  """
  optimizer = row_optimizers.RowAdafactor(1e-2)
  num_experts, embed_dim, expert_dim = experts
  outwards = _shape(*experts, dtype=_DTYPES[dtype])
  inwards = _shape(num_experts, expert_dim, embed_dim, dtype=_DTYPES[dtype])
  table = {'wi_0': outwards, 'wo': inwards}
  state = jax.eval_shape(optimizer.init, table)
  factors_of = lambda kernel: grouped.Factors(
    *(
      _shape(_NUM_TOKENS, width, dtype=jnp.bfloat16)
      for width in kernel.shape[1:]
    )
  )
  factors = {'encoder': [{name: factors_of(k) for name, k in table.items()}]}

  def update(rows, factors, plan, key):
    return table_updates.update_table(
      optimizer,
      rows,
      factors=factors,
      plan=plan,
      step=table_updates.StepValues(True, jnp.int32(0), key),
    )

  rows = table_updates.TableAndState(table, state)
  others = factors, _plan(num_experts), _key()
  program = _compile(update, topology, rows, others, is_update=True)
  return Compiled(
    program, _num_bytes(outwards), _num_bytes(rows), outwards.size
  )


def compile_memory(topology: str, dtype: str) -> Compiled:
  """Reading and updating the rows of a memory that a batch names.

  Args:
    topology: the chip, see `compile_ahead.Topology`.
    dtype: 'float32' or 'bfloat16', the dtype of the table.
  """
  optimizer = vector_row_optimizers.RowScalarAdam(1e-3)
  shape = _MEMORY_ROWS, _MEMORY_PARTS, _MEMORY_DIM
  table = {row_table.ROWS: _shape(*shape, dtype=_DTYPES[dtype])}
  rows = table_updates.TableAndState(
    table, jax.eval_shape(optimizer.init, table)
  )
  some = _shape(_NUM_TOKENS, *shape[1:])

  def step(rows, numbers, wanted, key):
    plan = step_plans.StepPlan(
      None, {'memory': row_plans.RowsPlan(numbers, {})}
    )
    tables = {'memory': rows.table}
    loss = lambda gathered: jnp.sum(jnp.tanh(gathered - wanted) ** 2)
    gathered = memory_rows.gather(tables, plan)['memory'][row_table.ROWS]
    return memory_rows.update(
      optimizer,
      rows,
      gradients={row_table.ROWS: jax.grad(loss)(gathered)},
      plan=plan.memories['memory'],
      step=table_updates.StepValues(True, jnp.int32(0), key),
    )

  others = _shape(_NUM_TOKENS, dtype=jnp.int32), some, _key()
  program = _compile(step, topology, rows, others, is_update=True)
  (leaf,) = table.values()
  return Compiled(program, _num_bytes(leaf), _num_bytes(rows), leaf.size)


def table_copies(compiled: Compiled) -> list[str]:
  """Returns the instructions that make an array as large as a table."""
  return program_facts.table_copies(
    compiled.program.as_text(), {compiled.table_size}
  )


def _key():
  return jax.eval_shape(lambda: jax.random.key(0))


def _num_bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _compile(function, topology, tables, others, *, is_update):
  """Compiles a function of tables, which it returns if it updates them."""
  topology = compile_ahead.Topology.parse(topology)
  (device, *_) = topology.devices()
  sharding = jax.sharding.SingleDeviceSharding(device)
  others = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), others
  )
  with platforms.compiling_for(topology.chip.platform):
    tables = jax.tree.map(lambda x: table_layouts.laid_out(x, sharding), tables)
    options = {}
    if is_update:
      options['donate_argnums'] = 0
      options['out_shardings'] = table_layouts.formats(tables)
    lowered = jax.jit(function, **options).lower(tables, *others)
  return lowered.compile(compiler_options=topology.compiler_options)


def _pieces(topology: str, dtype: str) -> Iterator[tuple[str, Compiled]]:
  for name, experts in EXPERTS.items():
    yield f'product, {name}', compile_product(topology, dtype, experts)
    yield f'update, {name}', compile_update(topology, dtype, experts)
  yield 'memory', compile_memory(topology, dtype)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--topologies', nargs='+', default=_CHIPS)
  options = parser.parse_args()
  num_copies, ratios = 0, []
  for topology in options.topologies:
    for dtype in _DTYPES:
      for name, compiled in _pieces(topology, dtype):
        num_copies += len(table_copies(compiled))
        temporary = compiled.program.memory_analysis().temp_size_in_bytes
        ratios.append(temporary / compiled.table_bytes)
        print(
          f'{topology:10} {dtype:9} {name:15} one table '
          f'{compiled.table_bytes / 2**20:7,.0f} MiB, temporaries '
          f'{temporary / 2**20:6,.1f} MiB'
        )
  print(f'table_copies={num_copies} worst_temp_ratio={max(ratios):.3f}')


if __name__ == '__main__':
  main()
