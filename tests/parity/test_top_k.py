"""Tests every case of topk_ffn.json against arrays made with the paper's code.

The tests run on any folder in that format: `pytest tests/parity
--golden_dir=DIR`. All options of a case come from the JSON file.
"""

import golden_cases
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mowe.layers import linear, top_k_feed_forward

_BY_EFFECT = {'activation': False, 'activation_times_value_norm': True}


def pytest_generate_tests(metafunc):
  golden_cases.parametrize(metafunc, 'topk_ffn', {'topk_ffn'})


@pytest.fixture(scope='module')
def golden(request):
  return golden_cases.read(request.config.parity_dir, 'topk_ffn')


def test_layer(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  rate = options['dropout_rate']
  layer = top_k_feed_forward.TopKFeedForward(
    options['mlp_dim'],
    k=options['k'],
    ranks_by_effect=_BY_EFFECT[options['rank_by']],
    use_bias=True,
    dropout_rate=rate,
  )

  def run(params):
    hidden = []

    def look(call, args, kwargs, context):
      if isinstance(context.module, nn.Dropout) and rate:
        return args[0] * arrays['inputs']['drop_keep'] / (1 - rate)
      if context.method_name == '__call__':
        if isinstance(context.module, linear.Dense):
          hidden.append(args[0])
      return call(*args, **kwargs)

    with nn.intercept_methods(look):
      outputs = layer.apply({'params': as_tree(params)}, params['x'])
    # `u` is what the second dense layer reads.
    return {'y': outputs, 'u': hidden[-1]}

  params = arrays['params']
  if options['identity_weights']:
    params = identity(options['embed_dim'], options['mlp_dim'])
  with jax.default_matmul_precision('highest'):
    found, grads = golden_cases.values_and_gradients(
      options,
      run,
      params | {'x': arrays['inputs']['x']},
      arrays['cotangents'],
    )
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)


def as_tree(params):
  """Puts the parameters of a case under the names of the layer."""
  return {
    'wi': {'kernel': params['w1'].T, 'bias': params['b1']},
    'wo': {'kernel': params['w2'].T, 'bias': params['b2']},
  }


def identity(embed_dim, mlp_dim):
  return {
    'w1': jnp.eye(mlp_dim, embed_dim),
    'b1': jnp.zeros(mlp_dim),
    'w2': jnp.eye(embed_dim, mlp_dim),
    'b2': jnp.zeros(embed_dim),
  }
