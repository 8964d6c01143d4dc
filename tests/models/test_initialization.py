"""Tests fresh parameters: few programs, right values, and right devices.

Also tests `parameters`.
"""

import contextlib
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mowe.layers import parameter
from mowe.layers.memory import word_experts
from mowe.models import initialization, parameters, threefry
from mowe.models.t5 import t5, t5_config
from mowe.training import partitioning

# These tests compare bits across programs.
pytestmark = pytest.mark.optimized


_EXPERTS = 12


def _model(depth=2, emb_dim=32, **changes):
  settings = {
    'vocab_size': 48,
    'emb_dim': emb_dim,
    'num_heads': 4,
    'head_dim': 8,
    'mlp_dim': 40,
    'num_encoder_layers': depth,
    'num_decoder_layers': depth,
    'sparse_feed_forward': functools.partial(
      word_experts.MoweLayer, _EXPERTS, 20
    ),
    'sparse_encoder_layers': (1,),
    'sparse_decoder_layers': (1,),
  }
  return t5.T5(t5_config.T5Config(**(settings | changes)))


def _flat(params):
  return flax.traverse_util.flatten_dict(jax.device_get(params), sep='/')


@functools.cache
def _parameters(depth=2):
  return _flat(
    initialization.initial_parameters(_model(depth), threefry.key(0))
  )


def _assert_same_bits(actual, expected):
  assert set(actual) == set(expected)
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)


@contextlib.contextmanager
def _compilations():
  """A list that is filled with the programs compiled in the meantime."""
  compiled = []

  def listen(event, duration, **unused):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_one_program_for_each_kind_of_parameter():
  # No other test has this width, so nothing is compiled yet.
  draw = lambda depth: jax.block_until_ready(
    initialization.initial_parameters(
      _model(depth, emb_dim=34), threefry.key(0)
    )
  )
  with _compilations() as compiled:
    draw(depth=2)
  # Ten kinds need a program each: embedding and logits; relpos_bias; scale;
  # query; key and value; out; wi; wo; and wi and wo of experts. Keys need a few
  # more.
  assert 10 <= len(compiled) <= 15
  with _compilations() as compiled:
    draw(depth=5)
  assert not compiled


@pytest.mark.slow
def test_the_tree_is_linens():
  model = _model()
  drawn = initialization.initial_parameters(model, jax.random.key(0))
  linen = jax.eval_shape(
    functools.partial(parameters.initial_variables, model), jax.random.key(0)
  )['params']
  assert jax.tree.structure(drawn) == jax.tree.structure(linen)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
    lambda x: (x.shape, x.dtype), linen
  )


@pytest.mark.slow
def test_values_are_distributed_as_linens():
  init = jax.jit(functools.partial(parameters.initial_variables, _model()))
  linen = _flat(init(jax.random.key(1))['params'])
  for name, value in _parameters().items():
    # The tolerance is three standard errors of the difference of two estimates.
    rtol = 3 * (1 / value.size) ** 0.5
    np.testing.assert_allclose(
      np.sqrt(np.mean(value**2)),
      np.sqrt(np.mean(linen[name] ** 2)),
      rtol=rtol,
      err_msg=name,
    )
    if not name.endswith('scale'):
      assert abs(value.mean()) < 4 * value.std() * value.size**-0.5, name


def test_the_standard_deviations_of_t5():
  wanted = {
    'token_embedder/embedding': 1.0,
    'encoder/layers_0/attention/query/kernel': (32 * 8) ** -0.5,
    'encoder/layers_0/attention/key/kernel': 32**-0.5,
    'encoder/layers_0/mlp/wo/kernel': 40**-0.5,
    'experts/wi_0': 32**-0.5,
    # These are ten times smaller than in T5.
    'experts/wo': 0.1 * 20**-0.5,
  }
  for name, deviation in wanted.items():
    assert _parameters()[name].std() == pytest.approx(deviation, rel=0.1), name


def test_no_two_parameters_are_alike():
  seen = [
    value.tobytes()
    for name, value in _parameters().items()
    if not name.endswith('scale')
  ]
  assert len(set(seen)) == len(seen)


def test_values_depend_on_seed_and_name_alone():
  again = _flat(initialization.initial_parameters(_model(), threefry.key(0)))
  _assert_same_bits(again, _parameters())
  deeper = _parameters(depth=3)
  _assert_same_bits(
    {name: deeper[name] for name in _parameters()}, _parameters()
  )
  other = _flat(initialization.initial_parameters(_model(), threefry.key(1)))
  for name, value in other.items():
    same = np.array_equal(value, _parameters()[name])
    assert same == name.endswith('scale'), name


@pytest.mark.slow
def test_under_jit_the_values_are_the_same():
  draw = jax.jit(functools.partial(initialization.initial_parameters, _model()))
  actual = _flat(draw(threefry.key(0)))
  for name, value in _parameters().items():
    np.testing.assert_allclose(actual[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes',
  [{'data': 8}, {'expert': 4, 'model': 2}],
  ids=['data', 'expert x model'],
)
def test_on_eight_devices_the_values_are_the_same(sizes):
  model = _model()
  mesh = partitioning.make_mesh(**sizes)
  variables = initialization.abstract_variables(model)
  axes = partitioning.parameter_axes(variables['params_axes'])
  shardings = partitioning.state_shardings(variables['params'], axes, mesh)
  drawn = initialization.initial_parameters(model, threefry.key(0), shardings)
  jax.tree.map(
    lambda x, sharding: np.testing.assert_equal(x.sharding, sharding),
    drawn,
    shardings,
  )
  _assert_same_bits(_flat(drawn), _parameters())


def test_no_device_holds_more_than_its_part():
  mesh = partitioning.make_mesh(expert=8)
  shape = (1024, 32, 20)
  compiled = (
    jax.jit(
      parameter.Recipe(parameter.normal(), shape, jnp.float32),
      out_shardings=partitioning.sharding_of_axes(
        ('expert', 'embed', 'expert_mlp'), mesh
      ),
    )
    .lower(threefry.key(0))
    .compile()
    .memory_analysis()
  )
  part = 4 * np.prod(shape) // 8
  assert compiled.output_size_in_bytes == part
  assert compiled.temp_size_in_bytes < part / 100


class _UndeclaredLayer(nn.Module):
  """A feed-forward by someone who knows only Linen."""

  dropout_rate: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens, routing_ids=None, *, deterministic=True):
    del routing_ids, deterministic
    width = tokens.shape[-1]
    return tokens @ self.param('own', nn.initializers.normal(), (width, width))


def test_a_layer_that_declares_nothing_is_drawn_by_linen():
  model = _model(sparse_feed_forward=_UndeclaredLayer)
  drawn = _flat(initialization.initial_parameters(model, jax.random.key(3)))
  init = jax.jit(functools.partial(parameters.initial_variables, model))
  linen = _flat(init(jax.random.key(3))['params'])
  own = [name for name in linen if name.endswith('own')]
  assert len(own) == 2
  for name in own:
    np.testing.assert_allclose(drawn[name], linen[name], rtol=1e-6)
  assert set(drawn) == set(linen)


@pytest.mark.parametrize('rows', [[11, 0, 5], list(range(12)) * 2, [7]])
def test_any_rows_are_drawn_with_the_bits_of_the_whole_table(monkeypatch, rows):
  # The most rows are more than one call draws.
  monkeypatch.setattr(initialization, '_ROOMS', (4, 16))
  whole = _parameters()
  names = {'wi_0': None, 'wi_1': None, 'wo': None}
  draw = initialization.initial_rows(
    _model(), threefry.key(0), {'experts': names}
  )
  drawn = draw(np.array(rows))
  # JAX would compile a program for each number of rows to cut them.
  assert all(type(x) is np.ndarray for x in jax.tree.leaves(drawn))
  _assert_same_bits(
    _flat(drawn),
    {f'experts/{name}': whole[f'experts/{name}'][rows] for name in names},
  )


def test_variables_are_traced_once_for_the_same_config(monkeypatch):
  traced, make = [], parameters.initial_variables

  def counted(model, key, **settings):
    traced.append(model)
    return make(model, key, **settings)

  monkeypatch.setattr(parameters, 'initial_variables', counted)
  model = _model()
  first = initialization.abstract_variables(model)
  # The tree is the caller's own.
  del first['params']['encoder']
  again = initialization.abstract_variables(t5.T5(model.config))
  assert 'encoder' in again['params'] and len(traced) == 1
  # What a factory makes may have changed, though it is the same.
  factory = model.config.sparse_feed_forward
  equal = _model(sparse_feed_forward=factory)
  assert equal == model
  initialization.abstract_variables(equal)
  assert len(traced) == 2
