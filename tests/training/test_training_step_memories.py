"""Steps of models with memories: gathered rows, and updates in place.

Also tests `host_rows`, `memory_rows`, and `row_table`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_memories
import tiny_training

from mowe.layers.memory import row_table
from mowe.models import parameters, token_memories
from mowe.models.t5 import t5
from mowe.training import losses, partitioning, training_step
from mowe.training.optimization import row_optimizers
from mowe.words.plans import row_plans, step_plans

_OPTIMIZER = optax.sgd(0.25)
_LOSS = training_step.LossConfig(z_loss=1e-3)
_ROWS = row_optimizers.RowAdam(0.01, weight_decay=0.1)


@dataclasses.dataclass(frozen=True)
class _Descent:
  """Gradient descent on rows, with a count of visits as state."""

  rate: float = 0.5

  def init(self, table):
    return jnp.zeros(len(next(iter(table.values()))), jnp.int32)

  def update(self, gradients, state_rows, rows, learning_rate_step):
    del learning_rate_step
    new = {
      name: row - self.rate * gradients[name].values
      for name, row in rows.items()
    }
    return new, state_rows + 1


def make_plan(config, batch, num_microbatches=1, spare=5):
  """A plan with some places more than the batch needs."""
  plans = {}
  for memory in config.memories:
    planner = row_plans.RowPlanner(
      memory.address,
      streams=token_memories.streams_of(memory),
      num_rows=memory.num_rows,
      trial_batches=[batch],
      num_microbatches=num_microbatches,
    )
    plan = planner(batch)
    more = memory.num_rows + len(plan.rows) + np.arange(spare, dtype=np.int32)
    plans[memory.name] = plan._replace(rows=np.append(plan.rows, more))
  return step_plans.StepPlan(None, plans)


@functools.cache
def _state(row_optimizer):
  model = t5.T5(tiny_memories.make_config())
  return tiny_training.make_state(model, _OPTIMIZER, row_optimizer, seed=3)


def _step(row_optimizer, num_microbatches=1):
  model = t5.T5(tiny_memories.make_config())
  return training_step.make_train_step(
    model,
    optimizer=_OPTIMIZER,
    row_optimizer=row_optimizer,
    loss=_LOSS,
    seed=0,
    num_microbatches=num_microbatches,
  )


@functools.cache
def _one_step():
  """State, plan and results of one step of gradient descent."""
  state, batch = _state(_Descent()), tiny_training.make_batch()
  plan = make_plan(tiny_memories.make_config(), batch)
  new, metrics = jax.jit(_step(_Descent()))(state, {}, batch, plan)
  return state, plan, new, metrics


def _oracle():
  """The loss, and its gradients with respect to whole tables."""
  state, batch = _state(_Descent()), tiny_training.make_batch()
  model = t5.T5(tiny_memories.make_config())

  def mean_loss(trained):
    logits = model.apply(
      {'params': parameters.merge_tables(*trained)},
      batch['encoder_input_tokens'],
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      enable_dropout=False,
    )
    entropy, z_loss = losses.cross_entropy(
      logits,
      batch['decoder_target_tokens'],
      label_smoothing=_LOSS.label_smoothing,
      z_loss=_LOSS.z_loss,
    )
    weights = batch['decoder_loss_weights']
    return jnp.sum((entropy + z_loss) * weights) / weights.sum()

  return jax.jit(jax.grad(mean_loss))((state.params, state.tables))


@pytest.mark.slow
def test_a_step_is_dense_differentiation_and_an_update_of_named_rows():
  state, plan, new, _ = _one_step()
  d_params, d_tables = _oracle()
  tiny_training.assert_close(
    new.params,
    jax.tree.map(lambda x, g: x - 0.25 * g, state.params, d_params),
    1e-5,
  )
  assert set(new.tables) == {one.name for one in tiny_memories.make_memories()}
  for name, table in state.tables.items():
    table, gradient = table[row_table.ROWS], d_tables[name][row_table.ROWS]
    found = new.tables[name][row_table.ROWS]
    assert np.abs(gradient).max() > 0, name
    tiny_training.assert_close(found, table - 0.5 * gradient, 1e-5)
    named = plan.memories[name].present_experts(len(table))
    absent = np.setdiff1d(np.arange(len(table)), named)
    assert len(absent)
    np.testing.assert_array_equal(found[absent], table[absent])
    counts = np.asarray(new.table_state[name])
    assert (counts[named] == 1).all() and (counts[absent] == 0).all()


@pytest.mark.slow
def test_microbatches_change_nothing():
  state, _, whole, metrics = _one_step()
  batch = tiny_training.make_batch()
  plan = make_plan(tiny_memories.make_config(), batch, 2)
  new, in_parts = jax.jit(_step(_Descent(), 2))(state, {}, batch, plan)
  tiny_training.assert_close(new.tables, whole.tables, 1e-5)
  tiny_training.assert_close(new.params, whole.params, 1e-5)
  tiny_training.assert_close(in_parts['loss'], metrics['loss'], 1e-6)


@pytest.mark.slow
def test_frozen_tables_are_read_and_not_trained():
  state, plan, _, metrics = _one_step()
  frozen = state.tables
  state = state.replace(tables={}, table_state={})
  batch = tiny_training.make_batch()
  new, found = jax.jit(_step(None))(state, frozen, batch, plan)
  assert not new.tables
  tiny_training.assert_close(found['loss'], metrics['loss'], 1e-6)


@pytest.mark.slow
def test_a_gradient_overflow_of_rows_changes_no_row():
  state, plan, _, _ = _one_step()
  batch = tiny_training.make_batch()
  tables = jax.tree.map(lambda x: x.at[:].set(jnp.inf), state.tables)
  new, metrics = jax.jit(_step(_Descent()))(
    state.replace(tables=tables), {}, batch, plan
  )
  assert not np.isfinite(metrics['expert_gradient_bound'].total)
  for name, table in tables.items():
    np.testing.assert_array_equal(
      new.tables[name][row_table.ROWS], table[row_table.ROWS]
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows():
  """The compiled step makes no array of the size of a table."""
  batch = tiny_training.make_batch()

  def temporaries(num_rows):
    config = tiny_memories.make_config(['per_layer'])
    (memory,) = config.memories
    address = dataclasses.replace(memory.address, vocab_size=num_rows)
    config = dataclasses.replace(
      config, memories=(dataclasses.replace(memory, address=address),)
    )
    model = t5.T5(config)
    state = jax.eval_shape(
      lambda: tiny_training.make_state(model, _OPTIMIZER, _ROWS)
    )
    step = training_step.make_train_step(
      model,
      optimizer=_OPTIMIZER,
      row_optimizer=_ROWS,
      loss=_LOSS,
      seed=0,
    )
    compiled = (
      jax.jit(step, donate_argnums=0)
      .lower(state, {}, batch, make_plan(config, batch))
      .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(2**17) == temporaries(2**10)


@pytest.mark.slow
def test_tables_on_several_devices():
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  state, plan, whole, _ = _one_step()
  mesh = partitioning.make_mesh(expert=4)
  model = t5.T5(tiny_memories.make_config())
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, model), jax.random.key(0)
  )
  shardings = partitioning.state_shardings(
    state, partitioning.parameter_axes(variables['params_axes']), mesh
  )
  batch = tiny_training.make_batch()
  step = jax.jit(
    partitioning.on_mesh(_step(_Descent()), mesh),
    out_shardings=(shardings, None),
  )
  new, _ = step(
    jax.device_put(state, shardings),
    {},
    partitioning.put_batch(batch, partitioning.batch_sharding(mesh)),
    partitioning.put_plan(plan, mesh),
  )
  for name, table in new.tables.items():
    spec = table[row_table.ROWS].sharding.spec
    assert spec[0] == 'expert', name
  tiny_training.assert_close(new.tables, whole.tables, 1e-5)
  tiny_training.assert_close(new.params, whole.params, 1e-5)
