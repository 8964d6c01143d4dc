"""Tests training with a router: its losses, biases and metrics in the step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training

from mowe.layers.dispatch import capacity_dispatch, token_groups
from mowe.layers.mixtures import moe
from mowe.layers.routers import experts_choose, router_base, tokens_choose
from mowe.models.t5 import t5
from mowe.training import loop, router_training, training_step

_NUM_EXPERTS = 4
_OPTIMIZER = optax.sgd(0.5)
_LAYER = ('encoder', 'layers_0', 'mlp')


def _model(router=None, **fields):
  fields = {
    # Each row is a group, so that cutting the batch changes no group.
    'groups': token_groups.TokenGroups(tiny_training.INPUTS)
  } | fields
  layer = functools.partial(
    moe.MoeLayer,
    _NUM_EXPERTS,
    8,
    routing=router or tokens_choose.TokensChoose(k=2),
    **fields,
  )
  decoder = functools.partial(
    moe.MoeLayer,
    _NUM_EXPERTS,
    8,
    groups=token_groups.TokenGroups(tiny_training.TARGETS),
  )
  return t5.T5(
    tiny_training.make_config(
      sparse=False,
      sparse_feed_forward=layer,
      sparse_decoder_feed_forward=decoder,
      sparse_encoder_layers=(0,),
      sparse_decoder_layers=(0,),
    )
  )


def _batch(seed=0):
  batch = tiny_training.make_batch(seed)
  return {k: v for k, v in batch.items() if not k.endswith('_routing_ids')}


def _run(model, batch, config=None, num_microbatches=1, state=None):
  step = training_step.make_train_step(
    model,
    optimizer=_OPTIMIZER,
    row_optimizer=None,
    loss=training_step.LossConfig(
      router=config or router_training.RouterLossConfig()
    ),
    seed=0,
    num_microbatches=num_microbatches,
  )
  state = state or tiny_training.make_state(model, _OPTIMIZER, None)
  new, metrics = jax.jit(step)(state, {}, batch, None)
  return (
    state,
    new,
    {k: m.compute() for k, m in jax.device_get(metrics).items()},
  )


@pytest.mark.slow
def test_the_loss_has_the_mean_of_the_routers_losses():
  model, batch = _model(), _batch()
  config = router_training.RouterLossConfig(
    load_balance=0.5,
    z_loss=0.25,
    importance=0.125,
    entropy=0.0625,
    mutual_information=0.03125,
    load_concentration=0.015625,
  )
  state, new, metrics = _run(model, batch, config)

  def loss(params):
    results = training_step.summed_loss(
      training_step.Trained(params, factors={}, rows={}),
      training_step.PassInputs(tables={}, batch=batch, plans={}, key=None),
      model=model,
      config=training_step.LossConfig(),
    )
    stats = results.stats
    total = results.total / batch['decoder_loss_weights'].sum()
    assert sorted(stats) == [('decoder', *_LAYER[1:]), _LAYER]
    for one in stats.values():
      total += (
        0.5
        * (0.5 * one.load_balance + 0.25 * one.z_loss + 0.125 * one.importance)
        / one.num_loss_tokens
      )
      # The losses of both layers are added and not averaged.
      probs = one.total_probs / one.num_loss_tokens
      information = jnp.sum(probs * jnp.log(probs))
      total += 0.0625 * information
      conditional = one.conditional_entropy / one.num_loss_tokens
      total += 0.03125 * (information + conditional)
      total -= 0.015625 * information
    return total

  grads = jax.jit(jax.grad(loss))(state.params)
  updates, _ = jax.jit(_OPTIMIZER.update)(grads, state.opt_state, state.params)
  tiny_training.assert_close(
    new.params, optax.apply_updates(state.params, updates), 1e-5
  )
  # The padding of encoder and decoder was not routed.
  real = (batch['encoder_input_tokens'] > 0).mean()
  assert metrics['encoder/layers_0/mlp/padding'] == pytest.approx(1 - real)
  real = (batch['decoder_target_tokens'] > 0).mean()
  assert metrics['decoder/layers_0/mlp/padding'] == pytest.approx(1 - real)
  load = metrics['encoder/layers_0/mlp/load']
  assert load.shape == (_NUM_EXPERTS,) and load.sum() == pytest.approx(1)


@pytest.mark.slow
def test_microbatches_change_nothing():
  model, batch = (
    _model(tokens_choose.TokensChoose(k=2, bias_rate=0.01)),
    _batch(1),
  )
  config = router_training.RouterLossConfig(0.5, 0.25)
  _, whole, metrics = _run(model, batch, config)
  # Two metrics are differences of larger terms and have the rounding errors of
  # these: mutual information is one of two entropies, and importance is one of
  # a mean square and one.
  terms = {
    'mutual_information_loss': math.log(_NUM_EXPERTS),
    'importance_loss': 1.0,
  }
  for number in (2, 4):
    _, parts, other = _run(model, batch, config, number)
    tiny_training.assert_close(parts.params, whole.params, 1e-5)
    for name, value in metrics.items():
      atol = 1e-6 * terms.get(name.rpartition('/')[2], 0)
      np.testing.assert_allclose(
        other[name], value, rtol=1e-5, atol=atol, err_msg=f'{number} {name}'
      )


@pytest.mark.slow
def test_the_selection_bias_follows_the_loads_alone():
  model = _model(tokens_choose.TokensChoose(k=1, bias_rate=0.01))
  state, new, metrics = _run(model, _batch())
  bias = lambda state: np.asarray(
    state.params['encoder']['layers_0']['mlp']['router'][
      router_base.SELECTION_BIAS
    ]
  )
  np.testing.assert_array_equal(bias(state), 0)
  load = metrics['encoder/layers_0/mlp/load']
  np.testing.assert_allclose(bias(new), 0.01 * np.sign(load.mean() - load))
  # The bias is used: a large one sends every token to one expert.
  state.params['encoder']['layers_0']['mlp']['router'][
    router_base.SELECTION_BIAS
  ] = jnp.asarray([0.0, 9.0, 0.0, 0.0])
  _, _, metrics = _run(model, _batch(), state=state)
  np.testing.assert_array_equal(
    metrics['encoder/layers_0/mlp/load'], [0, 1, 0, 0]
  )


@pytest.mark.slow
def test_dropped_tokens_are_counted():
  model = _model(
    tokens_choose.TokensChoose(k=1),
    dispatch=capacity_dispatch.CapacityDispatch(0.5, min_capacity=1),
  )
  _, _, metrics = _run(model, _batch())
  assert metrics['encoder/layers_0/mlp/dropped'] > 0
  assert metrics['decoder/layers_0/mlp/dropped'] == 0


def test_a_decoder_refuses_a_router_that_looks_ahead():
  with pytest.raises(ValueError, match='sparse_decoder_feed_forward'):
    tiny_training.make_config(
      sparse=False,
      sparse_feed_forward=functools.partial(
        moe.MoeLayer,
        _NUM_EXPERTS,
        8,
        routing=experts_choose.ExpertsChoose(),
      ),
      sparse_decoder_layers=(0,),
    )


def test_router_logits_that_are_not_finite_end_the_run():
  values = {'loss': 1.0, 'gradient_norm': 1.0, 'encoder/x/not_finite': 0.25}
  with pytest.raises(loop.DivergedError, match='encoder/x/not_finite is 0.25'):
    loop._check_finite(3, values)
