"""Tests a dense T5 that gets experts: equal logits, and clear refusals."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.dispatch import capacity_dispatch
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import moe
from mowe.layers.routers import experts_choose, hash_routing, tokens_choose
from mowe.models import parameters
from mowe.models.surgery import upcycling
from mowe.models.t5 import t5, t5_config
from mowe.training import partitioning

_DENSE = t5_config.T5Config(
  vocab_size=11,
  emb_dim=6,
  num_heads=2,
  head_dim=5,
  mlp_dim=8,
  num_encoder_layers=3,
  num_decoder_layers=2,
)
_TOP2 = tokens_choose.TokensChoose(2, renormalize=True)
_HASH = hash_routing.HashRouter(11)


def _sparse(routing, num_experts=4, expert_dim=8, **fields):
  return dataclasses.replace(
    _DENSE,
    sparse_feed_forward=functools.partial(
      moe.MoeLayer, num_experts, expert_dim, routing=routing, **fields
    ),
    sparse_encoder_layers=(0, 2),
    sparse_decoder_layers=(1,),
  )


def _shapes(config):
  return jax.eval_shape(
    functools.partial(parameters.initial_variables, t5.T5(config)),
    jax.random.key(0),
  )['params']


@pytest.fixture(scope='module')
def dense():
  make = functools.partial(parameters.initial_variables, t5.T5(_DENSE))
  return jax.jit(make)(jax.random.key(3))['params']


def _upcycled(config, dense):
  upcycling.check(config)
  return upcycling.upcycle(
    t5.T5(config), dense, _shapes(config), jax.random.key(5)
  )


def _logits(config, params):
  inputs = np.asarray([[3, 9, 4, 1, 0, 0, 0], [8, 8, 2, 5, 10, 7, 1]])
  targets = np.asarray([[6, 5, 1, 0, 0], [4, 9, 9, 10, 1]])
  shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  logits = jax.jit(
    lambda params: t5.T5(config).apply(
      {'params': params}, inputs, shifted, targets, enable_dropout=False
    )
  )(params)
  return np.asarray(logits)[targets > 0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('routing', 'fields'),
  [
    (_TOP2, {}),
    (_TOP2, {'dispatch': capacity_dispatch.CapacityDispatch(4.0)}),
    (tokens_choose.TokensChoose(3, sigmoid=True, renormalize=True), {}),
    (_HASH, {}),
  ],
)
def test_logits_stay_the_same(routing, fields, dense):
  config = _sparse(routing, **fields)
  params = _upcycled(config, dense)
  np.testing.assert_allclose(
    _logits(config, params), _logits(_DENSE, dense), rtol=1e-5, atol=1e-5
  )


def test_every_expert_is_a_copy_and_routers_are_fresh(dense):
  config = _sparse(_TOP2)
  params = _upcycled(config, dense)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape, _shapes(config)
  )
  old = dense['decoder']['layers_1']['mlp']
  new = params['decoder']['layers_1']['mlp']
  for name in ('wi_0', 'wi_1', 'wo'):
    for e in range(4):
      np.testing.assert_array_equal(
        new['expert'][name]['kernel'][e], old[name]['kernel']
      )
  # Dense blocks, attention and the embedding are copied as they are.
  for one, other in (
    (params['encoder']['layers_1'], dense['encoder']['layers_1']),
    (params['token_embedder'], dense['token_embedder']),
  ):
    jax.tree.map(np.testing.assert_array_equal, one, other)
  kernels = [
    params['encoder'][f'layers_{i}']['mlp']['router']['router_weights']['w'][
      'kernel'
    ]
    for i in (0, 2)
  ]
  assert np.all(np.std(kernels, axis=(1, 2)) > 0.01)
  assert np.all(kernels[0] != kernels[1])


def test_experts_lie_where_they_belong(dense):
  mesh = jax.sharding.Mesh(
    np.asarray(jax.devices()[:8]).reshape(2, 4, 1), ('data', 'expert', 'model')
  )
  config = _sparse(_TOP2)
  variables = jax.eval_shape(
    functools.partial(parameters.initial_variables, t5.T5(config)),
    jax.random.key(0),
  )
  axes = partitioning.parameter_axes(variables['params_axes'])
  rules = dict(partitioning.LOGICAL_AXIS_RULES)
  flat = flax.traverse_util.flatten_dict(variables['params'])
  placed = flax.traverse_util.unflatten_dict(
    {
      path: jax.ShapeDtypeStruct(
        leaf.shape,
        leaf.dtype,
        sharding=jax.sharding.NamedSharding(
          mesh, jax.sharding.PartitionSpec(*map(rules.get, axes[path]))
        ),
      )
      for path, leaf in flat.items()
    }
  )
  wanted = upcycling.dense_shapes(placed)
  assert jax.tree.map(jnp.shape, wanted) == jax.tree.map(jnp.shape, dense)
  kernel = wanted['encoder']['layers_0']['mlp']['wi_0']['kernel']
  # A dense kernel is [embed, mlp], so its sharding has no axis of experts.
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, 'model')
  dense = jax.tree.map(
    lambda x, leaf: jax.device_put(x, leaf.sharding), dense, wanted
  )
  params = upcycling.upcycle(t5.T5(config), dense, placed, jax.random.key(5))
  jax.tree.map(
    lambda x, leaf: np.testing.assert_(
      x.sharding.is_equivalent_to(leaf.sharding, x.ndim)
    ),
    params,
    placed,
  )
  plain = _upcycled(config, jax.device_get(dense))
  jax.tree.map(np.testing.assert_array_equal, params, plain)


@pytest.mark.parametrize(
  ('routing', 'reason'),
  [
    (tokens_choose.TokensChoose(), r'TokensChoose\(k=1\) are raw scores'),
    (tokens_choose.TokensChoose(2), r'TokensChoose\(k=2\) are raw scores'),
    (hash_routing.HashRouter(10), 'tokens without an expert'),
    (hash_routing.WordHashRouter(11), 'tokens without an expert'),
  ],
)
def test_weights_that_do_not_add_up_are_refused(routing, reason):
  with pytest.raises(ValueError, match=f'in the encoder .*{reason}. Use Tok'):
    upcycling.check(_sparse(routing))


def test_a_stack_without_experts_is_not_asked():
  config = dataclasses.replace(
    _sparse(_TOP2),
    sparse_decoder_feed_forward=functools.partial(moe.MoeLayer, 4, 8),
  )
  with pytest.raises(ValueError, match='in the decoder those of Tokens'):
    upcycling.check(config)
  upcycling.check(dataclasses.replace(config, sparse_decoder_layers=()))
  config = dataclasses.replace(
    config,
    sparse_feed_forward=functools.partial(
      moe.MoeLayer, 4, 8, routing=experts_choose.ExpertsChoose()
    ),
  )
  with pytest.raises(ValueError, match='ExpertsChoose gives a token any'):
    upcycling.check(config)


@pytest.mark.slow
def test_raw_scores_would_change_the_logits(dense):
  config = _sparse(tokens_choose.TokensChoose())
  params = upcycling.upcycle(
    t5.T5(config), dense, _shapes(config), jax.random.key(5)
  )
  actual, expected = _logits(config, params), _logits(_DENSE, dense)
  assert np.abs(actual - expected).max() > 0.1 * np.abs(expected).max()


def test_other_layers_and_widths_are_refused(dense):
  with pytest.raises(ValueError, match='as wide as the MLP'):
    upcycling.check(_sparse(_TOP2, expert_dim=7))
  with pytest.raises(ValueError, match='without a shared expert'):
    upcycling.check(_sparse(_TOP2, shared_expert_dim=8))
  words = dataclasses.replace(
    _sparse(_TOP2),
    sparse_feed_forward=functools.partial(word_experts.MoweLayer, 4, 8),
  )
  with pytest.raises(ValueError, match='encoder has MoweLayer'):
    upcycling.check(words)
  deeper = dataclasses.replace(_sparse(_TOP2), num_decoder_layers=3)
  with pytest.raises(ValueError, match='differs in decoder/layers_2/'):
    _upcycled(deeper, dense)
