"""Tests optimizers: parity with T5X's Adafactor, and the combinators.

Also tests `adafactor_transform` and `factoring_rules`.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mowe.training import partitioning
from mowe.training.optimization import adafactor_transform, optimizers

_GOLDEN = pathlib.Path(__file__).parents[2] / 'golden' / 't5x_adafactor.npz'

# These axes are those of tests/golden/t5x_adafactor.md.
_AXES = {
  'big': ('embed', 'mlp'),
  'small': ('embed', 'joined_kv'),
  'scale': ('embed',),
  'wi': ('expert', 'embed', 'expert_mlp'),
  'wo': ('expert', 'expert_mlp', 'mlp_embed'),
  'heads': ('embed', 'heads', 'kv'),
  'scanned': ('layers', 'expert', 'embed', 'expert_mlp'),
  'scanned_scale': ('layers', 'embed'),
  'unfactored': ('expert', 'embed', 'unmodeled'),
}
_CONFIGS = {
  'default': {},
  'momentum': {'beta1': 0.9, 'weight_decay_rate': 0.01},
  'absolute': {
    'multiply_by_parameter_scale': False,
    'clipping_threshold': None,
    'decay_rate': 0.7,
  },
  'offset': {'step_offset': 1000, 'clipping_threshold': 0.5},
}


@pytest.fixture(scope='module')
def golden():
  with np.load(_GOLDEN) as arrays:
    return dict(arrays)


def _assert_close(actual, expected, name):
  """Compares with a tolerance relative to the largest entry."""
  assert actual.shape == expected.shape, name
  tolerance = 1e-5 * np.max(np.abs(expected))
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=tolerance, err_msg=name
  )


@pytest.fixture
def small_cache(monkeypatch):
  """Stacks of matrices [6, 7] are updated in parts of up to 4 matrices."""
  monkeypatch.setattr(adafactor_transform, '_BEYOND_CACHE', 0)
  monkeypatch.setattr(adafactor_transform, '_IN_CACHE', 4 * 6 * 7)


@pytest.mark.slow
@pytest.mark.parametrize('config', _CONFIGS)
def test_adafactor_equals_t5x(golden, config):
  _compare_with_t5x(golden, config)


@pytest.mark.usefixtures('small_cache')
def test_adafactor_in_parts_equals_t5x(golden):
  # 'wi' has 5 matrices, so its parts have 1. 'scanned' has 2 x 3, so its parts
  # have 3.
  _compare_with_t5x(golden, 'momentum')


@pytest.mark.usefixtures('small_cache')
def test_sharded_experts_stay_on_their_devices():
  mesh = partitioning.make_mesh(expert=4, data=2)
  optimizer = optimizers.Adafactor(0.1).build({'wi': _AXES['wi']})
  spec = jax.sharding.PartitionSpec

  def on_mesh(x):
    by_expert = spec('expert') if x.shape[:1] == (8,) else spec()
    sharding = jax.sharding.NamedSharding(mesh, by_expert)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  params = {'wi': jnp.zeros((8, 6, 7))}
  arguments = jax.tree.map(on_mesh, (params, optimizer.init(params), params))
  update = jax.jit(partitioning.on_mesh(optimizer.update, mesh))
  program = update.lower(*arguments).compile().as_text()
  assert 'all-gather' not in program
  assert 'while' not in program


def _compare_with_t5x(golden, config):
  offset = _CONFIGS[config].get('step_offset', 0)
  rates = jnp.asarray(golden['learning_rates'])
  optimizer = optimizers.Adafactor(
    lambda count: rates[count - offset], **_CONFIGS[config]
  ).build(_AXES)
  params = {name: jnp.asarray(golden[f'parameters/{name}']) for name in _AXES}
  state = optimizer.init(params)._replace(count=jnp.int32(offset))
  update = jax.jit(optimizer.update)
  for step in range(3):
    gradients = {name: golden[f'gradients/{step}/{name}'] for name in _AXES}
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    for name in _AXES:
      if f'{config}/{step}/{name}' in golden:
        expected = golden[f'{config}/{step}/{name}']
        _assert_close(params[name], expected, f'{name} after {step}')
  for kind in ('v_row', 'v_col', 'v', 'm'):
    for name in _AXES:
      if f'{config}/state/{kind}/{name}' in golden:
        expected = golden[f'{config}/state/{kind}/{name}']
        _assert_close(getattr(state, kind)[name], expected, f'{kind}/{name}')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['wi', 'wo', 'unfactored'])
def test_experts_do_not_see_each_other(golden, name):
  optimizer = optimizers.Adafactor(0.1, beta1=0.5).build({name: _AXES[name]})
  param = {name: jnp.asarray(golden[f'parameters/{name}'])}
  gradient = {name: jnp.asarray(golden[f'gradients/0/{name}'])}
  louder = {name: gradient[name].at[1:].multiply(100.0)}
  state = optimizer.init(param)
  first, _ = optimizer.update(gradient, state, param)
  second, _ = optimizer.update(louder, state, param)
  np.testing.assert_array_equal(first[name][0], second[name][0])


def test_axes_may_be_partition_specs_and_cover_more_than_the_parameters():
  # flax's get_axis_names returns jax.sharding.PartitionSpec.
  spec = jax.sharding.PartitionSpec
  axes = {'layer': {'wi': spec('expert', 'embed', 'expert_mlp')}, 'other': ()}
  params = {'layer': {'wi': jnp.ones((2, 3, 4))}}
  state = optimizers.Adafactor(0.1).build(axes).init(params)
  assert state.v_row['layer']['wi'].shape == (2, 3)
  assert state.v_col['layer']['wi'].shape == (2, 4)
  assert state.v['layer']['wi'].shape == (1,)


def test_adafactor_errors_say_what_to_do():
  params = {'wi': jnp.ones((2, 3, 4))}
  with pytest.raises(ValueError, match="'width' of wi .* Add it to factor_rul"):
    axes = {'wi': ('expert', 'width', 'expert_mlp')}
    optimizers.Adafactor(0.1).build(axes).init(params)
  # As in T5X, an axis name without a rule is an error, whatever the rank.
  with pytest.raises(ValueError, match='Add it to factor_rules'):
    optimizers.Adafactor(0.1).build({'a': ('width',)}).init({'a': jnp.ones(3)})
  with pytest.raises(ValueError, match='Give adafactor the logical_axes'):
    optimizers.Adafactor(0.1).build(None).init(params)
  with pytest.raises(ValueError, match='wi is missing'):
    optimizers.Adafactor(0.1).build({'wo': ('embed',)}).init(params)
  with pytest.raises(ValueError, match='Correct its param_with_axes'):
    optimizers.Adafactor(0.1).build({'wi': ('expert', 'embed')}).init(params)
  with pytest.raises(ValueError, match='must have no NONE axis'):
    axes = {'wi': ('embed', 'relpos_buckets', 'mlp')}
    optimizers.Adafactor(0.1).build(axes).init(params)
  with pytest.raises(ValueError, match='update\\(gradients, state, params'):
    optimizer = optimizers.Adafactor(0.1).build(None)
    optimizer.update({}, optimizer.init({}))


def test_factor_rules_may_be_text_of_any_case():
  optimizer = optimizers.Adafactor(
    0.1, factor_rules={'a': 'BATCH', 'b': 'Row', 'c': 'column'}
  ).build({'w': ('a', 'b', 'c')})
  state = optimizer.init({'w': jnp.ones((2, 3, 4))})
  assert state.v_row['w'].shape == (2, 3)


def test_bfloat16_parameters_keep_their_dtype():
  optimizer = optimizers.Adafactor(0.1).build(None)
  params = {'w': jnp.ones((3, 4), jnp.bfloat16)}
  updates, state = optimizer.update(params, optimizer.init(params), params)
  assert updates['w'].dtype == jnp.bfloat16
  assert state.v['w'].dtype == jnp.float32


def test_adamw_does_not_decay_norms_and_biases():
  params = {
    'mlp': {'kernel': jnp.full((2, 3), 2.0), 'bias': jnp.full(3, 2.0)},
    'norm': {'scale': jnp.full(3, 2.0)},
    'scaled': jnp.full(3, 2.0),
  }
  optimizer = optimizers.AdamW(0.1, weight_decay=0.5).build()
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  # The gradients are zero, so only the decay changes anything: 0.1 * 0.5 * 2 =
  # 0.1.
  np.testing.assert_allclose(updates['mlp']['kernel'], -0.1, rtol=1e-6)
  np.testing.assert_allclose(updates['scaled'], -0.1, rtol=1e-6)
  np.testing.assert_array_equal(updates['mlp']['bias'], 0.0)
  np.testing.assert_array_equal(updates['norm']['scale'], 0.0)


@pytest.mark.parametrize(
  'inner',
  [optimizers.Adafactor(0.1), optimizers.AdamW(0.1, weight_decay=0.1)],
  ids=['adafactor', 'adamw'],
)
def test_frozen_parameters_have_no_state_and_stay(inner):
  params = {
    'encoder': {'kernel': jnp.ones((5, 6))},
    'decoder': {'kernel': jnp.ones((3, 4))},
  }
  axes = {part: {'kernel': ('embed', 'mlp')} for part in params}
  optimizer = optimizers.Freeze(
    optimizers.ClipByGlobalNorm(inner, 1.0), 'encoder/.*'
  ).build(axes)
  state = optimizer.init(params)
  shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
  assert (3, 4) in shapes and (5, 6) not in shapes
  # A NaN in a frozen part must reach neither the norm nor the other part.
  gradients = {
    'encoder': {'kernel': jnp.full((5, 6), jnp.nan)},
    'decoder': {'kernel': jnp.ones((3, 4))},
  }
  updates, state = optimizer.update(gradients, state, params)
  np.testing.assert_array_equal(updates['encoder']['kernel'], 0.0)
  assert np.all(np.asarray(updates['decoder']['kernel']) < 0)


def test_the_number_of_frozen_entries_passes_through_wrappers():
  frozen = optimizers.ClipByGlobalNorm(
    optimizers.Freeze(
      optimizers.Freeze(optimizers.Adafactor(0.1), 'encoder/.*'), 'decoder/.*'
    )
  )
  # A parameter [2, 3] has six numbers.
  assert frozen.num_frozen(('encoder', 'kernel'), (2, 3)) == 6
  assert frozen.num_frozen(('decoder', 'kernel'), (2, 3)) == 6
  assert frozen.num_frozen(('norm', 'scale'), (3,)) == 0


def test_a_pattern_that_freezes_nothing_is_an_error():
  optimizer = optimizers.freeze('encodr/.*', optax.sgd(0.1))
  with pytest.raises(ValueError, match='matches none of encoder/kernel'):
    optimizer.init({'encoder': {'kernel': jnp.ones(2)}})


def test_global_norm_is_of_all_gradients_together():
  optimizer = optimizers.ClipByGlobalNorm(_Sgd(), max_norm=1.0).build(None)
  gradients = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
  updates, _ = optimizer.update(gradients, optimizer.init(gradients))
  # The norm is 5, so each gradient is divided by 5.
  np.testing.assert_allclose(updates['a'], [-0.6], rtol=1e-6)
  np.testing.assert_allclose(updates['b'], [-0.8], rtol=1e-6)


class _Sgd:
  def build(self, logical_axes):
    del logical_axes
    return optax.sgd(1.0)


def test_adafactor_is_a_plain_formula_on_one_matrix():
  # After one update from zero, v is the factored g^2 itself.
  gradient = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
  optimizer = optimizers.Adafactor(
    0.1, multiply_by_parameter_scale=False, min_dim_size_to_factor=2
  ).build(None)
  params = {'w': jnp.zeros((2, 2))}
  updates, _ = optimizer.update(
    {'w': jnp.asarray(gradient)}, optimizer.init(params), params
  )
  # Since g^2 has rank one, its factors are exact, and g / |g| = 1 everywhere.
  np.testing.assert_allclose(updates['w'], -0.1, rtol=1e-5)
