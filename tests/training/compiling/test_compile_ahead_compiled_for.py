"""Compiles for every chip that `chips` names, without one."""

import jax
import jax.numpy as jnp
import pytest

from mowe.training import partitioning
from mowe.training.compiling import compile_ahead, program_facts

pytest.importorskip('libtpu', reason="needs pip install '.[compile]'")
pytest.importorskip(
  'jax_cuda13_plugin', reason="needs pip install '.[compile]'"
)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'h100:1x1x4', 'h200:1x1x4',
   'a100:1x1x4', 'v5e:1x1'],
)  # fmt: skip
def test_a_sum_over_devices(name):
  topology = compile_ahead.Topology.parse(name)
  mesh = partitioning.make_mesh(devices=topology.devices())
  rows = jax.ShapeDtypeStruct(
    (64, 256), jnp.float32, sharding=partitioning.batch_sharding(mesh)
  )
  total = jax.jit(
    lambda rows: rows.sum(axis=0), out_shardings=partitioning.replicated(mesh)
  )
  program = total.lower(rows).compile(
    compiler_options=topology.compiler_options
  )
  assert program_facts.memory(program).arguments == 64 * 256 * 4 // mesh.size
  exchanges = program_facts.collectives(program.as_text())
  expected = {'all-reduce': (1, 256 * 4)} if mesh.size > 1 else {}
  assert exchanges == expected


def test_a_slice_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match='refuses v5e:3x3.*both first numbers'):
    compile_ahead.Topology.parse('v5e:3x3').devices()
