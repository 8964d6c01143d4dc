"""Tests the train step against a plain oracle; microbatches; frozen experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training

from mowe.layers.memory import grouped
from mowe.models import parameters
from mowe.models.t5 import t5
from mowe.training import loop, loss_spikes, losses, training_step
from mowe.training.optimization import (
  row_gradients,
  row_optimizers,
  table_updates,
)

_LOSS = training_step.LossConfig(label_smoothing=0.1, z_loss=1e-3)
_ABSENT = (2, 5, 11)
# With a small eps, Adam's first step would be the sign of gradients, which is
# unstable near zero.
_OPTIMIZER = optax.adam(1e-2, eps=1e-3)
_ROW_OPTIMIZERS = {
  'adafactor': row_optimizers.RowAdafactor(0.05),
  'adam': row_optimizers.RowAdam(0.05, eps=1e-3, weight_decay=0.1),
}


@functools.cache
def _model(**changes):
  return t5.T5(tiny_training.make_config(**changes))


@functools.cache
def _initial(rows='adafactor'):
  row_optimizer = _ROW_OPTIMIZERS.get(rows)
  return tiny_training.make_state(_model(), _OPTIMIZER, row_optimizer, seed=3)


@functools.cache
def _step(rows='adafactor', num_microbatches=1, dropout=0.0, seed=0):
  return jax.jit(
    training_step.make_train_step(
      _model(dropout_rate=dropout),
      optimizer=_OPTIMIZER,
      row_optimizer=_ROW_OPTIMIZERS.get(rows),
      loss=_LOSS,
      seed=seed,
      num_microbatches=num_microbatches,
    )
  )


def _values(metrics):
  return {
    name: mean.compute() for name, mean in jax.device_get(metrics).items()
  }


@functools.cache
def _oracle_gradients():
  """Gradients of the mean loss over target tokens, by the whole tables."""
  batch = tiny_training.make_batch(0, _ABSENT)

  def mean_loss(trained):
    logits = _model().apply(
      {'params': parameters.merge_tables(*trained)},
      batch['encoder_input_tokens'],
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      encoder_routing_ids=jnp.asarray(batch['encoder_routing_ids']),
      decoder_routing_ids=jnp.asarray(batch['decoder_routing_ids']),
      enable_dropout=False,
    )
    entropy, z_loss = losses.cross_entropy(
      logits,
      batch['decoder_target_tokens'],
      label_smoothing=_LOSS.label_smoothing,
      z_loss=_LOSS.z_loss,
    )
    weights = batch['decoder_loss_weights']
    return jnp.sum((entropy + z_loss) * weights) / weights.sum(), (
      jnp.sum(entropy * weights) / weights.sum()
    )

  state = _initial()
  return jax.jit(jax.grad(mean_loss, has_aux=True))(
    (state.params, state.tables)
  )


@pytest.mark.slow
@pytest.mark.parametrize('rows', _ROW_OPTIMIZERS)
def test_a_step_is_dense_differentiation_and_an_update_of_present_rows(rows):
  batch = tiny_training.make_batch(0, _ABSENT)
  state = _initial(rows)
  new, metrics = _step(rows)(state, {}, batch, tiny_training.make_plan(batch))

  (param_grads, table_grads), loss = _oracle_gradients()
  updates, opt_state = jax.jit(_OPTIMIZER.update)(
    param_grads, state.opt_state, state.params
  )
  tiny_training.assert_close(
    new.params, optax.apply_updates(state.params, updates), 1e-5
  )
  tiny_training.assert_close(new.opt_state, opt_state, 1e-5)
  present = np.setdiff1d(np.arange(tiny_training.EXPERTS), _ABSENT)
  take = lambda tree, ids: jax.tree.map(lambda x: x[ids], tree)
  matrices = {
    name: row_gradients.Matrix(take(gradient, present))
    for name, gradient in table_grads['experts'].items()
  }
  expected = jax.jit(_ROW_OPTIMIZERS[rows].update)(
    matrices,
    take(state.table_state['experts'], present),
    take(state.tables['experts'], present),
    state.step,
  )
  got = (new.tables['experts'], new.table_state['experts'])
  tiny_training.assert_close(take(got, present), expected, 1e-5)
  old = (state.tables['experts'], state.table_state['experts'])
  tiny_training.assert_same_bits(
    take(got, np.array(_ABSENT)), take(old, np.array(_ABSENT))
  )
  assert int(new.step) == 1
  np.testing.assert_allclose(_values(metrics)['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(
    _values(metrics)['gradient_norm'],
    optax.global_norm(param_grads),
    rtol=1e-5,
  )


def test_every_row_that_is_present_moves():
  batch = tiny_training.make_batch(0, _ABSENT)
  state = _initial()
  new, _ = _step()(state, {}, batch, tiny_training.make_plan(batch))
  moved = np.any(
    np.asarray(new.tables['experts']['wo'] != state.tables['experts']['wo']),
    axis=(1, 2),
  )
  assert np.flatnonzero(~moved).tolist() == list(_ABSENT)
  counts = np.asarray(new.table_state['experts'].counts)
  assert np.flatnonzero(counts == 0).tolist() == list(_ABSENT)


@pytest.mark.slow
@pytest.mark.parametrize('number', [2, 4])
def test_microbatches_change_nothing(number):
  batch = tiny_training.make_batch(1, _ABSENT)
  tokens = batch['decoder_loss_weights'].sum(axis=1)
  # The parts must have different numbers of tokens, or a mean of means would
  # pass.
  assert len({tokens[part::number].sum() for part in range(number)}) > 1
  state = _initial()
  whole = _step()(state, {}, batch, tiny_training.make_plan(batch))
  parts = _step(num_microbatches=number)(
    state, {}, batch, tiny_training.make_plan(batch, number)
  )
  tiny_training.assert_close(parts[0], whole[0], 1e-5)
  assert parts[1].keys() == whole[1].keys()
  for name, value in _values(whole[1]).items():
    np.testing.assert_allclose(
      _values(parts[1])[name], value, rtol=1e-5, err_msg=name
    )


@pytest.mark.slow
def test_frozen_tables_are_read_but_are_not_in_the_state():
  batch = tiny_training.make_batch(0, _ABSENT)
  frozen = _initial().tables
  state = _initial(None).replace(tables={})
  new, metrics = _step(None)(
    state, frozen, batch, tiny_training.make_plan(batch)
  )
  assert new.tables == {} and new.table_state == {}
  trained, trained_metrics = _step()(
    _initial(), {}, batch, tiny_training.make_plan(batch)
  )
  # Frozen tables have no gradient, and the other gradients stay the same.
  tiny_training.assert_close(new.params, trained.params, 1e-6)
  of_trained = _values(trained_metrics)
  assert of_trained.pop('expert_gradient_bound') > 0
  assert _values(metrics) == pytest.approx(of_trained, rel=1e-6)
  # The values of frozen tables matter: without experts the loss differs.
  none = jax.tree.map(jnp.zeros_like, frozen)
  _, other = _step(None)(state, none, batch, tiny_training.make_plan(batch))
  assert _values(other)['loss'] != _values(metrics)['loss']


def test_a_tiny_model_memorises_a_batch():
  batch = tiny_training.make_batch(0)
  plan = tiny_training.make_plan(batch)
  state = _initial()
  step = _step()
  first = None
  for _ in range(120):
    state, metrics = step(state, {}, batch, plan)
    first = first or _values(metrics)
  last = _values(metrics)
  assert first['accuracy'] < 0.3
  assert last['accuracy'] == 1.0
  # With label smoothing a perfect prediction has a loss of 0.
  assert last['loss'] < 0.05 * first['loss']


def test_shares_of_tokens_sum_to_one():
  batch = tiny_training.make_batch(0)
  _, metrics = _step()(_initial(), {}, batch, tiny_training.make_plan(batch))
  values = _values(metrics)
  for stream in ('encoder', 'decoder'):
    ids = batch[f'{stream}_routing_ids']
    shares = [
      values[f'{stream}_{kind}'] for kind in ('routed', 'skipped', 'padding')
    ]
    assert sum(shares) == pytest.approx(1.0, abs=1e-6)
    assert shares == pytest.approx(
      [
        np.mean((ids >= 0) & (ids < tiny_training.EXPERTS)),
        np.mean(ids == tiny_training.EXPERTS),
        np.mean(ids == -1),
      ],
      abs=1e-6,
    )
    assert min(shares) > 0


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step():
  batch = tiny_training.make_batch(0)
  plan = tiny_training.make_plan(batch)
  step = _step(dropout=0.3)
  once, _ = step(_initial(), {}, batch, plan)
  again, _ = step(_initial(), {}, batch, plan)
  tiny_training.assert_same_bits(once, again)
  _, at_first = step(_initial(), {}, batch, plan)
  later = _initial().replace(step=jnp.int32(1))
  _, at_second = step(later, {}, batch, plan)
  assert _values(at_first)['loss'] != _values(at_second)['loss']


@pytest.mark.slow
def test_another_seed_drops_other_units():
  batch = tiny_training.make_batch(0)
  plan = tiny_training.make_plan(batch)
  _, one = _step(dropout=0.3)(_initial(), {}, batch, plan)
  _, other = _step(dropout=0.3, seed=1)(_initial(), {}, batch, plan)
  assert _values(one)['loss'] != _values(other)['loss']


@pytest.mark.slow
def test_a_dense_model_needs_no_plan():
  model = _model(sparse=False)
  state = tiny_training.make_state(model, _OPTIMIZER, None)
  step = jax.jit(
    training_step.make_train_step(
      model, optimizer=_OPTIMIZER, row_optimizer=None, loss=_LOSS, seed=0
    )
  )
  batch = tiny_training.make_batch(0)
  for number, name in enumerate(
    ('encoder_input_tokens', 'decoder_target_tokens')
  ):
    batch[name][number, 0] = 2  # <unk>
  new, metrics = step(state, {}, batch, None)
  assert new.tables == {}
  assert set(metrics) == {
    *('loss', 'z_loss', 'accuracy', 'unknown', 'gradient_norm')
  }
  streams = [batch['encoder_input_tokens'], batch['decoder_target_tokens']]
  ids = np.concatenate([np.ravel(tokens) for tokens in streams])
  assert metrics['unknown'].total == (ids == 2).sum() > 0
  assert metrics['unknown'].count == (ids > 0).sum()


def test_a_batch_of_padding_changes_no_table_and_gives_numbers():
  batch = jax.tree.map(np.zeros_like, tiny_training.make_batch(0))
  for stream in ('encoder', 'decoder'):
    batch[f'{stream}_routing_ids'] -= 1
  state = _initial()
  new, _ = _step()(state, {}, batch, tiny_training.make_plan(batch))
  tiny_training.assert_same_bits(
    (new.tables, new.table_state), (state.tables, state.table_state)
  )
  assert all(
    bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(new.params)
  )


@pytest.mark.slow
@pytest.mark.parametrize('scale', [np.inf, 1e30])
def test_an_overflow_in_one_expert_alone_is_seen(monkeypatch, scale):
  """The ordinary gradients and the loss are finite as always."""
  product = grouped.expert_product

  @jax.custom_vjp
  def overflowing(factors):
    return factors

  # Only the factors of the first token change, and so one expert.
  overflowing.defvjp(
    lambda factors: (factors, None),
    lambda _, found: (jax.tree.map(lambda x: x.at[0].set(scale), found),),
  )
  monkeypatch.setattr(
    grouped,
    'expert_product',
    lambda tokens, kernels, plan, factors=None: product(
      tokens, kernels, plan, factors and overflowing(factors)
    ),
  )
  # This step is not the cached one, as it must be traced with the changed
  # factors.
  step = jax.jit(
    training_step.make_train_step(
      _model(),
      optimizer=_OPTIMIZER,
      row_optimizer=_ROW_OPTIMIZERS['adafactor'],
      loss=_LOSS,
      seed=0,
    )
  )
  batch = tiny_training.make_batch(0)
  state = _initial()
  new, metrics = step(state, {}, batch, tiny_training.make_plan(batch))
  # No row may be written, not even those of other experts.
  tiny_training.assert_same_bits(
    (new.tables, new.table_state), (state.tables, state.table_state)
  )
  values = _values(metrics)
  assert np.isfinite(values['loss']) and np.isfinite(values['gradient_norm'])
  with pytest.raises(loop.DivergedError, match='expert_gradient_bound must'):
    loop._check_finite(3, values)


def test_the_bound_on_gradients_of_experts_holds():
  rng = np.random.default_rng(0)
  factors = grouped.Factors(
    *(jnp.asarray(rng.normal(size=(7, n)), jnp.float32) for n in (3, 5))
  )
  sources = jnp.array([[0, 1, 2, 7, 7], [3, 4, 5, 6, 7]])
  gradients = grouped.kernel_gradient([factors], sources)
  norms = np.linalg.norm(np.asarray(gradients).reshape(2, -1), axis=1)
  bound = table_updates.gradient_bound({'encoder': {'wi': factors}})
  assert norms.max() < bound < 20 * norms.max()


def test_evaluation_is_the_loss_without_dropout():
  batch = tiny_training.make_batch(0)
  plan = tiny_training.make_plan(batch)
  state = _initial()
  eval_step = jax.jit(
    training_step.make_eval_step(_model(dropout_rate=0.5), _LOSS)
  )
  evaluated = _values(eval_step(state.params, state.tables, batch, plan))
  _, metrics = _step()(state, {}, batch, plan)
  trained = _values(metrics)
  del trained['gradient_norm'], trained['expert_gradient_bound']
  assert evaluated == pytest.approx(trained, rel=1e-5)


def test_a_batch_above_the_limit_changes_the_step_alone():
  batch = tiny_training.make_batch(0)
  plan, state = tiny_training.make_plan(batch), _initial()
  updated, metrics = _step()(state, {}, batch, plan)
  loss = np.float32(_values(metrics)['loss'])
  step = functools.partial(_step(), state, {}, batch, plan)
  skipped, metrics = step(loss - np.float32(1e-3))
  assert _values(metrics)[loss_spikes.SKIPPED] == 1
  assert int(skipped.step) == 1
  tiny_training.assert_same_bits(skipped.replace(step=state.step), state)
  # Gradients that are left out need not be finite.
  broken = jax.tree.map(lambda x: x, state.params)
  broken['decoder']['logits_dense']['kernel'] *= np.float32(1e30)
  broken = functools.partial(_step(), state.replace(params=broken), {}, batch)
  for limit, is_finite in ((np.float32(1), True), (np.float32(np.inf), False)):
    _, metrics = broken(plan, limit)
    assert _values(metrics)[loss_spikes.SKIPPED] == is_finite
    assert np.isfinite(_values(metrics)['gradient_norm']) == is_finite
  done, metrics = step(np.float32(np.inf))
  assert _values(metrics)[loss_spikes.SKIPPED] == 0
  # This is another program, which may round otherwise.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    done,
    updated,
  )
