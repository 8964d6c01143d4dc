"""Tests every case of sigma_moe.json against arrays made with the paper's code.

The tests run on any folder in that format: `pytest tests/parity
--golden_dir=DIR`. All options of a case come from the JSON file.
"""

import golden_cases
import jax
import jax.numpy as jnp
import paper_sinkhorn
import pytest
from flax import linen as nn

from mowe.layers.dispatch import token_groups
from mowe.layers.mixtures import initial_experts, sigma_moe
from mowe.layers.routers import (
  router_base,
  router_losses,
  sinkhorn_choose,
  tokens_choose,
)

_KINDS = {
  'test_layer': 'sigma_moe',
  'test_sinkhorn': 'sinkhorn',
  'test_selector_init': 'selector_init',
}
_PER_SEQUENCE = {'global': False, 'step': False, 'time': True}


def pytest_generate_tests(metafunc):
  kind = _KINDS[metafunc.function.__name__]
  golden_cases.parametrize(metafunc, 'sigma_moe', {kind})


@pytest.fixture(scope='module')
def golden(request):
  return golden_cases.read(request.config.parity_dir, 'sigma_moe')


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision('highest'):
    yield


def test_selector_init(case, golden):
  _, arrays, check = golden_cases.load(golden, case)
  after = initial_experts.with_equal_norms(arrays['inputs']['before'].T).T
  check('outputs', {'after': after})


def test_sinkhorn(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  logits = arrays['inputs']['logits']
  router = make_router(options | {'rank_by': 'sinkhorn'})
  r = router.log_assignment(logits[None], jnp.ones((1, len(logits)), bool))[0]
  found = {
    'ref_r': jnp.exp(r),
    'ref_index': jax.lax.top_k(r, options['k'])[1],
    'ref_index_k1': jnp.argmax(r, axis=-1).astype(jnp.int32),
  }
  check('outputs', found)


@pytest.mark.slow
def test_layer(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  layer = make_layer(options)
  training = options['train']
  excluded = None
  if training and options['expert_dropout_rate']:
    excluded = (
      arrays['inputs']['u_expert_drop'] < options['expert_dropout_rate']
    )

  def exclude(call, args, kwargs, context):
    if isinstance(context.module, router_base.ExcludedExperts):
      return layer.groups.split(excluded, False).reshape(args[0])
    return call(*args, **kwargs)

  def run(params):
    with nn.intercept_methods(exclude):
      outputs, sown = layer.apply(
        {'params': as_tree(params)},
        params['x'],
        deterministic=not training,
        mutable=['router_stats'],
      )
    found = {'y': outputs} | selection(options, layer, params, excluded)
    reg = regularizer(options, sown['router_stats']['stats'])
    return found | ({} if reg is None else {'reg': reg})

  found, grads = golden_cases.values_and_gradients(
    options,
    run,
    arrays['params'] | {'x': arrays['inputs']['x']},
    arrays['cotangents'],
  )
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)


class AnyChoose(tokens_choose.TokensChoose):
  """A router that may renormalize a single weight, which is then always 1."""

  def __post_init__(self):
    pass


def make_router(options):
  common = {
    'k': options['k'],
    'sigmoid': options.get('weight', 'sigmoid') == 'sigmoid',
    'renormalize': options.get('renormalize_gates', False),
    'exclusion_rate': options.get('expert_dropout_rate', 0.0),
    'use_bias': 'sel_bias' in options['arrays']['params'],
  }
  if options['rank_by'] != 'sinkhorn':
    assert options['rank_by'] in ('sigmoid', 'softmax', 'logits')
    return AnyChoose(**common)
  is_paper = options.get('update', 'reference') == 'reference'
  sinkhorn = (
    paper_sinkhorn.PaperSinkhornChoose
    if is_paper
    else sinkhorn_choose.SinkhornChoose
  )
  return sinkhorn(**common, iterations=options['sinkhorn_iterations'])


def make_layer(options):
  assert options['weight'] in ('sigmoid', 'softmax', 'softmax_selected')
  if options['weight'] == 'softmax_selected':
    assert options['renormalize_gates']
  per_sequence = _PER_SEQUENCE[options['regularizer_scope']]
  num_tokens = options['batch'] * options['length']
  # Sinkhorn works per sequence, whatever the regularizer does.
  in_sequences = per_sequence or options['rank_by'] == 'sinkhorn'
  return sigma_moe.SigmaMoe(
    options['num_experts'],
    options['expert_dim'],
    routing=make_router(options),
    groups=(
      token_groups.SequenceGroups()
      if in_sequences
      else token_groups.TokenGroups(num_tokens)
    ),
    losses=(
      router_losses.GroupEntropyLosses()
      if per_sequence
      else router_losses.RouterLosses()
    ),
    use_bias=options['bias'],
  )


def as_tree(params):
  """Puts the parameters of a case under the names of the layer."""
  w = {'kernel': params['expert_sel'].T}
  wi, wo = {'kernel': params['keys']}, {'kernel': params['values']}
  tree = {
    'router': {'router_weights': {'w': w}},
    'expert': {'wi': wi, 'wo': wo},
  }
  if 'sel_bias' in params:
    w['bias'] = params['sel_bias']
  if 'bias' in params:
    wi['bias'] = params['bias']
    tree['bias'] = params['o_bias']
  return tree


def selection(options, layer, params, excluded):
  """The chosen experts, their weights, and the ranks, [batch, length, ...]."""
  x = params['x']
  logits = x @ params['expert_sel'].T
  if 'sel_bias' in params:
    logits += params['sel_bias'][None, None]
  is_valid = jnp.ones(x.shape[:2], bool)
  choices = layer.routing(
    router_base.RouterInputs(
      is_valid=is_valid, logits=logits, excluded=excluded
    ),
    num_experts=options['num_experts'],
    training=options['train'],
  )
  own = lambda pairs: jax.vmap(jnp.take)(pairs, choices.pairs)
  by, fill = options['rank_by'], 0.0
  if by == 'sinkhorn' and options['train']:
    ranked = jnp.exp(layer.routing.log_assignment(logits, is_valid))
  else:
    ranked = {'sigmoid': jax.nn.sigmoid, 'softmax': jax.nn.softmax}.get(
      by, lambda z: z
    )(logits)
  if by in ('sinkhorn', 'logits'):
    fill = -jnp.inf
  if excluded is not None:
    ranked = jnp.where(excluded, fill, ranked)
  return {
    'sel_index': own(choices.experts),
    'sel_weight': own(choices.weights),
    'topk_input': ranked,
  }


def regularizer(options, stats):
  """The regularizer of a case; None if our layers have no equivalent."""
  if options['regularizer'] is None or options['regularizer_logits'] != 'all':
    return None
  losses = router_losses.losses(stats)
  mean = lambda name: losses[name][0] / losses[name][1]
  if options['regularizer'] == 'entropy':
    return options['regularizer_weight'] * mean('entropy_regularizer')
  assert options['regularizer'] == 'switch', options['regularizer']
  # The paper's code takes a mean over experts. Ours takes N times the sum, as
  # Switch does.
  factor = options['regularizer_weight'] / options['num_experts'] ** 2
  return factor * mean('load_balance_loss')
