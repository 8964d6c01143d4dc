"""Tests experts that are drawn or read: equal in parts, and in little memory."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest

from mowe.stores import device_experts, expert_sources
from mowe.stores.row_files import expert_records, row_file, row_index
from mowe.training import manifests, train_state

_EXPERTS = 9
_SPEC = jax.sharding.PartitionSpec


def _abstract(dtype='float32', num_experts=_EXPERTS, width=3, sharding=None):
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  leaf = lambda shape, dtype: jax.ShapeDtypeStruct(
    (num_experts, *shape), dtype, sharding=sharding
  )
  kernel = 'uint16' if dtype == 'bfloat16' else dtype
  tables = {
    'experts': {
      'wi': leaf((2, width), kernel),
      'wo': leaf((width, 2), kernel),
    }
  }
  return tables, {'experts': {'counts': leaf((), 'int32')}}


def _save(folder, abstract, seed=0):
  """Writes a checkpoint of random experts; returns its folder and records."""
  dtype = expert_records.record_dtype(*abstract)
  rng = np.random.default_rng(seed)
  records = np.zeros(_EXPERTS, dtype)
  for name in dtype.names:
    shape = records[name].shape
    if dtype[name].base == np.uint16:
      values = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
      records[name] = values.view(np.uint16)
    elif dtype[name].base == np.int32:
      records[name] = rng.integers(0, 99, shape)
    else:
      records[name] = rng.normal(size=shape)
  folder.mkdir(exist_ok=True)
  file = row_file.RowFile(
    row_file.LockedFile(folder), row_index.RowIndex(dtype, _EXPERTS)
  )
  file.write(np.arange(_EXPERTS), records)
  checkpoint = folder / 'checkpoint_1'
  checkpoint.mkdir()
  file.save(checkpoint)
  (checkpoint / manifests.FILE_NAME).write_text('{}')
  file.close()
  return checkpoint, records


def _arrays(source, abstract, monkeypatch):
  # Two experts are read at a time, and the last chunk overlaps the one before.
  dtype = expert_records.record_dtype(*abstract)
  monkeypatch.setattr(expert_sources, '_CHUNK_BYTES', 2 * dtype.itemsize)
  return source.arrays(abstract)


def test_arrays_and_back(tmp_path, monkeypatch):
  abstract = _abstract()
  checkpoint, records = _save(tmp_path, abstract)
  source = expert_sources.SavedExperts(checkpoint)
  tables, state = _arrays(source, abstract, monkeypatch)
  for name in ('wi', 'wo'):
    np.testing.assert_array_equal(
      tables['experts'][name], records[f'kernels/experts/{name}']
    )
  np.testing.assert_array_equal(
    state['experts']['counts'], records['state/experts/counts']
  )
  back = expert_records.from_arrays(
    records.dtype, *jax.device_get((tables, state))
  )
  assert back.tobytes() == records.tobytes()


def test_kernels_alone_begin_with_a_fresh_state(tmp_path, monkeypatch):
  abstract = _abstract()
  checkpoint, records = _save(tmp_path, abstract)
  source = expert_sources.SavedExperts(checkpoint, kernels_only=True)
  tables, state = _arrays(source, abstract, monkeypatch)
  np.testing.assert_array_equal(
    tables['experts']['wi'], records['kernels/experts/wi']
  )
  assert not np.any(state['experts']['counts'])


@pytest.mark.parametrize('there', ['float32', 'bfloat16'])
def test_other_precision(tmp_path, monkeypatch, there):
  here = 'bfloat16' if there == 'float32' else 'float32'
  checkpoint, records = _save(tmp_path, _abstract(there))
  source = expert_sources.SavedExperts(checkpoint, kernels_only=True)
  tables, _ = _arrays(source, _abstract(here), monkeypatch)
  old, new = records['kernels/experts/wo'], np.asarray(tables['experts']['wo'])
  if there == 'float32':
    expected = old.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(new.view(ml_dtypes.bfloat16), expected)
  else:
    expected = old.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize('mesh_shape', [(1, 3), (2, 3), (2, 1)])
def test_onto_several_devices_and_back(tmp_path, monkeypatch, mesh_shape):
  size = int(np.prod(mesh_shape))
  if jax.device_count() < size:
    pytest.skip(f'needs {size} devices')
  mesh = jax.make_mesh(
    mesh_shape,
    ('data', 'expert'),
    (jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:size],
  )
  sharding = jax.sharding.NamedSharding(mesh, _SPEC('expert'))
  checkpoint, records = _save(tmp_path / 'one', _abstract())
  abstract = _abstract(sharding=sharding)
  source = expert_sources.SavedExperts(checkpoint)
  tables, state = _arrays(source, abstract, monkeypatch)
  assert tables['experts']['wi'].sharding == sharding
  (tmp_path / 'many' / 'checkpoint_1').mkdir(parents=True)
  file = row_file.RowFile(
    row_file.LockedFile(tmp_path / 'many'),
    row_index.RowIndex(records.dtype, _EXPERTS),
  )
  experts = device_experts.DeviceExperts(file, abstract, True, False)
  whole = train_state.TrainState(0, {}, {}, tables, state)
  experts.save(tmp_path / 'many' / 'checkpoint_1', whole)
  experts.close()
  again = expert_sources.SavedExperts(tmp_path / 'many' / 'checkpoint_1')
  back = again.read(np.arange(_EXPERTS), records.dtype)
  assert back.tobytes() == records.tobytes()


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'width': 4}, 'kernels/experts/wi: (2, 3) there, (2, 4) here'),
    ({'num_experts': 10}, 'experts: 9 there, 10 here'),
  ],
)
def test_experts_of_another_model(tmp_path, changes, said):
  checkpoint, _ = _save(tmp_path, _abstract())
  source = expert_sources.SavedExperts(checkpoint)
  with pytest.raises(
    ValueError,
    match='must hold the experts of this model and row optimizer, but differs '
    f'in {re.escape(said)}.* Build the model with',
  ):
    source.arrays(_abstract(**changes))


def test_a_checkpoint_without_experts(tmp_path):
  with pytest.raises(ValueError, match='must hold word experts, but has none'):
    expert_sources.SavedExperts(tmp_path)


def test_state_of_another_row_optimizer(tmp_path):
  checkpoint, _ = _save(tmp_path, _abstract())
  tables, state = _abstract()
  state['experts']['mu'] = state['experts'].pop('counts')
  with pytest.raises(ValueError, match='state/experts/mu: absent there'):
    expert_sources.SavedExperts(checkpoint).check((tables, state))


@pytest.mark.slow
def test_a_table_is_saved_and_restored_in_little_more_memory_than_it_has(
  tmp_path,
):
  """The process may grow by the table and some buffers of 16 MiB.

  There are about ten of them, one or two more if threads wait for a core.
  """
  program = """
    import pathlib, re, sys
    import jax, jax.numpy as jnp
    from mowe.training import manifests, train_state
    from mowe.stores import device_experts, expert_sources
    from mowe.stores.row_files import expert_records, row_file, row_index
    folder, action = pathlib.Path(sys.argv[1]), sys.argv[2]
    experts = 100_000  # An expert has 8 KiB.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((experts, 2048), 'float32', sharding=device)
    abstract = {'experts': {'wi': leaf}}, {}
    dtype = expert_records.record_dtype(*abstract)
    checkpoint = folder / 'checkpoint_1'
    # Not ru_maxrss, which begins with what the parent process has.
    status = pathlib.Path('/proc/self/status')
    peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) / 1024
    jnp.zeros(3).block_until_ready()
    if action == 'save':
      make = jax.jit(lambda: jnp.arange(experts * 2048.0).reshape(experts, -1))
      tables = {'experts': {'wi': make().block_until_ready()}}
      before = peak()
      file = row_file.RowFile(row_file.LockedFile(folder), row_index.RowIndex(dtype, experts))
      store = device_experts.DeviceExperts(file, abstract, True, False)
      checkpoint.mkdir()
      store.save(checkpoint, train_state.TrainState(0, {}, {}, tables, {}))
      (checkpoint / manifests.FILE_NAME).write_text('{}')
      print(peak() - before)
    else:
      before = peak()
      source = expert_sources.SavedExperts(checkpoint)
      tables, _ = source.arrays(abstract)
      tables['experts']['wi'].block_until_ready()
      print(peak() - before)
      assert float(tables['experts']['wi'][-1, -1]) > 2e8
  """
  if not pathlib.Path('/proc/self/status').exists():
    pytest.skip('needs /proc for the peak of memory')
  table_mib = 100_000 * 8 / 1024
  grown = {}
  for action in ('save', 'restore'):
    run = subprocess.run(
      [sys.executable, '-c', textwrap.dedent(program), tmp_path, action],
      capture_output=True,
      text=True,
      timeout=200,
      # Each thread would keep freed buffers of its own.
      env=os.environ | {'MALLOC_ARENA_MAX': '1'},
    )
    assert run.returncode == 0, run.stderr
    # A slow restore also prints its progress, so only the last word counts.
    grown[action] = float(run.stdout.split()[-1])
  buffers = 14 * 16
  assert grown['save'] < buffers
  # Restoring makes the table, so that counts as well.
  assert 0.9 * table_mib < grown['restore'] < table_mib + buffers
