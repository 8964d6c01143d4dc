"""Tables of word experts stay in place on TPU and GPU, as their compilers tell.

The compilers run without the chips. Tables have the widths of mowe_base.

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


def check_temporaries(compiled, kernel_bytes):
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 0.1 * kernel_bytes
  assert not compiled_sizes.table_copies(compiled)


def test_products_read_rows_in_place(topology, dtype):
  check_temporaries(*compiled_sizes.compile_product(topology, dtype))


def test_updates_write_rows_in_place(topology, dtype):
  compiled, kernel_bytes, held = compiled_sizes.compile_update(topology, dtype)
  check_temporaries(compiled, kernel_bytes)
  # The tables and all state are aliased.
  assert compiled.memory_analysis().alias_size_in_bytes >= held
