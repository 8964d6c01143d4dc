"""Tests facts of programs compiled for this machine, and of lines of others."""

import jax
import jax.numpy as jnp
import numpy as np

from mowe.training import partitioning
from mowe.training.compiling import program_facts


def _compiled(function, shapes, **options):
  mesh = partitioning.make_mesh(data=4, expert=2)
  shapes = [
    jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=partitioning.batch_sharding(mesh)
    )
    for shape in shapes
  ]
  options['out_shardings'] = partitioning.replicated(mesh)
  return jax.jit(function, **options).lower(*shapes).compile()


def test_exchanges_between_devices():
  program = _compiled(
    lambda first, second: (first.sum(axis=0), second * 2), [(8, 96), (16, 32)]
  )
  assert program_facts.collectives(program.as_text()) == {
    'all-gather': (1, 16 * 32 * 4),
    'all-reduce': (1, 96 * 4),
  }


def test_memory_of_one_device():
  program = jax.jit(
    lambda state, batch: (state + batch.sum(), jnp.sin(batch)), donate_argnums=0
  ).lower(np.zeros((7, 11), np.float32), np.zeros((3, 5), np.float32))
  memory = program_facts.memory(program.compile())
  # The new state is written over the old one.
  assert memory.arguments == (7 * 11 + 3 * 5) * 4
  assert memory.results < memory.arguments
  assert memory.peak == sum(memory)


def test_lines_of_a_tpus_program():
  text = '\n'.join(
    [
      # The same exchange, written twice where it is overlapped.
      '  %all-gather.8 = bf16[4,448]{1,0} all-gather(%p.1), channel_id=86, x',
      '  %all-gather.9 = bf16[4,448]{1,0} all-gather(%p.2), channel_id=86, x',
      # The start has operands, results and two numbers of its own.
      '  %cp = (s32[13]{0}, s32[26]{0}, u32[], u32[]) '
      'collective-permute-start(%reshape), channel_id=1',
      '  %done = s32[26]{0} collective-permute-done(%cp)',
      '  %start = (f32[5]{0}, f32[9]{0}) all-reduce-start(%a, %b), channel_id=3',
      '  %sums = (f32[5]{0}, f32[9]{0}) all-reduce-done(%start)',
      '  ROOT %both = (f32[5]{0}, pred[8]{0}) all-reduce(%a, %b), channel_id=2',
      '  %copy.1 = f32[1024,3,2]{2,1,0} copy(%param.1)',
      '  %param.1 = f32[1024,3,2]{0,2,1} parameter(0)',
      '  %view = f32[2048,3]{1,0} transpose(%param.1)',
    ]
  )
  assert program_facts.collectives(text) == {
    'all-gather': (1, 4 * 448 * 2),
    'all-reduce': (2, (5 + 9) * 4 + 5 * 4 + 8),
    'collective-permute': (1, 26 * 4),
  }
  copies = program_facts.table_copies(text, {6 * 1024})
  assert [line.split()[0] for line in copies] == ['%copy.1', '%view']
  assert not program_facts.table_copies(text, {6 * 1023})
