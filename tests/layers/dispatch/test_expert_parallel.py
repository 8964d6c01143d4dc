"""Tests experts on eight devices: they equal one, with two all-to-alls.

Also tests `dropless_exchange`.
"""

import functools
import re

import drawn_parameters
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers import platforms
from mowe.layers.dispatch import (
  capacity_dispatch,
  dropless_dispatch,
  token_groups,
)
from mowe.layers.mixtures import moe
from mowe.layers.routers import (
  experts_choose,
  hash_routing,
  router_losses,
  tokens_choose,
)
from mowe.training import partitioning

BATCH, LENGTH, EMBED, EXPERT_DIM, NUM_EXPERTS = 16, 10, 6, 14, 16
NUM_IDS = 9

ROUTERS = {
  'top1': tokens_choose.TokensChoose(),
  'top2': tokens_choose.TokensChoose(2, renormalize=True),
  'experts': experts_choose.ExpertsChoose(1.5),
  'hash': hash_routing.HashRouter(NUM_IDS),
}
DISPATCHES = {
  'dropless': dropless_dispatch.DroplessDispatch(),
  'capacity': capacity_dispatch.CapacityDispatch(1.0, 1),
}
MESHES = {
  '8': {'data': 1, 'expert': 8},
  '4x2': {'data': 4, 'expert': 2},
  '2x4': {'data': 2, 'expert': 4},
  '2x2x2': {'data': 2, 'expert': 2, 'model': 2},
}
# All routers are tested on the mesh with all axes, and all meshes with two
# routers.
CASES = [
  (router, dispatch, mesh)
  for router in ROUTERS
  for dispatch in DISPATCHES
  for mesh in MESHES
  if mesh == '2x2x2' or router in ('top2', 'hash')
]
# On this mesh, outputs and gradients have the bits of one device.
SAME_BITS = ('hash', 'dropless', '8')


def make_layer(router='top2', dispatch='dropless', **fields):
  fields = {'groups': token_groups.TokenGroups(BATCH * LENGTH // 8)} | fields
  return moe.MoeLayer(
    NUM_EXPERTS,
    EXPERT_DIM,
    routing=ROUTERS.get(router, router),
    dispatch=DISPATCHES.get(dispatch, dispatch),
    **fields,
  )


@functools.cache
def make_inputs():
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
  ids = rng.integers(0, NUM_IDS, size=(BATCH, LENGTH)).astype(np.int32)
  ids[:, 8:] = -1
  ids[1, :5] = -1
  return tokens, ids


@functools.cache
def make_parameters(layer):
  variables = drawn_parameters.variables(layer, *make_inputs())
  params = flax.core.unfreeze(variables['params'])
  if 'router' in params:
    # Logits are far from even, so that capacities bind and some experts get no
    # token.
    kernel = 2 * np.random.default_rng(1).normal(size=(EMBED, NUM_EXPERTS))
    kernel = jnp.asarray(kernel, jnp.float32)
    params['router']['router_weights']['w']['kernel'] = kernel
  axes = partitioning.parameter_axes(variables['params_axes'])
  return params, axes


def value_and_gradients(layer, key, params, tokens, ids):
  """Outputs, stats, and gradients with respect to parameters and tokens."""
  cotangent = jax.random.normal(jax.random.key(7), tokens.shape)

  def objective(params, tokens):
    outputs, sown = layer.apply(
      {'params': params},
      tokens,
      ids,
      # As in training, capacities bind.
      deterministic=False,
      rngs={} if key is None else {'dropout': key},
      mutable=['router_stats'],
    )
    stats = sown['router_stats']['stats']
    losses = [total for total, _ in router_losses.losses(stats).values()]
    return jnp.sum(outputs * cotangent) + sum(losses), (outputs, stats)

  gradient = jax.grad(objective, (0, 1), has_aux=True)
  gradients, (outputs, stats) = gradient(params, tokens)
  return {'outputs': outputs, 'stats': stats, 'gradients': gradients}


def put(mesh, params, axes):
  flat = flax.traverse_util.flatten_dict(params)
  params = flax.traverse_util.unflatten_dict(
    {
      path: jax.device_put(
        value, partitioning.sharding_of_axes(axes[path], mesh)
      )
      for path, value in flat.items()
    }
  )
  batch = partitioning.batch_sharding(mesh)
  return params, *(jax.device_put(x, batch) for x in make_inputs())


@functools.cache
def on_one_device(layer, key=None):
  params, _ = make_parameters(layer)
  step = jax.jit(functools.partial(value_and_gradients, layer, key))
  return jax.device_get(step(params, *make_inputs()))


def on_mesh(layer, sizes, key=None):
  mesh = partitioning.make_mesh(**sizes)
  step = functools.partial(value_and_gradients, layer, key)
  arguments = put(mesh, *make_parameters(layer))
  return jax.jit(partitioning.on_mesh(step, mesh)), arguments


COUNTS = r'stats/(load|dropped|num_\w+)'


def check_equal(actual, expected, exact=COUNTS):
  """Compares to 1e-6 of the maximum; names matching `exact` have equal bits."""
  actual, expected = (
    {
      jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
      for path, leaf in jax.tree.flatten_with_path(tree)[0]
    }
    for tree in (actual, expected)
  )
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    tolerance = 1e-6 * np.abs(value).max()
    if re.fullmatch(exact, name):
      tolerance = 0
    np.testing.assert_allclose(
      actual[name], value, rtol=0, atol=tolerance, err_msg=name
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('router', 'dispatch', 'mesh'),
  [
    pytest.param(*case, marks=pytest.mark.optimized)
    if case == SAME_BITS
    else case
    for case in CASES
  ],
)
def test_equals_one_device(router, dispatch, mesh):
  layer = make_layer(router, dispatch)
  step, arguments = on_mesh(layer, MESHES[mesh])
  actual = step(*arguments)
  expected = on_one_device(layer)
  # A dropless row meets the same kernels with the same order of sums, unless
  # hidden units are split. The same holds for the gradient of an expert, unless
  # `data` spreads its rows over devices. It does not hold for logits of a
  # learned router: on CPU, XLA's matrix product has another order for another
  # number of tokens. Nor does it hold for the last rows of a tile, which are
  # other ones if `data` splits the tokens.
  exact = COUNTS
  if (router, dispatch, mesh) == SAME_BITS:
    exact += '|outputs|gradients/1|gradients/0/expert/.*'
  check_equal(jax.device_get(actual), expected, exact)
  if dispatch == 'capacity' and router != 'experts':
    assert np.sum(expected['stats'].dropped) > 0
  # The gradients are sharded like the parameters; nothing was gathered.
  (d_params, d_tokens) = actual['gradients']
  inner = d_params['expert']['wi_0']['kernel'].sharding
  shape = (NUM_EXPERTS, EMBED, EXPERT_DIM)
  sizes = {'data': 1, 'expert': 1, 'model': 1} | MESHES[mesh]
  assert inner.shard_shape(shape) == (
    NUM_EXPERTS // sizes['expert'],
    EMBED,
    EXPERT_DIM // sizes['model'],
  )
  for array in (actual['outputs'], d_tokens):
    parts = sizes['data'] * sizes['expert']
    assert array.sharding.shard_shape(array.shape)[0] == BATCH // parts


@pytest.mark.slow
@pytest.mark.parametrize('dispatch', DISPATCHES)
@pytest.mark.parametrize('mesh', ['8', '2x2x2'])
def test_collectives(dispatch, mesh):
  layer = make_layer('top2', dispatch)
  step, arguments = on_mesh(layer, MESHES[mesh])

  def forward(params, tokens, ids):
    # This is training mode, as capacities do not bind in evaluation.
    return layer.apply({'params': params}, tokens, ids, deterministic=False)

  forward = jax.jit(
    partitioning.on_mesh(forward, partitioning.make_mesh(**MESHES[mesh]))
  )
  num_counts = 1 if dispatch == 'dropless' else 0
  for function, num_exchanges in ((forward, 2), (step, 4)):
    text = function.lower(*arguments).compile().as_text()
    dtypes = re.findall(r'= \(?(\w+)\[.* all-to-all\(', text)
    assert dtypes.count('f32') == num_exchanges
    # The integer exchanges say how many rows go to each device.
    assert dtypes.count('s32') == num_counts
    assert len(dtypes) == num_exchanges + num_counts
    assert 'all-gather' not in text
    # No device holds the kernels of all experts.
    assert f'f32[{NUM_EXPERTS},{EMBED},{EXPERT_DIM}]' not in text
    assert f'f32[{NUM_EXPERTS},{EXPERT_DIM},{EMBED}]' not in text


@pytest.mark.slow
@pytest.mark.parametrize('dispatch', DISPATCHES)
def test_noise_is_that_of_one_device(dispatch):
  router = tokens_choose.TokensChoose(2, jitter=0.3)
  layer = make_layer(router, dispatch, expert_dropout_rate=0.5)
  key = jax.random.key(3)
  step, arguments = on_mesh(layer, MESHES['2x2x2'], key)
  params, _ = make_parameters(layer)
  alone = jax.jit(functools.partial(value_and_gradients, layer, key))
  expected = alone(params, *make_inputs())
  check_equal(step(*arguments), expected)
  quiet = on_one_device(make_layer(tokens_choose.TokensChoose(2), dispatch))
  assert np.any(quiet['outputs'] != expected['outputs'])


@pytest.mark.slow
@pytest.mark.parametrize('dispatch', DISPATCHES)
def test_excluded_experts_and_biases_are_those_of_one_device(dispatch):
  router = tokens_choose.TokensChoose(3, sigmoid=True, exclusion_rate=0.8)
  layer = make_layer(router, dispatch, use_bias=True)
  key = jax.random.key(3)
  step, arguments = on_mesh(layer, MESHES['2x2x2'], key)
  found = step(*arguments)
  params, _ = make_parameters(layer)
  alone = jax.jit(functools.partial(value_and_gradients, layer, key))
  check_equal(found, alone(params, *make_inputs()))
  assert found['stats'].num_skipped > 0


@pytest.mark.slow
def test_without_the_mesh_xla_splits_the_layer():
  layer = make_layer()
  mesh = partitioning.make_mesh(**MESHES['2x2x2'])
  step = jax.jit(functools.partial(value_and_gradients, layer, None))
  actual = step(*put(mesh, *make_parameters(layer)))
  check_equal(jax.device_get(actual), on_one_device(layer))


@pytest.mark.slow
def test_rows_beyond_a_buffer_are_counted():
  tight = make_layer(dispatch=dropless_dispatch.DroplessDispatch(0.5))
  roomy = make_layer(dispatch=dropless_dispatch.DroplessDispatch(9.0))
  step, arguments = on_mesh(tight, MESHES['2x4'])
  found = jax.device_get(step(*arguments))
  stats, expected = found['stats'], on_one_device(make_layer())
  assert np.sum(stats.dropped) > 0
  assert stats.num_choices == expected['stats'].num_choices
  np.testing.assert_array_equal(
    stats.load + stats.dropped, expected['stats'].load
  )
  outputs = np.any(found['outputs'] != 0, axis=-1)
  assert stats.num_tokens == (
    stats.num_padding
    + stats.num_skipped
    + stats.num_left_behind
    + np.sum(outputs)
  )
  step, arguments = on_mesh(roomy, MESHES['2x4'])
  check_equal(jax.device_get(step(*arguments)), expected)


def test_accelerators_exchange_filled_rows_only():
  # CPU has no ragged all-to-all, so the program is only lowered here, and not
  # run.
  step, arguments = on_mesh(make_layer(), MESHES['2x2x2'])
  with platforms.compiling_for('gpu'):
    lowered = step.trace(*arguments).lower(lowering_platforms=('cuda',))
  text = lowered.as_text()
  assert text.count('stablehlo.custom_call @ragged_all_to_all') == 4
  assert len(re.findall(r'stablehlo.all_to_all.*i32', text)) == 1


def test_what_does_not_divide_is_named():
  def check(layer, match, **sizes):
    mesh = partitioning.make_mesh(**sizes)
    variables = jax.eval_shape(layer.init, jax.random.key(0), *make_inputs())
    apply = partitioning.on_mesh(
      lambda params, tokens: layer.apply({'params': params}, tokens), mesh
    )
    with pytest.raises(ValueError, match=match):
      jax.eval_shape(apply, variables['params'], make_inputs()[0])

  check(
    make_layer(groups=token_groups.TokenGroups(40)),
    r'data x expert devices, 2 x 4 = 8, .* there are 4. Set multiple .* to 8',
    data=2,
    expert=4,
  )
  check(
    make_layer().clone(num_experts=18),
    "num_experts must be .* 'expert', 4, but is 18. Make it 20",
    data=2,
    expert=4,
  )
  check(
    make_layer().clone(expert_dim=3),
    "expert_dim must be .* 'model', 2, but is 3. Make it 4",
    data=2,
    expert=2,
    model=2,
  )
  with pytest.raises(ValueError, match='leave it out to drop nothing'):
    dropless_dispatch.DroplessDispatch(0.0)
  with pytest.raises(ValueError, match='4096 and 1 are usual'):
    token_groups.TokenGroups(multiple=0)


def test_groups_come_in_multiples():
  groups = token_groups.TokenGroups(size=11, multiple=4)
  # Six sequences of 5 tokens fill three groups of two sequences. The number of
  # groups must be a multiple of 4, so a fourth one is added.
  array = np.arange(1, 31).reshape(6, 5)
  split = groups.split(jnp.asarray(array), 0)
  assert split.shape == (4, 10)
  np.testing.assert_array_equal(split[2][:4], [21, 26, 22, 27])
  np.testing.assert_array_equal(split[3], 0)
  np.testing.assert_array_equal(groups.merge(split, 6, 5), array)
