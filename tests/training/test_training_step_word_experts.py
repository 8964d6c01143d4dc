"""Tests a training step with word experts on eight devices and on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny_training

from mowe.models import parameters
from mowe.models.t5 import t5
from mowe.training import partitioning, train_state, training_step
from mowe.training.optimization import row_gradients
from mowe.words.plans import batch_plans, sharded_plan, step_plans

MESHES = {
  '2x4': {'data': 2, 'expert': 4},
  '2x2x2': {'data': 2, 'expert': 2, 'model': 2},
}
# This optimizer has no second moments, whose relative error is twice that of
# the gradients.
_OPTIMIZER = optax.sgd(0.1, momentum=0.9)


@dataclasses.dataclass(frozen=True)
class _Descent:
  """Gradient descent that keeps the sum of all gradients it has seen."""

  def init(self, table):
    return jax.tree.map(jnp.zeros_like, dict(table))

  def update(self, gradients, state_rows, rows, step):
    del step
    gradients = row_gradients.matrices(gradients)
    new = jax.tree.map(lambda p, g: p - 0.1 * g, rows, gradients)
    return new, jax.tree.map(jnp.add, state_rows, gradients)


_ROW_OPTIMIZER = _Descent()


def make_plan(batch, mesh, num_microbatches):
  """A plan with two size classes, as in `tiny_training.make_plan`."""
  devices = mesh.shape['data'], mesh.shape['expert']
  own = tiny_training.EXPERTS // devices[1]
  num_tokens = 2 * tiny_training.BATCH * tiny_training.INPUTS
  sizes = batch_plans.ClassSizes(((4, own), (num_tokens, own)))
  stream = sharded_plan.StreamProfile(2 * tiny_training.INPUTS, sizes)
  plan = sharded_plan.make_plan(
    tiny_training.stream_ids(batch),
    sharded_plan.ShardedProfile(
      (('encoder', stream), ('decoder', stream)), sizes
    ),
    tiny_training.EXPERTS,
    devices=devices,
    num_microbatches=num_microbatches,
  )
  assert plan is not None
  return step_plans.StepPlan(plan, {})


def _step(sizes, num_microbatches, dropout_rate):
  """State and metrics after one step, on a mesh of these sizes or one device."""
  model = t5.T5(tiny_training.make_config(dropout_rate=dropout_rate))
  create = functools.partial(
    train_state.create,
    model,
    optimizer=_OPTIMIZER,
    row_optimizer=_ROW_OPTIMIZER,
  )
  train_step = training_step.make_train_step(
    model,
    optimizer=_OPTIMIZER,
    row_optimizer=_ROW_OPTIMIZER,
    loss=training_step.LossConfig(),
    seed=0,
    num_microbatches=num_microbatches,
  )
  mesh = partitioning.make_mesh(
    **sizes, devices=None if sizes else jax.devices()[:1]
  )
  key = jax.random.key(0)
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, model), key
  )
  shardings = partitioning.state_shardings(
    jax.eval_shape(create, key),
    partitioning.parameter_axes(variables['params_axes']),
    mesh,
  )
  state = jax.device_put(jax.jit(create)(key), shardings)
  step = jax.jit(
    partitioning.on_mesh(train_step, mesh), out_shardings=(shardings, None)
  )
  batch = tiny_training.make_batch()
  if sizes:
    plan = make_plan(batch, mesh, num_microbatches)
  else:
    plan = tiny_training.make_plan(batch, num_microbatches)
  arguments = (
    state,
    {},
    partitioning.put_batch(batch, partitioning.batch_sharding(mesh)),
    partitioning.put_plan(plan, mesh),
  )
  text = step.lower(*arguments).compile().as_text()
  return *step(*arguments), text


@pytest.mark.slow
@pytest.mark.parametrize(
  ('mesh', 'num_microbatches', 'dropout_rate'),
  [('2x4', 1, 0.2), ('2x2x2', 2, 0.0)],
)
def test_a_step_equals_one_device(mesh, num_microbatches, dropout_rate):
  state, metrics, text = _step(MESHES[mesh], num_microbatches, dropout_rate)
  expected, expected_metrics, _ = _step({}, num_microbatches, dropout_rate)
  assert ' all-to-all(' in text
  tiny_training.assert_close(state, expected, 1e-6)
  tiny_training.assert_close(metrics, expected_metrics, 1e-6)


def _memory(num_experts):
  """The bytes of tables on a device, and the memory of the step on 2 x 4."""
  layer = functools.partial(
    tiny_training.word_experts.MoweLayer, num_experts, 4
  )
  model = t5.T5(
    tiny_training.make_config(
      sparse_feed_forward=layer,
      routing=tiny_training.FixedRouting(num_experts),
    )
  )
  create = functools.partial(
    train_state.create,
    model,
    optimizer=_OPTIMIZER,
    row_optimizer=_ROW_OPTIMIZER,
  )
  key = jax.random.key(0)
  mesh = partitioning.make_mesh(**MESHES['2x4'])
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, model), key
  )
  state = jax.eval_shape(create, key)
  shardings = partitioning.state_shardings(
    state, partitioning.parameter_axes(variables['params_axes']), mesh
  )
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    shardings,
  )
  train_step = training_step.make_train_step(
    model,
    optimizer=_OPTIMIZER,
    row_optimizer=_ROW_OPTIMIZER,
    loss=training_step.LossConfig(),
    seed=0,
  )
  batch = tiny_training.make_batch()
  lowered = jax.jit(
    partitioning.on_mesh(train_step, mesh),
    donate_argnums=0,
    out_shardings=(shardings, None),
  ).lower(
    state,
    {},
    partitioning.put_batch(batch, partitioning.batch_sharding(mesh)),
    partitioning.put_plan(make_plan(batch, mesh, 1), mesh),
  )
  tables = jax.tree.leaves((state.tables, state.table_state))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in tables) // 4
  return size, lowered.compile().memory_analysis()


@pytest.mark.slow
def test_tables_are_updated_in_place_on_their_devices():
  few, many = (
    _memory(tiny_training.EXPERTS),
    _memory(128 * tiny_training.EXPERTS),
  )
  grown = many[0] - few[0]
  assert many[1].alias_size_in_bytes - few[1].alias_size_in_bytes == grown
  # One more kernel on each device would be 147 KB.
  assert abs(many[1].temp_size_in_bytes - few[1].temp_size_in_bytes) < 8192
