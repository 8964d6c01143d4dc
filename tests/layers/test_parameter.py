"""Tests the declaration of parameters: Linen's view of it, and the recipe."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from mowe.layers import parameter

_KEY = jax.random.key(0)


class _Declared(nn.Module):
  @nn.compact
  def __call__(self):
    kernel = parameter.declare(
      self, 'kernel', parameter.normal(0.5), (3, 2), axes=('embed', 'mlp')
    )
    self.sow('intermediates', 'seen', jnp.ones(()))
    return kernel


class _Plain(nn.Module):
  @nn.compact
  def __call__(self):
    return partitioning.param_with_axes(
      'kernel',
      nn.initializers.normal(0.5),
      (3, 2),
      jnp.float32,
      axes=('embed', 'mlp'),
    )


class _Twice(nn.Module):
  layer: type[nn.Module]

  def setup(self):
    self.inner = self.layer()

  def __call__(self):
    return self.inner() + self.inner()


def test_linen_sees_what_param_with_axes_gives():
  actual, expected = (_Twice(layer).init(_KEY) for layer in (_Declared, _Plain))
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  assert set(actual) == {'params', 'params_axes'}
  assert actual['params_axes'] == expected['params_axes']
  np.testing.assert_array_equal(
    actual['params']['inner']['kernel'], expected['params']['inner']['kernel']
  )


def test_the_recipe_is_left_to_who_asks():
  variables = jax.eval_shape(
    lambda key: _Twice(_Declared).init(
      key, mutable=['params', 'intermediates']
    ),
    _KEY,
  )
  recipe = variables['intermediates']['inner']['kernel']
  assert recipe == parameter.Recipe(parameter.normal(0.5), (3, 2), jnp.float32)
  values = recipe(_KEY)
  np.testing.assert_array_equal(
    values, nn.initializers.normal(0.5)(_KEY, (3, 2), jnp.float32)
  )


def test_applying_leaves_no_recipe():
  model = _Twice(_Declared)
  variables = model.init(_KEY)
  _, left = model.apply(variables, mutable=['intermediates'])
  assert set(flax.traverse_util.flatten_dict(left['intermediates'])) == {
    ('inner', 'seen')
  }


def test_equal_settings_are_the_same_function():
  scaled = lambda scale: parameter.variance_scaling(scale, 'fan_in', 'normal')
  assert scaled(1.0) is scaled(1.0)
  assert scaled(1.0) is not scaled(0.5)
