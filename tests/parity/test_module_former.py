"""Stick-breaking cases of moduleformer.json, made with the authors' code.

Runs on any folder in that format: `pytest tests/parity --golden_dir=DIR`. The
options of a case come from the JSON file alone.
"""

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers import stick_breaking


def pytest_generate_tests(metafunc):
  golden_cases.parametrize(metafunc, 'moduleformer', {'stick_breaking'})


@pytest.fixture(scope='module')
def golden(request):
  return golden_cases.read(request.config.parity_dir, 'moduleformer')


def test_attention(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  inputs = dict(arrays['inputs'])
  mask = visible(options, inputs.pop('keep', None))

  def run(params):
    query, key, value = params['q'], params['k'], params['v']
    # Values that show the weights.
    batch, length, heads, _ = key.shape
    ones = jnp.broadcast_to(
      jnp.eye(length)[None, :, None], (batch, length, heads, length)
    )
    attend = stick_breaking.stick_breaking_attention
    # [batch, query, groups, heads, key] -> [batch, groups, heads, query, key]
    weights = attend(query, key, ones, mask).transpose(0, 2, 3, 1, 4)
    return {'out': attend(query, key, value, mask), 'att': weights}

  with jax.default_matmul_precision('highest'):
    found, grads = golden_cases.values_and_gradients(
      options, run, inputs, arrays['cotangents']
    )
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)


def visible(options, keep):
  """<bool>[batch, 1, query, key]; queries stand at the last keys."""
  assert options['causal'] and options['remainder'] == 'dropped'
  num_queries, num_keys = options['query_length'], options['key_length']
  own = num_keys - num_queries + np.arange(num_queries)[:, None]
  behind = np.arange(num_keys)[None, :] - own
  mask = behind <= 0 if options['attend_current'] else behind < 0
  mask = np.broadcast_to(mask, (options['batch'], 1, num_queries, num_keys))
  return mask if keep is None else mask & (keep > 0)[:, None, None, :]
