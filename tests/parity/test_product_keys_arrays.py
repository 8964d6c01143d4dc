"""Tests every case of pkm.json against arrays made with the paper's code.

The tests run on any folder in that format: `pytest tests/parity
--golden_dir=DIR`. All options of a case come from the JSON file.
"""

import golden_cases
import jax
import jax.numpy as jnp
import pytest

from mowe.layers.memory import product_keys


def pytest_generate_tests(metafunc):
  golden_cases.parametrize(metafunc, 'pkm', {'pkm'})


@pytest.fixture(scope='module')
def golden(request):
  return golden_cases.read(request.config.parity_dir, 'pkm')


@pytest.mark.slow
def test_layer(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  layer = make_layer(options)

  def run(params):
    outputs = layer.apply({'params': as_tree(params)}, params['x'])
    found = {'y': outputs}
    if options['path'] == 'sparse':
      found |= selection(options, params)
    return found

  with jax.default_matmul_precision('highest'):
    found, grads = golden_cases.values_and_gradients(
      options,
      run,
      arrays['params'] | {'x': arrays['inputs']['x']},
      arrays['cotangents'],
    )
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)


def make_layer(options):
  num_keys = options['num_keys']
  first, second = [num_keys] * 2 if isinstance(num_keys, int) else num_keys
  fields = {
    'num_values': first * second,
    'num_first_keys': first,
    'num_heads': options['num_heads'],
    'activation': options['activation'],
    'use_query_projection': options['query_projection'],
  }
  if options['path'] == 'dense':
    return product_keys.DenseProductKeyMemory(**fields)
  assert options['path'] == 'sparse', options['path']
  return product_keys.ProductKeyMemory(**fields, knn=options['knn'])


def as_tree(params):
  """Puts the parameters of a case under the names of the layer."""
  tree = {
    'keys_0': params['keys.0'],
    'keys_1': params['keys.1'],
    'values': params['values.weight'],
  }
  if 'query_proj.weight' in params:
    tree['query'] = {
      'kernel': params['query_proj.weight'].T,
      'bias': params['query_proj.bias'],
    }
  return tree


def selection(options, params):
  """The chosen values and their scores, [tokens, heads, knn]."""
  queries = params['x'].reshape(-1, 1, options['embed_dim'])
  if options['query_projection']:
    queries = queries[:, 0] @ params['query_proj.weight'].T
    queries += params['query_proj.bias'][None]
    queries = queries.reshape(-1, options['num_heads'], options['embed_dim'])
  keys = [params['keys.0'], params['keys.1']]
  index, scores = product_keys.best_pairs(
    *product_keys.half_scores(queries, keys), options['knn']
  )
  return {'indices': index.astype(jnp.int32), 'scores': scores}
