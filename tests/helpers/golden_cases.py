"""Reads cases of golden arrays, and compares computed arrays with them.

All options of a case come from the JSON file beside the arrays. So the tests
run on any folder in that format: `pytest tests/parity --golden_dir=DIR`.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def parametrize(metafunc, name, kinds):
  """Makes a test for each case of these kinds; without the file, one skips."""
  path = metafunc.config.parity_dir / f'{name}.json'
  if not path.is_file():
    reason = f'needs {path}; name its folder with --golden_dir'
    skip = pytest.param(None, marks=pytest.mark.skip(reason=reason))
    metafunc.parametrize('case', [skip])
    return
  cases = json.loads(path.read_text())['cases']
  names = [name for name, case in cases.items() if case['kind'] in kinds]
  metafunc.parametrize('case', names)


def read(folder, name):
  """The content of the JSON file, and all arrays by name."""
  with np.load(folder / f'{name}.npz') as arrays:
    arrays = dict(arrays)
  return json.loads((folder / f'{name}.json').read_text()), arrays


def values_and_gradients(options, run, params, cotangents=None):
  """The outputs of `run` with the objectives, and their gradients by name.

  Args:
    options: the options of a case.
    run: maps parameters to a dict of outputs.
    params: the parameters.
    cotangents: a cotangent of each output. Their sum of products is the
      objective if `run` does not return its value.
  """
  objectives = {
    name: weights
    for name, weights in options['objectives'].items()
    if options['comparison'].get(name) != 'optional'
  }
  if not objectives:
    return jax.jit(run)(params), {}
  found, grads = {}, {}
  for name, weights in objectives.items():

    def objective(params, weights=weights):
      found = run(params)
      total = 0.0
      for role, weight in weights.items():
        parts = {role: 1.0} if role in found else cotangents
        for output, cotangent in parts.items():
          total += weight * jnp.sum(found[output] * cotangent)
      return total, found

    differentiated = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (total, values), grads[name] = differentiated(params)
    found |= values | {name: total}
  return found, grads


def load(golden, case):
  """The options of a case, its given arrays, and a function that compares."""
  document, arrays = golden
  options = document['cases'][case]
  read = lambda roles: {role: arrays[name] for role, name in roles.items()}
  groups = options['arrays']
  given = {
    part: jax.tree.map(jnp.asarray, read(groups[part]))
    for part in ('inputs', 'params', 'cotangents')
  }

  def check(part, found, key=None):
    roles = groups[part] if key is None else groups[part][key]
    rules = options['comparison']
    expected = read(roles)
    found = {r: np.asarray(x) for r, x in found.items() if r in expected}
    unordered = [
      role for role in expected if rules.get(role) == 'unordered_slots'
    ]
    if unordered:
      found |= in_order({role: found[role] for role in unordered})
      expected |= in_order({role: expected[role] for role in unordered})
    for role, array in expected.items():
      rule = rules.get(role)
      if role not in found and rule == 'optional':
        continue
      kind = 'log' if rule == 'log' else part
      got = found[role]
      if rule == 'kept_rows':
        kept = np.asarray(given['inputs']['keep']) > 0
        got, array = got[kept], array[kept]
      compare(
        got,
        array,
        rule=rule,
        tolerance=document['tolerances'][kind],
        capacity=options.get('capacity'),
        what=f'{case}: {part} {role}',
      )

  return options, given, check


def in_order(slots):
  """Sorts slots along the last axis by index; those of weight 0 come last.

  `slots` has an array of indices, and may have one of weights.
  """
  index, *weights = sorted(slots.values(), key=lambda x: x.dtype.kind != 'i')
  if weights:
    index = np.where(weights[0] == 0, np.iinfo(np.int32).max, index)
  order = np.argsort(index, axis=-1, kind='stable')
  arrays = {
    role: index if array.dtype.kind == 'i' else array
    for role, array in slots.items()
  }
  return {
    role: np.take_along_axis(array, order, axis=-1)
    for role, array in arrays.items()
  }


def compare(found, expected, *, rule, tolerance, capacity, what):
  assert found.shape == expected.shape, what
  if rule == 'clip_positions':
    clip = functools.partial(np.minimum, [np.iinfo(np.int32).max, capacity])
    found, expected = clip(found), clip(expected)
  if np.issubdtype(expected.dtype, np.integer):
    np.testing.assert_array_equal(found, expected, err_msg=what)
    return
  if rule == 'log':
    found, expected = np.log(found), np.log(expected)
  largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
  np.testing.assert_allclose(
    found,
    expected,
    rtol=tolerance['rtol'],
    atol=tolerance['atol'] + tolerance['max_rtol'] * largest,
    err_msg=what,
  )
