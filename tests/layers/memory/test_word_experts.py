"""Tests MoweLayer against a float64 loop over tokens, values and gradients.

Also tests `expert_tiles` and `grouped`.
"""

import functools

import drawn_parameters
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers import feed_forward
from mowe.layers.memory import grouped, word_experts
from mowe.words.plans import batch_plans

BATCH, LENGTH, EMBED, EXPERT_DIM, NUM_EXPERTS = 2, 9, 5, 3, 11

KERNELS = {
  ('gelu', 'linear'): ('wi_0', 'wi_1'),
  ('relu',): ('wi',),
}


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x, step=1e-6):
  return (gelu(x + step) - gelu(x - step)) / (2 * step)


def oracle(tokens, ids, table, cotangent):
  """Outputs and gradients, computed in float64 one token at a time."""
  table = {name: np.asarray(w, np.float64) for name, w in table.items()}
  tokens = np.asarray(tokens, np.float64)
  outputs = np.zeros(tokens.shape)
  d_tokens = np.zeros(tokens.shape)
  d_table = {name: np.zeros(w.shape) for name, w in table.items()}
  for at in np.ndindex(ids.shape):
    e, x, g = ids[at], tokens[at], cotangent[at]
    if not 0 <= e < len(table['wo']):
      continue
    if 'wi' in table:
      a = x @ table['wi'][e]
      hidden = np.maximum(a, 0)
    else:
      a, b = x @ table['wi_0'][e], x @ table['wi_1'][e]
      hidden = gelu(a) * b
    outputs[at] = hidden @ table['wo'][e]
    d_hidden = table['wo'][e] @ g
    d_table['wo'][e] += np.outer(hidden, g)
    if 'wi' in table:
      d_inputs = {'wi': d_hidden * (a > 0)}
    else:
      d_inputs = {
        'wi_0': d_hidden * b * gelu_slope(a),
        'wi_1': d_hidden * gelu(a),
      }
    for name, d in d_inputs.items():
      d_table[name][e] += np.outer(x, d)
      d_tokens[at] += table[name][e] @ d
  return outputs, d_tokens, d_table


def make_case(seed, activations):
  rng = np.random.default_rng(seed)
  tokens = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
  cotangent = rng.normal(size=tokens.shape).astype(np.float32)
  # The ids are skewed, with padding and skipped words; some experts are absent.
  ids = rng.choice(
    [-1, NUM_EXPERTS, 0, 2, 2, 2, 2, 5, 7, 10], size=(BATCH, LENGTH)
  ).astype(np.int32)
  layer = word_experts.MoweLayer(NUM_EXPERTS, EXPERT_DIM, activations)
  params = drawn_parameters.variables(layer, tokens, ids, seed=seed)['params']
  return layer, params, tokens, ids, cotangent


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(apply, params, inputs, cotangent):
  """The outputs, and the gradients of what `apply` was given."""
  outputs, backward = jax.vjp(apply, params, inputs)
  return outputs, *backward(cotangent)


def close(actual, expected):
  expected = np.asarray(expected)
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )


@pytest.mark.slow
@pytest.mark.parametrize('activations', [('gelu', 'linear'), ('relu',)])
@pytest.mark.parametrize('seed', range(3))
def test_few_tokens_equal_the_loop(seed, activations):
  layer, params, tokens, ids, cotangent = make_case(seed, activations)
  outputs, d_params, d_tokens = with_gradients(
    lambda p, x: layer.apply({'params': p}, x, ids), params, tokens, cotangent
  )
  expected = oracle(tokens, ids, params['experts'], cotangent)
  close(outputs, expected[0])
  close(d_tokens, expected[1])
  for name, d in expected[2].items():
    close(d_params['experts'][name], d)


def make_plan(ids):
  planner = batch_plans.Planner(
    batch_plans.profile_ladder([{'encoder': ids}], NUM_EXPERTS), NUM_EXPERTS
  )
  return planner({'encoder': ids})


@pytest.fixture(params=[1, 2, 1000])
def experts_at_once(request, monkeypatch):
  """The number of experts per chunk: one, two with a rest, or all of them."""
  monkeypatch.setattr(grouped, 'experts_at_once', lambda _: request.param)


@pytest.mark.slow
@pytest.mark.parametrize('activations', [('gelu', 'linear'), ('relu',)])
@pytest.mark.parametrize('seed', range(2))
def test_planned_equals_the_loop(seed, activations, experts_at_once):
  layer, params, tokens, ids, cotangent = make_case(seed, activations)
  stream = make_plan(ids).encoder
  outputs, d_params, d_tokens = with_gradients(
    lambda p, x: layer.apply({'params': p}, x, plan=stream),
    params,
    tokens,
    cotangent,
  )
  expected = oracle(tokens, ids, params['experts'], cotangent)
  close(outputs, expected[0])
  close(d_tokens, expected[1])
  for name, d in expected[2].items():
    close(d_params['experts'][name], d)


@pytest.mark.slow
@pytest.mark.parametrize('activations', [('gelu', 'linear'), ('relu',)])
def test_gradients_of_some_experts_follow_from_the_factors(activations):
  layer, params, tokens, ids, cotangent = make_case(0, activations)
  plan = make_plan(ids)
  _, zeros = jax.eval_shape(
    lambda params: layer.apply(
      {'params': params},
      tokens,
      plan=plan.encoder,
      mutable=[word_experts.FACTORS],
    ),
    params,
  )
  _, d_params, factors = with_gradients(
    lambda p, f: layer.apply({'params': p} | f, tokens, plan=plan.encoder),
    params,
    jax.tree.map(lambda factor: np.zeros(factor.shape, factor.dtype), zeros),
    cotangent,
  )
  factors = factors[word_experts.FACTORS]
  expected = oracle(tokens, ids, params['experts'], cotangent)[2]
  for name, d in expected.items():
    # With a plan, tables have no gradient; factors hold what is needed for it.
    assert not d_params['experts'][name].any()
    for experts, sources in zip(*plan.updates, strict=True):
      got = grouped.kernel_gradient([factors[name]] * 2, sources)
      real = experts < NUM_EXPERTS
      # The layer is used twice, so the gradients of both uses add up.
      np.testing.assert_allclose(
        got[real], 2 * d[experts[real]], rtol=0, atol=1e-5 * np.abs(d).max()
      )
      np.testing.assert_array_equal(got[~real], 0)


def test_tokens_without_an_expert_give_zero():
  layer, params, tokens, _, _ = make_case(0, ('gelu', 'linear'))
  ids = np.full((BATCH, LENGTH), NUM_EXPERTS, np.int32)
  ids[0] = -1
  outputs = layer.apply({'params': params}, tokens, ids)
  np.testing.assert_array_equal(outputs, 0)


@pytest.mark.parametrize('seed', range(3))
def test_renumbering_experts_changes_nothing(seed):
  layer, params, tokens, ids, _ = make_case(seed, ('gelu', 'linear'))
  order = np.random.default_rng(seed).permutation(NUM_EXPERTS)
  new_number = np.append(np.argsort(order), [NUM_EXPERTS, -1]).astype(np.int32)
  renumbered = jax.tree.map(lambda w: w[order], params)
  actual = layer.apply({'params': renumbered}, tokens, new_number[ids])
  expected = layer.apply({'params': params}, tokens, ids)
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_one_expert_is_the_dense_feed_forward():
  tokens = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, EMBED))
  ids = jnp.zeros((BATCH, LENGTH), jnp.int32)
  layer = word_experts.MoweLayer(1, EXPERT_DIM)
  params = drawn_parameters.variables(layer, tokens, ids)['params']
  dense = {
    name: {'kernel': kernel[0]} for name, kernel in params['experts'].items()
  }
  expected = feed_forward.DenseFeedForward(EXPERT_DIM).apply(
    {'params': dense}, tokens
  )
  close(layer.apply({'params': params}, tokens, ids), expected)


# There are [3, 101] ids, more than the number that are gathered one by one.
MANY = {
  'uniform': lambda rng: rng.integers(-1, 68, (3, 101)),
  'skewed': lambda rng: np.minimum(rng.zipf(1.3, (3, 101)), 67) - 1,
  'one expert': lambda rng: np.full((3, 101), 5),
  'none': lambda rng: np.full((3, 101), 67),
  'out of range': lambda rng: rng.integers(-70, 300, (3, 101)),
}


@pytest.fixture(scope='module')
def many_tokens():
  """A layer, parameters, tokens, cotangents, and its compiled gradient."""
  layer = word_experts.MoweLayer(67, EXPERT_DIM)
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(3, 101, EMBED)).astype(np.float32)
  cotangent = rng.normal(size=tokens.shape).astype(np.float32)
  ids = np.zeros((3, 101), np.int32)
  params = drawn_parameters.variables(layer, tokens, ids)['params']

  @jax.jit
  def outputs_and_gradients(ids):
    outputs, backward = jax.vjp(
      lambda p, x: layer.apply({'params': p}, x, ids), params, tokens
    )
    return outputs, *backward(cotangent)

  return params, tokens, cotangent, outputs_and_gradients


@pytest.mark.slow
@pytest.mark.parametrize('kind', MANY)
def test_many_tokens_equal_the_loop(kind, many_tokens):
  params, tokens, cotangent, outputs_and_gradients = many_tokens
  ids = MANY[kind](np.random.default_rng(1)).astype(np.int32)
  outputs, d_params, d_tokens = outputs_and_gradients(ids)
  expected = oracle(tokens, ids, params['experts'], cotangent)
  close(outputs, expected[0])
  close(d_tokens, expected[1])
  for name, d in expected[2].items():
    close(d_params['experts'][name], d)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(2, 9), (3, 101)])
def test_dropout_is_the_same_with_and_without_a_plan(shape):
  layer = word_experts.MoweLayer(NUM_EXPERTS, EXPERT_DIM, dropout_rate=0.5)
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(*shape, EMBED)).astype(np.float32)
  ids = rng.integers(-1, NUM_EXPERTS + 1, shape).astype(np.int32)
  variables = drawn_parameters.variables(layer, tokens, ids)

  cotangent = rng.normal(size=tokens.shape).astype(np.float32)

  def gradient(**routing):
    apply = lambda params, tokens: layer.apply(
      {'params': params},
      tokens,
      **routing,
      deterministic=False,
      rngs={'dropout': jax.random.key(1)},
    )
    return with_gradients(apply, variables['params'], tokens, cotangent)

  planned = gradient(plan=make_plan(ids).encoder)
  unplanned = gradient(routing_ids=ids)
  jax.tree.map(close, unplanned, planned)
  still = jax.jit(layer.apply)(variables, tokens, ids)
  assert not np.allclose(planned[0], still)


def test_many_tokens_without_a_plan_need_little_memory():
  # The kernels of all tokens would take 4 * 4096 * 3 * 32 * 16 bytes, which is
  # 24 MiB. The table has 300 MiB.
  layer = word_experts.MoweLayer(50_000, 16)
  shapes = {'wi_0': (32, 16), 'wi_1': (32, 16), 'wo': (16, 32)}
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  params = {'experts': {n: struct(50_000, *s) for n, s in shapes.items()}}
  lowered = jax.jit(layer.apply).lower(
    {'params': params},
    struct(4, 1024, 32),
    jax.ShapeDtypeStruct((4, 1024), jnp.int32),
  )
  memory = lowered.compile().memory_analysis()
  assert memory.temp_size_in_bytes < 12 * 2**20


def test_axes_of_the_table():
  layer = word_experts.MoweLayer(NUM_EXPERTS, EXPERT_DIM)
  ids = jnp.zeros((1, 2), jnp.int32)
  variables = jax.eval_shape(
    layer.init, jax.random.key(0), jnp.ones((1, 2, EMBED)), ids
  )
  axes = flax.traverse_util.flatten_dict(variables['params_axes'], sep='/')
  assert axes['experts/wi_0_axes'].names == ('expert', 'embed', 'expert_mlp')
  assert axes['experts/wo_axes'].names == ('expert', 'expert_mlp', 'embed')


def test_bad_routing_ids_are_named():
  layer = word_experts.MoweLayer(NUM_EXPERTS, EXPERT_DIM)
  init = functools.partial(
    layer.init, jax.random.key(0), jnp.ones((2, 4, EMBED))
  )
  with pytest.raises(ValueError, match='T5Config.routing'):
    init(None)
  with pytest.raises(
    ValueError, match='Give the ids that RoutingVocabulary.encoder_ids'
  ):
    init(jnp.zeros((4, 2), jnp.int32))
