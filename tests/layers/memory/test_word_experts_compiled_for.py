"""Tables of word experts stay in place on a TPU, as its own compiler tells.

Tables have the widths of mowe_base and an eighth of its experts. The compiler
runs without a TPU.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('libtpu', reason='needs pip install "jax[tpu]"')

from mowe.layers.memory import grouped
from mowe.training import compile_ahead
from mowe.training.optimization import row_optimizers, table_updates
from mowe.words import batch_plans

NUM_EXPERTS, EMBED, EXPERT_DIM, NUM_TOKENS = 4096, 768, 408, 2048
CHIPS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1'}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.uint16}


@pytest.fixture(params=CHIPS)
def on_chip(request):
  """Gives shapes and arrays a place on one chip."""
  (device, *_) = compile_ahead.tpu_devices(CHIPS[request.param])
  sharding = jax.sharding.SingleDeviceSharding(device)
  return lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def make_plan():
  ids = np.random.default_rng(0).integers(0, NUM_EXPERTS, (8, NUM_TOKENS // 8))
  ids = {'encoder': ids.astype(np.int32)}
  (profile, *_) = batch_plans.profile_ladder([ids], NUM_EXPERTS)
  return batch_plans.make_plan(ids, profile, NUM_EXPERTS)


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def check_in_place(compiled, kernel_bytes):
  """Temporaries are few, and no instruction makes an array of table's size."""
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < 0.1 * kernel_bytes
  # A view has another shape, but as many numbers.
  size = NUM_EXPERTS * EMBED * EXPERT_DIM
  allowed = {'parameter', 'scatter', 'bitcast', 'get-tuple-element', 'fusion'}
  for line in compiled.as_text().splitlines():
    found = re.search(r'= \w+\[([\d,]+)\]\S* ([\w-]+)\(', line)
    if found and np.prod([int(x) for x in found[1].split(',')]) == size:
      assert found[2] in allowed, line.strip()[:200]
  return memory


@pytest.mark.slow
@pytest.mark.parametrize('dtype', DTYPES)
def test_products_read_rows_in_place(on_chip, dtype):
  plan = make_plan().encoder
  table = shape(NUM_EXPERTS, EMBED, EXPERT_DIM, dtype=DTYPES[dtype])
  tokens = shape(NUM_TOKENS, EMBED, dtype=jnp.bfloat16)
  outputs = shape(NUM_TOKENS, EXPERT_DIM, dtype=jnp.bfloat16)

  def step(tokens, table, plan, cotangents):
    zeros = grouped.Factors(jnp.zeros_like(tokens), jnp.zeros_like(cotangents))
    product = lambda tokens, factors: grouped.expert_product(
      tokens, table, plan, factors
    )
    value, backward = jax.vjp(product, tokens, zeros)
    return value, backward(cotangents)

  arguments = on_chip((tokens, table, plan, outputs))
  compiled = jax.jit(step).lower(*arguments).compile()
  check_in_place(compiled, table.size * table.dtype.itemsize)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', DTYPES)
def test_updates_write_rows_in_place(on_chip, dtype):
  plan = make_plan()
  optimizer = row_optimizers.RowAdafactor(1e-2)
  outwards = shape(NUM_EXPERTS, EMBED, EXPERT_DIM, dtype=DTYPES[dtype])
  inwards = shape(NUM_EXPERTS, EXPERT_DIM, EMBED, dtype=DTYPES[dtype])
  table = {'wi_0': outwards, 'wo': inwards}
  state = jax.eval_shape(optimizer.init, table)
  factors = {
    'encoder': [
      {
        name: grouped.Factors(
          shape(NUM_TOKENS, kernel.shape[1], dtype=jnp.bfloat16),
          shape(NUM_TOKENS, kernel.shape[2], dtype=jnp.bfloat16),
        )
        for name, kernel in table.items()
      }
    ]
  }

  def update(table, state, factors, plan, key):
    rows = table_updates.update_table(
      optimizer, table, state, factors, plan, True, jnp.int32(0), key
    )
    return rows.table, rows.state

  key = jax.eval_shape(lambda: jax.random.key(0))
  arguments = on_chip((table, state, factors, plan, key))
  compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile()
  kernel_bytes = outwards.size * outwards.dtype.itemsize
  memory = check_in_place(compiled, kernel_bytes)
  # The tables and all state are aliased.
  leaves = jax.tree.leaves((table, state))
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  assert memory.alias_size_in_bytes >= held
