"""Tables stay in place on TPU and GPU, as their compilers tell.

The compilers run without the chips. Tables of word experts have the widths of
mowe_base, or narrow ones; the rows of a memory are vectors.

Also tests `platforms`.
"""

import pytest

pytest.importorskip('libtpu', reason="needs pip install '.[compile]'")
pytest.importorskip(
  'jax_cuda13_plugin', reason="needs pip install '.[compile]'"
)

from benchmarks import compiled_sizes

pytestmark = [
  pytest.mark.slow,
  pytest.mark.parametrize('dtype', ['float32', 'bfloat16']),
  pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'h100:1x1x1']),
]


def check_temporaries(compiled):
  temporary = compiled.program.memory_analysis().temp_size_in_bytes
  assert temporary < 0.1 * compiled.table_bytes
  assert not compiled_sizes.table_copies(compiled)


def check_aliased(compiled):
  """The tables and all state are written in their place."""
  memory = compiled.program.memory_analysis()
  assert memory.alias_size_in_bytes >= compiled.held_bytes


@pytest.mark.parametrize('experts', list(compiled_sizes.EXPERTS))
def test_products_read_rows_in_place(topology, dtype, experts):
  check_temporaries(
    compiled_sizes.compile_product(
      topology, dtype, compiled_sizes.EXPERTS[experts]
    )
  )


@pytest.mark.parametrize('experts', list(compiled_sizes.EXPERTS))
def test_updates_write_rows_in_place(topology, dtype, experts):
  compiled = compiled_sizes.compile_update(
    topology, dtype, compiled_sizes.EXPERTS[experts]
  )
  check_temporaries(compiled)
  check_aliased(compiled)


def test_rows_of_a_memory_are_read_and_written_in_place(topology, dtype):
  compiled = compiled_sizes.compile_memory(topology, dtype)
  check_temporaries(compiled)
  check_aliased(compiled)
