"""Tests a training step of a T5 with experts on eight devices and on one."""

import functools
import math

import jax
import numpy as np
import pytest
import tiny_training

from mowe.layers.dispatch import (
  capacity_dispatch,
  dropless_dispatch,
  token_groups,
)
from mowe.layers.mixtures import moe
from mowe.layers.routers import tokens_choose
from mowe.models import parameters
from mowe.models.t5 import t5
from mowe.training import partitioning, train_state, training_step
from mowe.training.optimization import optimizers

_OPTIMIZER = optimizers.ClipByGlobalNorm(
  optimizers.AdamW(1e-2, eps=1e-3, weight_decay=0.1), 1.0
)


def _step(dispatch, sizes):
  """State and metrics after one step, on a mesh of these sizes or one device."""
  layer = functools.partial(
    moe.MoeLayer,
    4,
    8,
    routing=tokens_choose.TokensChoose(2, bias_rate=0.01, jitter=0.1),
    dispatch=dispatch,
    groups=token_groups.TokenGroups(multiple=4),
  )
  model = t5.T5(
    tiny_training.make_config(
      sparse=False,
      dropout_rate=0.2,
      sparse_feed_forward=layer,
      sparse_encoder_layers=(0,),
      sparse_decoder_layers=(0,),
    )
  )
  optimizer = _OPTIMIZER.build(None)
  create = functools.partial(
    train_state.create, model, optimizer=optimizer, row_optimizer=None
  )
  train_step = training_step.make_train_step(
    model,
    optimizer=optimizer,
    row_optimizer=None,
    loss=training_step.LossConfig(),
    seed=0,
  )
  mesh = partitioning.make_mesh(
    **sizes, devices=None if sizes else jax.devices()[:1]
  )
  key = jax.random.key(0)
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, model), key
  )
  shardings = partitioning.state_shardings(
    jax.eval_shape(create, key),
    partitioning.parameter_axes(variables['params_axes']),
    mesh,
  )
  state = jax.device_put(jax.jit(create)(key), shardings)
  step = jax.jit(
    partitioning.on_mesh(train_step, mesh), out_shardings=(shardings, None)
  )
  batch = {
    name: array
    for name, array in tiny_training.make_batch().items()
    if not name.endswith('_routing_ids')
  }
  batch = partitioning.put_batch(batch, partitioning.batch_sharding(mesh))
  text = step.lower(state, {}, batch, None).compile().as_text()
  return *step(state, {}, batch, None), text


@pytest.mark.slow
@pytest.mark.parametrize(
  'dispatch',
  [
    dropless_dispatch.DroplessDispatch(),
    capacity_dispatch.CapacityDispatch(1.0, 1),
  ],
  ids=['dropless', 'capacity'],
)
def test_a_step_equals_one_device(dispatch):
  state, metrics, text = _step(dispatch, {'data': 2, 'expert': 2, 'model': 2})
  expected, expected_metrics, _ = _step(dispatch, {})
  assert ' all-to-all(' in text
  tiny_training.assert_close(state, expected, 1e-5)
  # The tolerance is looser, as the importance of nearly even experts is a
  # difference of nearly equal numbers.
  for name, expected in expected_metrics.items():
    if name.endswith('mutual_information_loss'):
      # This is the difference of two entropies, each of which is at most
      # log(experts).
      terms = float(expected.count) * math.log(4)
      np.testing.assert_allclose(
        metrics[name].total, expected.total, rtol=0, atol=1e-5 * terms
      )
      continue
    tiny_training.assert_close(metrics[name], expected, 1e-4)
