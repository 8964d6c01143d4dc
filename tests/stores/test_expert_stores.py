"""Tests that all stores end with the same bits, even if they take turns.

Also tests `backings`, `cached_experts`, `device_experts`, `expert_metrics`,
`kernel_cache`, `no_experts`, and `slot_rows`.
"""

import functools

import jax
import numpy as np
import pytest
import tiny_training

from mowe.layers.memory import word_experts
from mowe.models import threefry
from mowe.models.t5 import t5
from mowe.stores import expert_sources, expert_stores
from mowe.stores.row_files import expert_records, row_file, row_index
from mowe.training import manifests, partitioning, training_step
from mowe.training.optimization import optimizers, row_optimizers
from mowe.words.plans import step_plans

_STEPS = 6
_ROW_OPTIMIZER = row_optimizers.RowAdam(0.1, weight_decay=0.1)
_OPTIMIZER = optimizers.AdamW(1e-2).build(None)
_STORES = {
  'device': expert_stores.DeviceStore(),
  # Each batch has up to 6 experts, so these slots are reused.
  'host': expert_stores.HostStore(num_slots=8),
  'disk': expert_stores.DiskStore(num_slots=7),
}


def _config(table_dtype):
  return tiny_training.make_config(
    sparse_feed_forward=functools.partial(
      word_experts.MoweLayer, tiny_training.EXPERTS, 4, table_dtype=table_dtype
    )
  )


def _batches(first, last):
  """In every batch other experts are absent."""
  for number in range(first, last):
    absent = [(number * 5 + i) % tiny_training.EXPERTS for i in range(6)]
    batch = tiny_training.make_batch(number, absent=absent)
    yield batch, tiny_training.make_plan(batch).experts


@functools.cache
def _step(table_dtype, num_slots, is_trained):
  config = _config(table_dtype)
  if num_slots is not None:
    config = config.with_layer_changes(num_slots=num_slots)
  function = training_step.make_train_step(
    t5.T5(config),
    optimizer=_OPTIMIZER,
    row_optimizer=_ROW_OPTIMIZER if is_trained else None,
    loss=training_step.LossConfig(),
    seed=0,
  )
  return jax.jit(function, donate_argnums=0)


class _Run:
  """A run in a folder, from fresh parameters or from its last checkpoint."""

  def __init__(self, folder, store, table_dtype='float32', is_trained=True):
    self.folder, self._dtype = folder, table_dtype
    self._is_trained = is_trained
    model = t5.T5(_config(table_dtype))
    state = tiny_training.make_state(
      model, _OPTIMIZER, _ROW_OPTIMIZER if is_trained else None
    )
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      (state.tables, state.table_state),
    )
    self.dtype = expert_records.record_dtype(*abstract)
    saved = sorted(folder.glob('checkpoint_*'))
    if saved:
      source = expert_sources.SavedExperts(saved[-1], model=model)
      index = source.index
      params = np.load(saved[-1] / 'params.npz', allow_pickle=True)
      leaves = [params[name] for name in sorted(params.files)]
      rest = state.replace(tables={}, table_state={})
      rest = jax.tree.unflatten(
        jax.tree.structure(rest), [jax.numpy.asarray(x) for x in leaves]
      )
    else:
      source = expert_sources.FreshExperts(model, threefry.key(0), abstract[0])
      index = row_index.RowIndex(
        self.dtype, tiny_training.EXPERTS, fresh_key=source.fresh_key
      )
      rest = state
    self.experts = store.open(
      row_file.RowFile(row_file.LockedFile(folder), index, source.fresh),
      abstract,
      is_trained=is_trained,
      is_resumed=bool(saved),
      experts_at_once=3,
    )
    tables, table_state = self.experts.start(source)
    self.state = rest.replace(tables=tables, table_state=table_state)

  def train(self, last):
    first = int(self.state.step)
    function = _step(self._dtype, self.experts.num_slots, self._is_trained)
    values = []
    for batch, fed in self.experts.feed(_batches(first, last)):
      self.state, frozen, plan = self.experts.ready(self.state, fed)
      plan = step_plans.StepPlan(plan, {})
      self.state, _ = function(self.state, frozen, batch, plan)
      values.append(self.experts.metrics())
    return values

  def save(self):
    path = self.folder / f'checkpoint_{int(self.state.step)}'
    path.mkdir()
    self.experts.save(path, self.state)
    rest = jax.tree.leaves(self.state.replace(tables={}, table_state={}))
    np.savez(
      path / 'params.npz',
      **{f'{i:03}': np.asarray(x) for i, x in enumerate(rest)},
    )
    (path / manifests.FILE_NAME).write_text('{}')
    return path

  def close(self):
    self.experts.close()


def _outcome(path):
  """All experts and ordinary parameters of a checkpoint, as bytes."""
  index = row_index.RowIndex.load(path)
  kernel = index.dtype['kernels/experts/wo'].base
  table_dtype = 'float32' if kernel == np.float32 else 'bfloat16'
  source = expert_sources.SavedExperts(path, model=t5.T5(_config(table_dtype)))
  records = source.read(np.arange(tiny_training.EXPERTS))
  source.close()
  with np.load(path / 'params.npz') as params:
    rest = [params[name].tobytes() for name in sorted(params.files)]
  return records, rest


def _assert_same(actual, expected):
  for name in expected[0].dtype.names:
    np.testing.assert_array_equal(
      actual[0][name], expected[0][name], err_msg=name
    )
  assert actual[0].tobytes() == expected[0].tobytes()
  assert actual[1] == expected[1]


@pytest.fixture(scope='module')
def on_device(tmp_path_factory):
  """For each dtype, the outcome of a run with all experts on the device."""

  @functools.cache
  def outcome(table_dtype):
    run = _Run(
      tmp_path_factory.mktemp(table_dtype), _STORES['device'], table_dtype
    )
    run.train(_STEPS)
    path = run.save()
    run.close()
    return _outcome(path)

  return outcome


@pytest.mark.slow
@pytest.mark.parametrize(
  'store, table_dtype', [('host', 'float32'), ('disk', 'bfloat16')]
)
def test_same_bits_as_on_the_device(tmp_path, on_device, store, table_dtype):
  run = _Run(tmp_path, _STORES[store], table_dtype)
  values = run.train(_STEPS)
  path = run.save()
  run.close()
  expected = on_device(table_dtype)
  _assert_same(_outcome(path), expected)
  # Training has changed experts. Some of them were in slots already, and others
  # were moved.
  counts = expected[0]['state/experts/counts']
  assert counts.max() > 1
  assert any(0 < one['experts/hit_rate'].total for one in values)
  assert values[-1]['experts/moved_mb'].total > 0


@pytest.mark.slow
@pytest.mark.parametrize(
  'stores', [('device', 'disk', 'host'), ('disk', 'host', 'device')]
)
def test_stores_continue_each_other(tmp_path, on_device, stores):
  for number, store in enumerate(stores):
    run = _Run(tmp_path, _STORES[store])
    run.train(2 * number + 1)
    # This step was not saved, so it is lost and done again.
    if number == 1:
      run.close()
      run = _Run(tmp_path, _STORES[store])
    run.train(2 * number + 2)
    # An evaluation in between must change nothing.
    run.experts.tables(run.state)
    path = run.save()
    run.close()
  _assert_same(_outcome(path), on_device('float32'))


@pytest.mark.slow
@pytest.mark.parametrize('store', list(_STORES))
def test_frozen_experts_have_no_state_and_stay(tmp_path, store):
  run = _Run(tmp_path, _STORES[store], is_trained=False)
  run.train(4)
  path = run.save()
  run.close()
  records, _ = _outcome(path)
  assert not any(name.startswith('state/') for name in records.dtype.names)
  fresh = expert_sources.FreshExperts(
    t5.T5(_config('float32')),
    threefry.key(0),
    expert_records.abstract_tables(run.dtype),
  ).read(np.arange(tiny_training.EXPERTS), run.dtype)
  assert records.tobytes() == fresh.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize('store', ['host', 'disk'])
def test_evaluations_read_the_present_experts(tmp_path, store):
  run = _Run(tmp_path, _STORES[store])
  expected = (
    _Run(tmp_path.parent / f'{tmp_path.name}_device', _STORES['device'])
    if (tmp_path.parent / f'{tmp_path.name}_device').mkdir() is None
    else None
  )
  for last in (1, 3):
    run.train(last)
    expected.train(last)
    assert run.experts.tables(run.state) == {}
    wanted = np.array([0, 11, 3, 3, -1, tiny_training.EXPERTS, 7], np.int32)
    rows = run.experts.rows_from('experts', wanted)
    is_there = (wanted >= 0) & (wanted < tiny_training.EXPERTS)
    for name, table in expected.experts.tables(expected.state)[
      'experts'
    ].items():
      table = np.asarray(table)
      np.testing.assert_array_equal(
        rows[name][is_there], table[wanted[is_there]]
      )
      assert not rows[name][~is_there].any()
  run.close()
  expected.close()


def test_counts_of_experts(tmp_path):
  run = _Run(tmp_path, _STORES['device'])
  values = run.train(2)
  seen = set()
  for (batch, _), one in zip(_batches(0, 2), values, strict=True):
    ids = np.concatenate(
      [x.reshape(-1) for x in tiny_training.stream_ids(batch).values()]
    )
    ids = ids[(ids >= 0) & (ids < tiny_training.EXPERTS)]
    seen |= set(ids.tolist())
    assert one['experts/distinct'].total == len(set(ids.tolist()))
    assert one['experts/tokens_each'].compute() == pytest.approx(
      len(ids) / len(set(ids.tolist()))
    )
    assert one['experts/never_seen'].total == tiny_training.EXPERTS - len(seen)
  run.save()
  run.close()
  again = _Run(tmp_path, _STORES['disk'])
  (value,) = again.train(3)
  assert value['experts/never_seen'].total <= tiny_training.EXPERTS - len(seen)
  again.close()


def test_a_failed_write_ends_the_run(tmp_path, monkeypatch):
  run = _Run(tmp_path, _STORES['disk'])
  run.train(1)

  def fail(*unused):
    raise row_file.DiskFullError('No room for experts.')

  monkeypatch.setattr(run.experts._backing, 'write', fail)
  with pytest.raises(row_file.DiskFullError, match='No room'):
    run.train(_STEPS)
  run.close()


def test_meshes_that_split_experts_are_refused():
  if jax.device_count() < 2:
    pytest.skip('needs 2 devices')
  here = jax.devices()[:2]
  mesh = partitioning.make_mesh(expert=2, devices=here)
  for store in (expert_stores.HostStore(), expert_stores.DiskStore()):
    store.check_mesh(partitioning.make_mesh(devices=here))
    with pytest.raises(
      ValueError, match="the axis data alone, but this one has {'data': 1, 'exp"
    ):
      store.check_mesh(mesh)
  expert_stores.DeviceStore().check_mesh(mesh)
