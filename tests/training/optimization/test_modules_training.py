"""Tests training of added modules alone, and optimizer states after surgery.

Also tests `modules_state`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mowe.models.surgery import modules_edits
from mowe.training.optimization import (
  modules_state,
  modules_training,
  optimizers,
)

# One kernel is [expert, embed, expert_mlp], one is that of a router, and one
# stays.
SHAPES = {
  ('mlp', 'expert', 'wi', 'kernel'): (4, 3, 5),
  ('mlp', 'router', 'w', 'kernel'): (6, 4),
  ('norm', 'scale'): (3,),
}
AXES = {
  ('mlp', 'expert', 'wi', 'kernel'): ('expert', 'embed', 'expert_mlp'),
  ('mlp', 'router', 'w', 'kernel'): ('unmodeled', 'unmodeled'),
  ('norm', 'scale'): ('embed',),
}
SLABS, COLUMNS, NORM = SHAPES
OPTIMIZERS = {
  'adam': optimizers.ClipByGlobalNorm(optimizers.AdamW(0.1)),
  'adafactor': optimizers.Adafactor(0.1),
  'factored router': optimizers.Adafactor(0.1, min_dim_size_to_factor=4),
  'momentum': optimizers.Freeze(optimizers.Adafactor(0.1, beta1=0.9), 'norm.*'),
}


def tree(values):
  nested = {}
  for path, value in values.items():
    inner = nested
    for name in path[:-1]:
      inner = inner.setdefault(name, {})
    inner[path[-1]] = value
  return nested


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  return {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in SHAPES.items()
  }


def state_after_a_step(optimizer, params):
  built = optimizer.build(tree(AXES))
  given = tree(params)
  state = jax.jit(built.init)(given)
  _, state = jax.jit(built.update)(tree(make_params(1)), state, given)
  return built, state


def edited(name, state, edits):
  return modules_state.edit(
    state, edits, SHAPES, AXES, 4 if name == 'factored router' else 128
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_states_keep_what_is_left(name):
  params = make_params()
  _, state = state_after_a_step(OPTIMIZERS[name], params)
  kept = (0, 2, 3)
  edits = {
    SLABS: modules_edits.Take(0, kept),
    COLUMNS: modules_edits.Take(1, kept),
  }
  fewer = {p: edits[p].apply(x) if p in edits else x for p, x in params.items()}
  actual = edited(name, state, edits)
  shapes = jax.eval_shape(OPTIMIZERS[name].build(tree(AXES)).init, tree(fewer))
  is_same = lambda one, other: one.shape == other.shape
  assert all(jax.tree.leaves(jax.tree.map(is_same, actual, shapes)))
  if name == 'factored router':
    # The kernel [6, 4] was factored, and [6, 3] is not.
    assert not np.asarray(actual.v['mlp']['router']['w']['kernel']).any()
    return
  # The statistics of an expert are its own, so they must equal those of a step
  # with fewer experts.
  built = OPTIMIZERS[name].build(tree(AXES))
  gradients = make_params(1)
  gradients = {
    p: edits[p].apply(x) if p in edits else x for p, x in gradients.items()
  }
  if name == 'adam':
    # Clipping uses the norm of all gradients together.
    return
  state = jax.jit(built.init)(tree(fewer))
  _, expected = jax.jit(built.update)(tree(gradients), state, tree(fewer))
  moments = lambda whole: [
    x
    for path, x in jax.tree_util.tree_leaves_with_path(whole)
    if 'expert' in jax.tree_util.keystr(path)
  ]
  for one, other in zip(moments(actual), moments(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_states_of_new_modules_are_zero():
  params = make_params()
  edits = {
    SLABS: modules_edits.Append(0, np.ones((1, 3, 5), np.float32)),
    COLUMNS: modules_edits.Append(1, np.ones((6, 1), np.float32)),
  }
  for name, optimizer in OPTIMIZERS.items():
    _, state = state_after_a_step(optimizer, params)
    actual = edited(name, state, edits)
    more = {
      p: edits[p].apply(x) if p in edits else x for p, x in params.items()
    }
    shapes = jax.eval_shape(optimizer.build(tree(AXES)).init, tree(more))
    is_same = lambda one, other: one.shape == other.shape
    assert all(jax.tree.leaves(jax.tree.map(is_same, actual, shapes)))
    for before, after in zip(
      jax.tree.leaves(state), jax.tree.leaves(actual), strict=True
    ):
      after = np.asarray(after)
      if before.shape != after.shape:
        axis = int(np.argmax(np.not_equal(before.shape, after.shape)))
        old, new = np.split(after, [before.shape[axis]], axis)
        np.testing.assert_array_equal(old, before)
        assert not new.any()


def test_other_statistics_are_refused():
  sliced = {'mu': tree({SLABS: np.zeros((2, 3, 5), np.float32)})}
  edits = {SLABS: modules_edits.Take(0, (0, 1))}
  with pytest.raises(ValueError, match='Leave the state of the optimizer out'):
    modules_state.edit(sliced, edits, SHAPES, AXES)


PARTS = {'mlp/expert/wi/kernel': (0, 1), 'mlp/router/w/kernel': (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adam', 'adafactor'])
def test_only_new_slices_change(name):
  params = tree(make_params())
  built = modules_training.train_parts(
    PARTS, OPTIMIZERS[name].build(tree(AXES))
  )
  gradients = tree(make_params(1))
  state = jax.jit(built.init)(params)
  updates, state = jax.jit(built.update)(gradients, state, params)
  new = optax.apply_updates(params, updates)
  slabs, old_slabs = (x['mlp']['expert']['wi']['kernel'] for x in (new, params))
  columns, old_columns = (
    x['mlp']['router']['w']['kernel'] for x in (new, params)
  )
  np.testing.assert_array_equal(slabs[:3], old_slabs[:3])
  np.testing.assert_array_equal(columns[:, :3], old_columns[:, :3])
  np.testing.assert_array_equal(new['norm']['scale'], params['norm']['scale'])
  assert (slabs[3] != old_slabs[3]).all()
  assert (columns[:, 3] != old_columns[:, 3]).all()
  # The result is as if no other parameters existed: only this norm is clipped.
  alone = lambda x: {
    'mlp': {
      'expert': {'wi': {'kernel': x['mlp']['expert']['wi']['kernel'][3:]}},
      'router': {'w': {'kernel': x['mlp']['router']['w']['kernel'][:, 3:]}},
    }
  }
  inner = OPTIMIZERS[name].build(tree(AXES))
  state_alone = jax.jit(inner.init)(alone(params))
  expected, _ = jax.jit(inner.update)(
    alone(gradients), state_alone, alone(params)
  )
  np.testing.assert_allclose(
    updates['mlp']['expert']['wi']['kernel'][3:],
    expected['mlp']['expert']['wi']['kernel'],
    rtol=1e-6,
  )
  largest = max(jnp.size(x) for x in jax.tree.leaves(state))
  assert largest <= 15


def test_others_are_trained_by_name():
  params = tree(make_params())
  built = modules_training.train_parts(
    PARTS, optax.sgd(1.0), '(.*/)?scale|.*/router/.*'
  )
  gradients = tree(make_params(1))
  updates, _ = built.update(gradients, built.init(params), params)
  assert (updates['norm']['scale'] != 0).all()
  assert (updates['mlp']['router']['w']['kernel'] != 0).all()
  assert not updates['mlp']['expert']['wi']['kernel'][:3].any()
