"""Tests word experts on eight devices: they equal one, with two all-to-alls.

Also tests `sharded_updates`.
"""

import dataclasses
import functools

import drawn_parameters
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.memory import bfloat16_bits, word_experts
from mowe.training import partitioning
from mowe.training.optimization import (
  row_gradients,
  sharded_updates,
  table_updates,
)
from mowe.words.plans import batch_plans, sharded_plan, step_plans

# These tests compare bits across programs.
pytestmark = pytest.mark.optimized


BATCH, LENGTH, EMBED, EXPERT_DIM, NUM_EXPERTS = 16, 7, 24, 10, 48

MESHES = {
  '1x8': {'data': 1, 'expert': 8},
  '4x2': {'data': 4, 'expert': 2},
  '2x4': {'data': 2, 'expert': 4},
  '2x2x2': {'data': 2, 'expert': 2, 'model': 2},
}


@dataclasses.dataclass(frozen=True)
class _Descent:
  """Gradient descent that counts visits.

  Adafactor's means over an expert are not used here: the order of their sums
  depends on how many experts are updated at a time.
  """

  def init(self, table):
    return jnp.zeros((table['wo'].shape[0],), jnp.int32)

  def update(self, gradients, state_rows, rows, step):
    del step
    gradients = row_gradients.matrices(gradients)
    new = jax.tree.map(lambda p, g: p - 0.5 * g, rows, gradients)
    return new, state_rows + 1


_ROW_OPTIMIZER = _Descent()


def make_ids(most):
  """Words of up to `most` tokens each, padding, and words without an expert."""
  rng = np.random.default_rng(most)
  counts = np.maximum(most // 2 ** np.arange(NUM_EXPERTS - 1), 1)
  # The last expert is absent.
  ids = np.repeat(rng.permutation(NUM_EXPERTS - 1), counts)
  ids = ids[: BATCH * LENGTH - 20]
  missing = BATCH * LENGTH - ids.size
  ids = np.append(ids, rng.choice([-1, NUM_EXPERTS], missing))
  return rng.permutation(ids).reshape(BATCH, LENGTH).astype(np.int32)


def make_inputs():
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
  return tokens, rng.normal(size=tokens.shape).astype(np.float32)


def make_layer(dropout_rate=0.0):
  layer = word_experts.MoweLayer(
    NUM_EXPERTS, EXPERT_DIM, dropout_rate=dropout_rate
  )
  tokens, _ = make_inputs()
  variables = drawn_parameters.variables(layer, tokens, make_ids(3))
  return layer, flax.core.unfreeze(variables['params']['experts'])


def step(layer, update_table, table, state, tokens, cotangent, plan):
  """Outputs, gradients of tokens, and the table after one update."""
  deterministic = not layer.dropout_rate

  def apply(tokens, factors, **settings):
    return layer.apply(
      {'params': {'experts': table}, word_experts.FACTORS: factors},
      tokens,
      plan=plan.encoder,
      deterministic=deterministic,
      rngs={} if deterministic else {'dropout': jax.random.key(5)},
      **settings,
    )

  _, made = apply(tokens, {}, mutable=[word_experts.FACTORS])
  outputs, backward = jax.vjp(apply, tokens, made[word_experts.FACTORS])
  d_tokens, factors = backward(cotangent)
  new = update_table(
    _ROW_OPTIMIZER,
    table_updates.TableAndState(table, state),
    factors={'encoder': [factors]},
    plan=plan,
    step=table_updates.StepValues(
      jnp.asarray(True), jnp.asarray(0), jax.random.key(0)
    ),
  )
  return outputs, d_tokens, *new


# Two size classes hold any batch, and compile within a few seconds.
_ROOMS = (4, BATCH * LENGTH)


def on_one_device(layer, table, ids):
  sizes = batch_plans.ClassSizes(tuple((room, NUM_EXPERTS) for room in _ROOMS))
  profile = batch_plans.CapacityProfile((('encoder', sizes),), sizes)
  plan = batch_plans.make_plan({'encoder': ids}, profile, NUM_EXPERTS)
  run = functools.partial(step, layer, table_updates.update_table)
  state = _ROW_OPTIMIZER.init(table)
  return jax.device_get(jax.jit(run)(table, state, *make_inputs(), plan))


def make_plan(ids, devices):
  own = NUM_EXPERTS // devices[1]
  sizes = batch_plans.ClassSizes(tuple((room, own) for room in _ROOMS))
  capacity = ids.size // (devices[0] * devices[1]) - 1
  profile = sharded_plan.ShardedProfile(
    (('encoder', sharded_plan.StreamProfile(capacity, sizes)),), sizes
  )
  plan = sharded_plan.make_plan(
    {'encoder': ids}, profile, NUM_EXPERTS, devices=devices
  )
  assert plan is not None
  return plan


def put(mesh, table, ids):
  devices = mesh.shape['data'], mesh.shape['expert']
  plan = step_plans.StepPlan(make_plan(ids, devices), {})
  plan = partitioning.put_plan(plan, mesh).experts
  axes = {name: ('expert', 'embed', 'expert_mlp') for name in table}
  axes['wo'] = ('expert', 'expert_mlp', 'embed')
  table = {
    name: jax.device_put(
      kernel, partitioning.sharding_of_axes(axes[name], mesh)
    )
    for name, kernel in table.items()
  }
  state = jax.device_put(
    _ROW_OPTIMIZER.init(table), partitioning.sharding_of_axes(('expert',), mesh)
  )
  batch = partitioning.batch_sharding(mesh)
  return table, state, *(jax.device_put(x, batch) for x in make_inputs()), plan


def on_mesh(layer, table, ids, sizes):
  """The results of `step` on a mesh, and the compiled program."""
  mesh = partitioning.make_mesh(**sizes)
  run = functools.partial(step, layer, sharded_updates.update_table)
  arguments = put(mesh, table, ids)
  compiled = (
    jax.jit(partitioning.on_mesh(run, mesh)).lower(*arguments).compile()
  )
  return compiled(*arguments), compiled.as_text()


def check_equal(actual, expected, tolerance):
  actual = jax.device_get(actual)
  for got, want in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(
      got, want, rtol=0, atol=tolerance * np.abs(want).max()
    )


# The number of an expert's rows on a device decides its size class. On CPU, XLA
# adds up a product in another order for another class. So an expert with many
# rows has the same bits only if all of them come to one device. Parts of hidden
# units (`model`) are added up at the end, which rounds differently too.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('mesh', 'most', 'tolerance'),
  [
    ('1x8', 40, 0),
    ('4x2', 4, 0),
    ('2x4', 4, 0),
    ('2x4', 40, 1e-6),
    ('2x2x2', 40, 1e-6),
  ],
)
def test_equals_one_device(mesh, most, tolerance):
  layer, table = make_layer()
  ids = make_ids(most)
  assert np.bincount(ids[(ids >= 0) & (ids < NUM_EXPERTS)]).max() == most
  actual, _ = on_mesh(layer, table, ids, MESHES[mesh])
  expected = on_one_device(layer, table, ids)
  check_equal(actual, expected, tolerance)
  # Each device keeps its own experts.
  outputs, _, new, state = actual
  sizes = {'model': 1} | MESHES[mesh]
  own = NUM_EXPERTS // sizes['expert']
  units = EXPERT_DIM // sizes['model']
  of_one = new['wi_0'].sharding.shard_shape(new['wi_0'].shape)
  assert of_one == (own, EMBED, units)
  assert state.sharding.shard_shape((NUM_EXPERTS,)) == (own,)
  rows = BATCH // sizes['data'] // sizes['expert']
  assert outputs.sharding.shard_shape(outputs.shape)[0] == rows


@pytest.mark.slow
def test_a_table_of_bits():
  layer, table = make_layer()
  bits = jax.tree.map(bfloat16_bits.nearest, table)
  ids = make_ids(4)
  *expected, _, _ = on_one_device(layer, bits, ids)
  (*actual, new, state), _ = on_mesh(layer, bits, ids, MESHES['2x4'])
  check_equal(actual, expected, 0)
  # Stochastic rounding draws on the owner, and replicas along `data` draw the
  # same.
  present = np.unique(ids[(ids >= 0) & (ids < NUM_EXPERTS)])
  np.testing.assert_array_equal(np.flatnonzero(state), present)
  for name, kernel in new.items():
    assert kernel.dtype == bits[name].dtype
    copies = {}
    for shard in kernel.addressable_shards:
      copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    for one, other in copies.values():
      np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_dropout_draws_as_on_one_device():
  layer, table = make_layer(dropout_rate=0.3)
  ids = make_ids(4)
  actual, _ = on_mesh(layer, table, ids, MESHES['2x4'])
  check_equal(actual, on_one_device(layer, table, ids), 0)
  without = on_one_device(make_layer()[0], table, ids)
  assert not np.array_equal(actual[0], without[0])


def _collectives(text):
  names = ('all-to-all', 'all-gather', 'all-reduce', 'collective-permute')
  return {name: text.count(f' {name}(') for name in names}


def test_tokens_travel_and_kernels_stay():
  layer, table = make_layer()
  mesh = partitioning.make_mesh(**MESHES['2x4'])
  table, _, tokens, _, plan = put(mesh, table, make_ids(4))

  def apply(table, tokens, plan):
    return layer.apply({'params': {'experts': table}}, tokens, plan=plan)

  lowered = jax.jit(partitioning.on_mesh(apply, mesh)).lower(
    table, tokens, plan.encoder
  )
  assert _collectives(lowered.compile().as_text()) == {
    'all-to-all': 2,
    'all-gather': 0,
    'all-reduce': 0,
    'collective-permute': 0,
  }


def test_factors_alone_are_gathered_along_data():
  layer, table = make_layer()
  ids = make_ids(4)
  _, text = on_mesh(layer, table, ids, MESHES['2x4'])
  found = _collectives(text)
  # There are two all-to-alls in the forward pass and two in the backward pass.
  assert found['all-to-all'] == 4
  assert found['all-reduce'] == found['collective-permute'] == 0
  num_rows = 2 * make_plan(ids, (2, 4)).encoder.received.slots.shape[-1]
  gathered = [line for line in text.splitlines() if ' all-gather(' in line]
  assert 1 <= len(gathered) <= 6
  for line in gathered:
    # Only factors are gathered, as wide as a token or as the hidden units. They
    # come from both parts of the axis `data`.
    assert f'{num_rows // 2},{EMBED}]' in line or (
      f'{num_rows // 2},{EXPERT_DIM}]' in line
    )


@pytest.mark.slow
def test_a_gradient_of_the_whole_table():
  layer, table = make_layer()
  ids = make_ids(4)
  tokens, cotangent = make_inputs()

  def objective(table, tokens, ids, plan):
    outputs = layer.apply(
      {'params': {'experts': table}}, tokens, ids, plan=plan
    )
    return jnp.sum(outputs * cotangent)

  mesh = partitioning.make_mesh(**MESHES['2x4'])
  placed, _, put_tokens, _, plan = put(mesh, table, ids)
  actual = jax.jit(partitioning.on_mesh(jax.grad(objective), mesh))(
    placed, put_tokens, None, plan.encoder
  )
  expected = jax.jit(jax.grad(objective))(table, tokens, ids, None)
  check_equal(actual, expected, 1e-6)


def test_a_plan_for_another_mesh_is_refused():
  layer, table = make_layer()
  tokens, _ = make_inputs()
  plan = make_plan(make_ids(4), (2, 4)).encoder
  apply = lambda: layer.apply({'params': {'experts': table}}, tokens, plan=plan)
  with pytest.raises(ValueError, match='2 x 4 .* there are 1 x 1 '):
    apply()
  mesh = partitioning.make_mesh(data=4, expert=2)
  with pytest.raises(ValueError, match='but there are 4 x 2'):
    partitioning.on_mesh(apply, mesh)()


def test_experts_that_do_not_divide_are_named_before_anything_is_made():
  layer, _ = make_layer()
  layer.check_mesh({'expert': 8}, BATCH, LENGTH)
  with pytest.raises(ValueError, match='is 48. Make it 50, or change the mesh'):
    layer.check_mesh({'expert': 5}, BATCH, LENGTH)
