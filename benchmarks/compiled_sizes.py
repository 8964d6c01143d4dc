"""Compiles the work on word experts' tables for chips that are not there.

  pip install '.[compile]'
  JAX_PLATFORMS=cpu python -m benchmarks.compiled_sizes

Tables have the widths of mowe_base and an eighth of its experts. It prints what
memory a product with its gradient, and an update, need besides their arguments,
relative to one kernel's table. A copy of a table would make that at least 1.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from mowe.layers import platforms
from mowe.layers.memory import grouped
from mowe.training.compiling import compile_ahead, program_facts
from mowe.training.optimization import row_optimizers, table_updates
from mowe.words.plans import batch_plans

_CHIPS = ('v5e:2x2', 'v5p:2x2x1', 'h100:1x1x1')
_DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.uint16}
_NUM_EXPERTS, _EMBED, _EXPERT_DIM, _NUM_TOKENS = 4096, 768, 408, 2048


def _shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def _plan() -> batch_plans.ExpertPlan:
  rng = np.random.default_rng(0)
  ids = rng.integers(0, _NUM_EXPERTS, (8, _NUM_TOKENS // 8), np.int32)
  ids = {'encoder': ids}
  (profile, *_) = batch_plans.profile_ladder([ids], _NUM_EXPERTS)
  return batch_plans.make_plan(ids, profile, _NUM_EXPERTS)


def compile_product(
  topology: str, dtype: str
) -> tuple[jax.stages.Compiled, int]:
  """A product of tokens with their experts' kernels, and its gradient.

  Args:
    topology: the chip, see `compile_ahead.Topology`.
    dtype: 'float32' or 'bfloat16', the dtype of the table.

  Returns:
    The compiled program, and the bytes of the table.
  """
  table = _shape(_NUM_EXPERTS, _EMBED, _EXPERT_DIM, dtype=_DTYPES[dtype])
  tokens = _shape(_NUM_TOKENS, _EMBED, dtype=jnp.bfloat16)
  outputs = _shape(_NUM_TOKENS, _EXPERT_DIM, dtype=jnp.bfloat16)

  def step(tokens, table, plan, cotangents):
    zeros = grouped.Factors(jnp.zeros_like(tokens), jnp.zeros_like(cotangents))
    product = lambda tokens, factors: grouped.expert_product(
      tokens, table, plan, factors
    )
    value, backward = jax.vjp(product, tokens, zeros)
    return value, backward(cotangents)

  arguments = (tokens, table, _plan().encoder, outputs)
  return _compile(step, topology, arguments), table.size * table.dtype.itemsize


def compile_update(
  topology: str, dtype: str
) -> tuple[jax.stages.Compiled, int, int]:
  """An update of the experts of a batch by Adafactor.

  Args:
    topology: the chip, see `compile_ahead.Topology`.
    dtype: 'float32' or 'bfloat16', the dtype of the tables.

  Returns:
    The compiled program, the bytes of one kernel's table, and the bytes of all
    tables and of the optimizer's state, which are donated.
  """
  optimizer = row_optimizers.RowAdafactor(1e-2)
  outwards = _shape(_NUM_EXPERTS, _EMBED, _EXPERT_DIM, dtype=_DTYPES[dtype])
  inwards = _shape(_NUM_EXPERTS, _EXPERT_DIM, _EMBED, dtype=_DTYPES[dtype])
  table = {'wi_0': outwards, 'wo': inwards}
  state = jax.eval_shape(optimizer.init, table)
  factors_of = lambda kernel: grouped.Factors(
    *(
      _shape(_NUM_TOKENS, width, dtype=jnp.bfloat16)
      for width in kernel.shape[1:]
    )
  )
  factors = {'encoder': [{name: factors_of(k) for name, k in table.items()}]}

  def update(table, state, factors, plan, key):
    rows = table_updates.update_table(
      optimizer,
      table_updates.TableAndState(table, state),
      factors=factors,
      plan=plan,
      step=table_updates.StepValues(True, jnp.int32(0), key),
    )
    return rows.table, rows.state

  key = jax.eval_shape(lambda: jax.random.key(0))
  arguments = (table, state, factors, _plan(), key)
  compiled = _compile(update, topology, arguments, donate_argnums=(0, 1))
  num_bytes = lambda tree: sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )
  return compiled, num_bytes(outwards), num_bytes((table, state))


def table_copies(compiled: jax.stages.Compiled) -> list[str]:
  """Returns the instructions that make an array as large as a table."""
  size = _NUM_EXPERTS * _EMBED * _EXPERT_DIM
  return program_facts.table_copies(compiled.as_text(), {size})


def _compile(function, topology, arguments, **options):
  topology = compile_ahead.Topology.parse(topology)
  (device, *_) = topology.devices()
  sharding = jax.sharding.SingleDeviceSharding(device)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    arguments,
  )
  with platforms.compiling_for(topology.chip.platform):
    lowered = jax.jit(function, **options).lower(*arguments)
  return lowered.compile(compiler_options=topology.compiler_options)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--topologies', nargs='+', default=_CHIPS)
  options = parser.parse_args()
  num_copies, ratios = 0, []
  for topology in options.topologies:
    for dtype in _DTYPES:
      for compile_piece in (compile_product, compile_update):
        compiled, kernel_bytes, *_ = compile_piece(topology, dtype)
        num_copies += len(table_copies(compiled))
        temporary = compiled.memory_analysis().temp_size_in_bytes
        ratios.append(temporary / kernel_bytes)
        name = compile_piece.__name__.removeprefix('compile_')
        print(
          f'{topology:10} {dtype:9} {name:8} one table '
          f'{kernel_bytes / 2**20:7,.0f} MiB, temporaries '
          f'{temporary / 2**20:6,.1f} MiB'
        )
  print(f'table_copies={num_copies} worst_temp_ratio={max(ratios):.3f}')


if __name__ == '__main__':
  main()
