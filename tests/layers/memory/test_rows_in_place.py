"""Reading and writing rows in parts equals indexing the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.memory import rows_in_place

# Each case has the shape of a row, the number of its parts if a part has up to
# 1,024 numbers, and whether a TPU keeps its axes in the other order.
CASES = [
  ((8, 128), 1, False),
  ((16, 128), 2, False),
  ((48, 64), 3, False),
  ((24, 100), 3, False),
  ((100, 24), 3, True),
  ((128, 40), 5, True),
  # A row of 20 x 128 cannot be cut into whole tiles.
  ((20, 128), 1, False),
  ((3, 5), 1, False),
]
NUM_ROWS = 7


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
  monkeypatch.setattr(rows_in_place, '_MOST_NUMBERS', 1024)


def make_table(shape, dtype=np.float32):
  rng = np.random.default_rng(0)
  if dtype == np.uint16:
    return rng.integers(0, 2**16, (NUM_ROWS, *shape), dtype)
  table = rng.normal(size=(NUM_ROWS, *shape)).astype(dtype)
  # Every number must come back with all its bits.
  table[2, 0, :2] = np.inf, -0.0
  return table


@pytest.mark.slow
@pytest.mark.parametrize(('shape', 'num_parts', 'is_turned'), CASES)
@pytest.mark.parametrize('dtype', [np.float32, np.uint16, jnp.bfloat16])
def test_parts_equal_indexing(shape, num_parts, is_turned, dtype):
  assert rows_in_place._num_parts(shape) == num_parts
  assert rows_in_place._is_turned(shape) == is_turned
  table = make_table(shape, dtype)
  rows = np.array([4, 0, 2, 4], np.int32)
  read = jax.jit(rows_in_place._read_parts)(table, rows)
  assert np.asarray(read).tobytes() == table[rows].tobytes()

  values = make_table(shape, dtype)[::-1][:4]
  rows = np.array([5, 2**31 - 1, 1, NUM_ROWS], np.int32)
  for write in (rows_in_place._write_parts, rows_in_place.write):
    written = jax.jit(write)(table, rows, values)
    expected = table.copy()
    expected[5], expected[1] = values[0], values[2]
    assert np.asarray(written).tobytes() == expected.tobytes()


def test_any_row_stands_for_one_beyond_the_table():
  table = jnp.asarray(make_table((16, 128)))
  rows = jnp.asarray([1, NUM_ROWS, 2**31 - 1], jnp.int32)
  for read in (rows_in_place._read_parts, rows_in_place.read):
    found = read(table, rows)
    np.testing.assert_array_equal(found[0], table[1])
    assert found.shape == (3, 16, 128) and np.isfinite(found[1:]).all()


@pytest.mark.parametrize('shape', [(), (9,)])
def test_states_of_optimizers_have_fewer_axes(shape):
  table = np.random.default_rng(0).normal(size=(NUM_ROWS, *shape))
  table = jnp.asarray(table, jnp.float32)
  rows = jnp.asarray([3, 0], jnp.int32)
  read = rows_in_place.read(table, rows)
  np.testing.assert_array_equal(read, table[rows])
  written = rows_in_place.write(table, rows, read + 1)
  np.testing.assert_array_equal(written, table.at[rows].add(1))


@pytest.mark.parametrize(
  ('row', 'axes'),
  [
    ((768, 408), (0, 2, 1)),
    ((408, 768), (0, 1, 2)),
    ((64, 88), (0, 1, 2)),
    # A part of a row for each of two blocks.
    ((2, 64), (1, 0, 2)),
    ((1, 33), (1, 0, 2)),
    ((1, 32), None),
    ((408,), (0, 1)),
    ((2,), None),
    ((), None),
  ],
)
def test_rows_are_never_along_the_last_axis(row, axes):
  assert rows_in_place.axes_in_memory((1000, *row)) == axes
