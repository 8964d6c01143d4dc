"""Tests eight virtual devices: equal to one, sharded by rules, traced once."""

import functools

import flax
import jax
import numpy as np
import optax
import pytest
import tiny_training
from jax.sharding import PartitionSpec as P

from mowe.models import parameters
from mowe.models.t5 import t5
from mowe.training import partitioning, train_state, training_step
from mowe.training.optimization import optimizers, row_optimizers

_STEPS = 3
_MESHES = {
  'data': {'data': 8},
  'data x model': {'data': 4, 'model': 2},
  'data x expert': {'data': 4, 'expert': 2},
  'data x expert x model': {'data': 2, 'expert': 2, 'model': 2},
}
_OPTIMIZER = optimizers.ClipByGlobalNorm(
  optimizers.AdamW(1e-2, eps=1e-3, weight_decay=0.1), 1.0
)


def _row_optimizer(sparse):
  return row_optimizers.RowAdafactor(0.05) if sparse else None


def _axes(model):
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, model), jax.random.key(0)
  )
  return partitioning.parameter_axes(variables['params_axes'])


def _train(sparse, mesh_sizes=None):
  """Trains 3 steps; returns state, initial shardings, and number of traces."""
  model = t5.T5(tiny_training.make_config(sparse=sparse, dropout_rate=0.2))
  row_optimizer = _row_optimizer(sparse)
  optimizer = _OPTIMIZER.build(None)
  create = functools.partial(
    train_state.create,
    model,
    optimizer=optimizer,
    row_optimizer=row_optimizer,
  )
  train_step = training_step.make_train_step(
    model,
    optimizer=optimizer,
    row_optimizer=row_optimizer,
    loss=training_step.LossConfig(),
    seed=0,
  )
  num_traces = 0

  def counted(*arguments):
    nonlocal num_traces
    num_traces += 1
    return train_step(*arguments)

  devices = None if mesh_sizes else jax.devices()[:1]
  mesh = partitioning.make_mesh(**(mesh_sizes or {}), devices=devices)
  # On one device, where fresh parameters are compiled once for all meshes.
  state = jax.device_get(jax.jit(create)(jax.random.key(0)))
  shardings = partitioning.state_shardings(state, _axes(model), mesh)
  state = jax.device_put(state, shardings)
  step = jax.jit(counted, donate_argnums=0, out_shardings=(shardings, None))
  for number in range(_STEPS):
    batch = tiny_training.make_batch(number)
    plan = tiny_training.make_plan(batch) if sparse else None
    state, metrics = step(
      state,
      {},
      partitioning.put_batch(batch, partitioning.batch_sharding(mesh)),
      partitioning.put_batch(plan, partitioning.replicated(mesh)),
    )
  return state, jax.device_get(metrics), shardings, num_traces


@functools.cache
def _on_one_device(sparse):
  state, metrics, _, _ = _train(sparse)
  return jax.device_get(state), metrics


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'sparse'),
  # A model with word experts has all parts of a dense one, so that one mesh is
  # enough to see that a model without tables and plans works as well.
  [('data x expert x model', False), *((name, True) for name in _MESHES)],
)
def test_training_equals_one_device(name, sparse):
  state, metrics, shardings, num_traces = _train(sparse, _MESHES[name])
  expected, expected_metrics = _on_one_device(sparse)
  tiny_training.assert_close(state, expected, 1e-4)
  assert {k: m.compute() for k, m in metrics.items()} == pytest.approx(
    {k: m.compute() for k, m in expected_metrics.items()}, rel=1e-4
  )
  assert num_traces == 1
  # After training everything is where it was put.
  jax.tree.map(
    lambda x, s: np.testing.assert_equal(x.sharding.spec, s.spec),
    state,
    shardings,
  )


def _specs(mesh_sizes, sparse=True):
  model = t5.T5(tiny_training.make_config(sparse=sparse))
  mesh = partitioning.make_mesh(**mesh_sizes)
  state = jax.eval_shape(
    functools.partial(
      train_state.create,
      model,
      optimizer=_OPTIMIZER.build(None),
      row_optimizer=_row_optimizer(sparse),
    ),
    jax.random.key(0),
  )
  return state, partitioning.state_shardings(state, _axes(model), mesh)


def test_parameters_lie_where_the_rules_say():
  state, shardings = _specs(_MESHES['data x expert x model'])
  flat = flax.traverse_util.flatten_dict(shardings.params, sep='/')
  attention = 'decoder/layers_0/encoder_decoder_attention'
  assert {name: flat[name].spec for name in flat if name in (
    'token_embedder/embedding',
    f'{attention}/query/kernel',
    f'{attention}/out/kernel',
    'decoder/relpos_bias/rel_embedding',
    'decoder/decoder_norm/scale',
    'decoder/logits_dense/kernel',
  )} == {
    'token_embedder/embedding': P('model', None),
    f'{attention}/query/kernel': P(None, 'model'),
    f'{attention}/out/kernel': P('model', None),
    'decoder/relpos_bias/rel_embedding': P('model', None),
    'decoder/decoder_norm/scale': P(None),
    'decoder/logits_dense/kernel': P(None, 'model'),
  }  # fmt: skip
  tables = shardings.tables['experts']
  assert tables['wi_0'].spec == P('expert', None, 'model')
  assert tables['wo'].spec == P('expert', 'model', None)
  rows = shardings.table_state['experts']
  assert rows.counts.spec == P('expert')
  assert rows.v_row['wo'].spec == P('expert', None)
  assert shardings.step.spec == P()
  # The moments of a parameter are sharded as the parameter is.
  moments = optax.tree_utils.tree_get(shardings.opt_state, 'mu')
  assert moments['token_embedder']['embedding'].spec == P('model', None)
  # Every sharded size must divide over its devices, or this raises an error.
  jax.tree.map(lambda x, s: s.shard_shape(x.shape), state, shardings)


def test_dense_feed_forwards_are_split_by_model():
  _, shardings = _specs(_MESHES['data x model'], sparse=False)
  mlp = shardings.params['encoder']['layers_0']['mlp']
  assert mlp['wi_0']['kernel'].spec == P(None, 'model')
  assert mlp['wo']['kernel'].spec == P('model', None)
  assert shardings.tables == {}


def test_a_layers_own_table_is_split_by_expert():
  layer = functools.partial(
    tiny_training.word_experts.MoweLayer,
    tiny_training.EXPERTS,
    4,
    share_experts=False,
  )
  model = t5.T5(tiny_training.make_config(sparse_feed_forward=layer))
  mesh = partitioning.make_mesh(data=4, expert=2)
  state = jax.eval_shape(
    functools.partial(
      train_state.create,
      model,
      optimizer=optax.sgd(0.1),
      row_optimizer=row_optimizers.RowAdam(0.1),
    ),
    jax.random.key(0),
  )
  shardings = partitioning.state_shardings(state, _axes(model), mesh)
  assert set(state.tables) == {
    'encoder/layers_0/mlp/experts',
    'decoder/layers_0/mlp/experts',
  }
  for leaf in jax.tree.leaves((shardings.tables, shardings.table_state)):
    assert leaf.spec[0] == 'expert'


def test_a_name_that_only_ends_alike_is_not_taken_for_it():
  # The 'wo/kernel' of one layer must not shard a 'two/kernel' of another.
  axes = {('wo', 'kernel'): ('mlp', 'embed')}
  mesh = partitioning.make_mesh(data=4, model=2)
  shape = jax.ShapeDtypeStruct((4, 6), np.float32)
  shardings = partitioning.state_shardings(
    {'wo': {'kernel': shape}, 'two': {'kernel': shape}}, axes, mesh
  )
  assert shardings['wo']['kernel'].spec == P('model', None)
  assert shardings['two']['kernel'].spec == P()


def test_the_batch_is_split_along_data_and_expert():
  mesh = partitioning.make_mesh(data=2, expert=2, model=2)
  array = np.arange(8 * 3).reshape(8, 3)
  put = partitioning.put_batch(
    {'tokens': array}, partitioning.batch_sharding(mesh)
  )['tokens']
  assert put.sharding.shard_shape(put.shape) == (2, 3)
  np.testing.assert_array_equal(put, array)


def test_the_mesh_takes_all_devices_for_data():
  mesh = partitioning.make_mesh()
  assert dict(mesh.shape) == {'data': 8, 'expert': 1, 'model': 1}
  mesh = partitioning.make_mesh(expert=2, model=2)
  assert dict(mesh.shape) == {'data': 2, 'expert': 2, 'model': 2}


@pytest.mark.parametrize('sizes', [{'data': 3}, {'model': 3}, {'expert': 16}])
def test_a_mesh_that_leaves_devices_out_is_refused(sizes):
  with pytest.raises(ValueError, match='must be 8, but is .* Leave out `data`'):
    partitioning.make_mesh(**sizes)


def test_batch_sizes():
  mesh = partitioning.make_mesh(data=2, expert=2, model=2)
  partitioning.check_batch_size(24, mesh, 3)
  with pytest.raises(ValueError, match='2 x 2 x 3 = 12, but is 20. Use 24'):
    partitioning.check_batch_size(20, mesh, 3)
  with pytest.raises(ValueError, match='Use 12.'):
    partitioning.check_batch_size(3, mesh, 3)


def test_an_axis_that_does_not_divide_is_named():
  mesh = partitioning.make_mesh(data=1, expert=4, model=2)
  state = {'tables': {'experts': {'wo': np.zeros((6, 4, 3))}}}
  axes = {('experts', 'wo'): ('expert', 'expert_mlp', 'embed')}
  with pytest.raises(ValueError, match=r"axis of 6 .* 'expert'. Make it 8"):
    partitioning.state_shardings(state, axes, mesh)
