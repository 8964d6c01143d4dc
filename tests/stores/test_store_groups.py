"""Tables of several groups: word experts, and memories of every kind.

Also tests `step_plans` and `table_layouts`.
"""

import functools

import jax
import numpy as np
import pytest
import tiny_memories
import tiny_training

from mowe.layers import platforms
from mowe.layers.memory import rows_in_place
from mowe.model_folders import initial_state
from mowe.models import parameters, token_memories
from mowe.models.t5 import t5
from mowe.stores import expert_stores, store_groups
from mowe.stores.row_files import row_index
from mowe.training import (
  checkpointing,
  partitioning,
  table_layouts,
  training_step,
)
from mowe.training.optimization import optimizers, row_optimizers
from mowe.words.plans import row_plans, step_plans

_NAMES = ('engram', 'per_layer')
_GROUPS = {'experts', *_NAMES}
_STEPS = 5
_OPTIMIZER = optimizers.AdamW(0.01)
_ROW_OPTIMIZER = row_optimizers.RowAdam(0.05)
_STORES = {
  'device': expert_stores.DeviceStore(),
  # Few slots, so that rows leave the device and come again.
  'host': expert_stores.HostStore(140),
  'disk': expert_stores.DiskStore(140),
}


def _config():
  memories = tuple(
    one for one in tiny_memories.make_memories() if one.name in _NAMES
  )
  return tiny_training.make_config(
    num_encoder_layers=2, num_decoder_layers=2, memories=memories
  )


def _plan(config, batch):
  memories = {}
  for memory in config.memories:
    memories[memory.name] = row_plans.RowPlanner(
      memory.address,
      streams=token_memories.streams_of(memory),
      num_rows=memory.num_rows,
      trial_batches=[tiny_training.make_batch(100)],
    )(batch)
  experts = tiny_training.make_plan(batch).experts
  return step_plans.StepPlan(experts, memories)


def _train_step(num_slots):
  config = _config()
  if num_slots is not None:
    config = config.with_layer_changes(num_slots=num_slots)
  return training_step.make_train_step(
    t5.T5(config),
    optimizer=_OPTIMIZER.build(None),
    row_optimizer=_ROW_OPTIMIZER,
    loss=training_step.LossConfig(),
    seed=0,
  )


@functools.cache
def _step(num_slots):
  """One program serves all runs in stores with this number of slots."""
  return jax.jit(_train_step(num_slots), donate_argnums=0)


class _Run:
  """A run in a folder, from fresh parameters or its last checkpoint."""

  def __init__(self, folder, store):
    folder.mkdir(exist_ok=True)
    self.config = _config()
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    self.setup = initial_state.Setup.make(
      t5.T5(self.config),
      _OPTIMIZER,
      _ROW_OPTIMIZER,
      mesh,
      seed=0,
      batch_size=tiny_training.BATCH,
    )
    self.checkpoints = checkpointing.Checkpoints(folder)
    self.state, self.stores = self.setup.start(
      self.checkpoints, {}, None, store, {'experts': 12, 'engram': 100}
    )
    self.step = _step(self.stores.num_slots)

  def _batches(self, first, last):
    for number in range(first, last):
      batch = tiny_training.make_batch(number)
      yield batch, _plan(self.config, batch)

  def train(self, last):
    batches = self._batches(int(self.state.step), last)
    for batch, fed in self.stores.feed(batches):
      self.state, frozen, plan = self.stores.ready(self.state, fed)
      self.state, _ = self.step(self.state, frozen, batch, plan)
    return self.stores.metrics()

  def save(self):
    self.checkpoints.save(
      int(self.state.step),
      self.state.replace(tables={}, table_state={}),
      metadata={},
      attach=lambda path: self.stores.save(path, self.state),
    )
    self.checkpoints.wait()

  def close(self):
    self.stores.close()
    self.checkpoints.close()


def _tables(folder):
  """The tables of the last checkpoint of a folder, from the device."""
  config = _config()
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, t5.T5(config)),
    jax.random.key(0),
  )
  _, abstract = parameters.split_tables(variables['params'])
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
  )
  checkpoint = sorted(folder.glob('checkpoint_*'))[-1]
  tables, rows_from = store_groups.open_for_reading(
    checkpoint, t5.T5(config), abstract, expert_stores.DeviceStore()
  )
  assert rows_from is None
  return jax.device_get(tables)


@pytest.mark.slow
def test_all_stores_end_with_the_same_bits(tmp_path):
  found = {}
  for name, store in _STORES.items():
    folder = tmp_path / name
    run = _Run(folder, store)
    metrics = run.train(2)
    assert {one.partition('/')[0] for one in metrics} == _GROUPS
    run.save()
    run.close()
    # The run goes on in another store than the one it began in.
    run = _Run(folder, _STORES['disk' if name == 'host' else 'host'])
    run.train(_STEPS)
    run.save()
    run.close()
    found[name] = _tables(folder)
  whole = _Run(tmp_path / 'whole', _STORES['device'])
  whole.train(_STEPS)
  whole.save()
  whole.close()
  expected = _tables(tmp_path / 'whole')
  assert {*parameters.in_groups(expected)} == _GROUPS
  for name, tables in found.items():
    jax.tree.map(np.testing.assert_array_equal, tables, expected)
    files = {path.name for path in (tmp_path / name).glob('*.rows')}
    assert files == {f'{group}.0.rows' for group in _GROUPS}


def _order(array):
  layout = array.format.layout
  return None if layout is None else layout.major_to_minor


@pytest.mark.slow
@pytest.mark.parametrize('store', ['device', 'disk'])
def test_tables_keep_the_order_of_a_tpu(tmp_path, monkeypatch, store):
  plain = _Run(tmp_path / 'plain', _STORES['device'])
  plain.train(3)
  plain.save()
  plain.close()

  laid_out = table_layouts.laid_out

  def as_on_tpu(leaf, sharding):
    with platforms.compiling_for('tpu'):
      return laid_out(leaf, sharding)

  monkeypatch.setattr(table_layouts, 'laid_out', as_on_tpu)
  # A CPU keeps no table in this order by itself.
  orders = {2: (1, 0), 3: (2, 0, 1)}
  monkeypatch.setattr(
    rows_in_place, 'axes_in_memory', lambda shape: orders.get(len(shape))
  )
  for last in (2, 3):
    run = _Run(tmp_path / 'ordered', _STORES[store])
    run.step = run.setup.jit(_train_step(run.stores.num_slots))
    run.train(last)
    for leaf in jax.tree.leaves((run.state.tables, run.state.table_state)):
      assert leaf.ndim == 1 or _order(leaf) == orders[leaf.ndim]
    # One program serves all steps, those after a move of rows, too.
    assert run.step._cache_size() == 1
    run.save()
    run.close()
  jax.tree.map(
    np.testing.assert_array_equal,
    _tables(tmp_path / 'ordered'),
    _tables(tmp_path / 'plain'),
  )


@pytest.mark.slow
@pytest.mark.parametrize('written_by', ['device', 'disk'])
def test_models_read_rows_from_every_store(tmp_path, written_by):
  run = _Run(tmp_path, _STORES[written_by])
  run.train(1)
  run.save()
  run.close()
  (checkpoint,) = tmp_path.glob('checkpoint_*')
  # A store outside of the device writes no row that was never met.
  for memory in _config().memories:
    index = row_index.RowIndex.load(checkpoint, memory.name)
    assert index.num_rows == memory.num_rows
    are_all = len(index.written_rows()) == memory.num_rows
    assert are_all == (written_by == 'device')
  config = _config()
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, t5.T5(config)),
    jax.random.key(0),
  )
  _, abstract = parameters.split_tables(variables['params'])
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
  )
  batch = tiny_training.make_batch()
  logits = {}
  for name, store in _STORES.items():
    tables, rows_from = store_groups.open_for_reading(
      checkpoint, t5.T5(config), abstract, store
    )
    here = config
    if rows_from is not None:
      assert not tables
      here = config.with_layer_changes(rows_from=rows_from)
    params = parameters.merge_tables(run.state.params, tables)
    logits[name] = jax.jit(
      lambda params, here=here: t5.T5(here).apply(
        {'params': params}, batch, enable_dropout=False, method='of_batch'
      )
    )(params)
  np.testing.assert_array_equal(logits['host'], logits['disk'])
  tiny_training.assert_close(logits['host'], logits['device'], 1e-6)
