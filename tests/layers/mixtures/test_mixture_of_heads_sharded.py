"""Tests that modules of heads on eight devices equal those on one device."""

import functools

import flax
import jax
import numpy as np
import pytest

from mowe.layers.attention import inner_attention
from mowe.layers.dispatch import (
  capacity_dispatch,
  dropless_dispatch,
  token_groups,
)
from mowe.layers.mixtures import mixture_of_heads
from mowe.layers.routers import router_losses, tokens_choose
from mowe.training import partitioning

BATCH, LENGTH, EMBED, HEADS, KV, MODULES = 8, 5, 6, 2, 3, 4
MESH = {'data': 2, 'expert': 2, 'model': 2}


def make_layer(dispatch):
  return mixture_of_heads.MixtureOfAttentionHeads(
    HEADS,
    KV,
    num_experts=MODULES,
    routing=tokens_choose.TokensChoose(2),
    groups=token_groups.TokenGroups(multiple=4),
    dispatch=dispatch,
    inner=inner_attention.StickBreaking(),
    use_bias=True,
  )


def make_arrays(layer):
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), tokens, tokens)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes['params']
  )
  mask = np.tril(np.ones((LENGTH, LENGTH), bool))[None, None]
  mask = np.repeat(mask, BATCH, axis=0)
  mask[:, :, 4] = False  # This query is padding.
  return (
    params,
    tokens,
    mask,
    partitioning.parameter_axes(shapes['params_axes']),
  )


def value_and_gradients(layer, params, tokens, mask):
  cotangent = np.random.default_rng(1).normal(size=tokens.shape)

  def objective(params, tokens):
    outputs, sown = layer.apply(
      {'params': params}, tokens, tokens, mask=mask, mutable=['router_stats']
    )
    stats = sown['router_stats']['stats']
    losses = [total for total, _ in router_losses.losses(stats).values()]
    return (outputs * cotangent).sum() + sum(losses), (outputs, stats)

  return jax.grad(objective, (0, 1), has_aux=True)(params, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
  'dispatch',
  [
    dropless_dispatch.DroplessDispatch(),
    capacity_dispatch.CapacityDispatch(1.0, 1),
  ],
  ids=['dropless', 'capacity'],
)
def test_equals_one_device(dispatch):
  layer = make_layer(dispatch)
  params, tokens, mask, axes = make_arrays(layer)
  run = functools.partial(value_and_gradients, layer)
  expected = jax.device_get(jax.jit(run)(params, tokens, mask))
  mesh = partitioning.make_mesh(**MESH)
  flat = flax.traverse_util.flatten_dict(params)
  placed = flax.traverse_util.unflatten_dict(
    {
      path: jax.device_put(x, partitioning.sharding_of_axes(axes[path], mesh))
      for path, x in flat.items()
    }
  )
  batch = partitioning.batch_sharding(mesh)
  step = jax.jit(partitioning.on_mesh(run, mesh))
  arguments = placed, *jax.device_put((tokens, mask), batch)
  assert ' all-to-all(' in step.lower(*arguments).compile().as_text()
  gradients, (outputs, stats) = step(*arguments)
  kernel = gradients[0]['expert']['query']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (
    MODULES // MESH['expert'],
    EMBED,
    HEADS * KV // MESH['model'],
  )
  found = jax.device_get((gradients, (outputs, stats)))
  for (path, want), got in zip(
    jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
  ):
    largest = max(np.abs(want).max(), 1e-3)
    np.testing.assert_allclose(
      got,
      want,
      rtol=0,
      atol=2e-6 * largest,
      err_msg=jax.tree_util.keystr(path),
    )
  assert stats.num_padding == BATCH
