"""Tests attention, routers and MLP modules against moduleformer.json.

Its arrays were made with the authors' code. The tests run on any folder in that
format: `pytest tests/parity --golden_dir=DIR`. All options of a case come from
the JSON file.
"""

import functools

import golden_cases
import jax
import jax.numpy as jnp
import module_former_cases as cases
import numpy as np
import pytest
from flax import linen as nn

from mowe.layers import centered_norm
from mowe.layers.attention import self_attention, stick_breaking
from mowe.layers.mixtures import mixture_of_heads, moe
from mowe.layers.routers import router_base
from mowe.models import model_config
from mowe.models.decoder_only import decoder_only_config, decoder_only_stack

_KINDS = {
  'test_attention': 'stick_breaking',
  'test_router': 'module_router',
  'test_mlp_modules': 'mlp_modules',
  'test_attention_modules': 'attention_modules',
  'test_block': 'block',
}


def pytest_generate_tests(metafunc):
  kind = _KINDS[metafunc.function.__name__]
  golden_cases.parametrize(metafunc, 'moduleformer', {kind})


@pytest.fixture(scope='module')
def golden(request):
  return golden_cases.read(request.config.parity_dir, 'moduleformer')


@pytest.mark.slow
def test_attention(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  inputs = dict(arrays['inputs'])
  mask = cases.visible(options, inputs.pop('keep', None))

  def run(params):
    query, key, value = params['q'], params['k'], params['v']
    # With an identity matrix as values, the outputs are the weights.
    batch, length, heads, _ = key.shape
    ones = jnp.broadcast_to(
      jnp.eye(length)[None, :, None], (batch, length, heads, length)
    )
    attend = stick_breaking.stick_breaking_attention
    # [batch, query, groups, heads, key] -> [batch, groups, heads, query, key]
    weights = attend(query, key, ones, mask).transpose(0, 2, 3, 1, 4)
    return {'out': attend(query, key, value, mask), 'att': weights}

  check_all(options, run, inputs, arrays['cotangents'], check)


@pytest.mark.slow
def test_router(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  num_modules, keep = options['num_modules'], arrays['inputs'].get('keep')
  is_valid = jnp.ones((1, options['num_tokens']), bool)
  if keep is not None:
    is_valid = keep[None] > 0
  router, losses = cases.parts(options)
  learned = router_base.LearnedRouting(
    router, num_modules, logits=cases.logits(options)
  )

  def run(params):
    z = learned.apply(
      {'params': cases.router_tree(params)},
      params['x'][None],
      deterministic=True,
    )[0]
    choices = router(
      router_base.RouterInputs(is_valid=is_valid, logits=z),
      num_experts=num_modules,
    )
    chosen = jnp.arange(num_modules)[None] == choices.experts[0, :, None]
    sums = losses.sums(z, choices.probs, chosen.sum(0)[None], is_valid)
    own = lambda x: x[0][choices.pairs[0]]
    return {
      'top_idx': own(choices.experts),
      'top_gates': own(choices.weights),
      'probs': jnp.where(is_valid[0, :, None], choices.probs[0], 0),
      'expert_size': chosen.sum(0).astype(jnp.int32),
      'loss': cases.loss(options, cases.as_stats(sums)),
    }

  params = arrays['params'] | {'x': arrays['inputs']['x']}
  check_all(options, run, params, arrays['cotangents'], check)


@pytest.mark.slow
def test_mlp_modules(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  shape, keep = (
    (options['batch'], options['length']),
    arrays['inputs'].get('keep'),
  )
  layer = moe.MoeLayer(**cases.mlp_fields(options, shape[0] * shape[1]))
  ids = None
  if options.get('keep_mask') == 'skip':
    ids = jnp.where(keep > 0, 0, -1)

  def run(params):
    seen = cases.Seen()
    with nn.intercept_methods(seen):
      outputs, sown = layer.apply(
        {'params': cases.mlp_tree(params)},
        params['x'],
        ids,
        mutable=['router_stats'],
      )
    stats = sown['router_stats']['stats']
    return cases.choices(options, seen.logits[-1], shape, keep) | {
      'y': outputs,
      'loss': cases.loss(options, stats),
      'expert_size': stats.load.astype(jnp.int32),
    }

  params = arrays['params'] | {'x': arrays['inputs']['x']}
  check_all(options, run, params, arrays['cotangents'], check)


@pytest.mark.slow
def test_attention_modules(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  shape, keep = (
    (options['batch'], options['length']),
    arrays['inputs'].get('keep'),
  )
  mask = cases.visible(options, keep)
  if options['keep_mask'] == 'skip':
    mask = cases.visible(options) & (keep > 0)[:, None, :, None]
  layer = mixture_of_heads.MixtureOfSelfAttentionHeads(
    options['num_heads'],
    options['head_dim'],
    **cases.attention_fields(options, shape[0] * shape[1]),
  )

  def run(params):
    seen = cases.Seen()
    variables = {'params': cases.attention_tree(params)}
    with nn.intercept_methods(seen):
      outputs, sown = layer.clone(inner=cases.Weighing(seen)).apply(
        variables,
        params['x'],
        params['x'],
        positions=positions(0, shape[1], shape[1]),
        mask=mask,
        mutable=['router_stats'],
      )
    stats = sown['router_stats']['stats']
    found = cases.choices(options, seen.logits[-1], shape, keep) | {
      'y': outputs,
      'att': seen.weights[-1],
      'loss': cases.loss(options, stats),
    }
    if options['cache_prefill'] is not None:
      found['y_cached'] = step_by_step(
        layer, variables, params['x'], mask, options['cache_prefill']
      )
    return found

  params = arrays['params'] | {'x': arrays['inputs']['x']}
  check_all(options, run, params, arrays['cotangents'], check)


def positions(start, end, num_keys):
  return self_attention.Positions(np.arange(start, end), np.arange(num_keys))


def step_by_step(layer, variables, tokens, mask, prefill):
  """The outputs of some tokens at once, and then of one token after another."""
  length = tokens.shape[1]

  def some(cache, start, end):
    part = tokens[:, start:end]
    outputs, changed = layer.apply(
      {**variables, 'cache': cache},
      part,
      part,
      positions=positions(start, end, length),
      mask=mask[:, :, start:end],
      decode=True,
      mutable=['cache'],
    )
    return outputs, changed['cache']

  _, cache = some({}, 0, length)
  ends = [prefill, *range(prefill + 1, length + 1)]
  outputs = []
  for start, end in zip([0, *ends], ends, strict=False):
    more, cache = some(cache, start, end)
    outputs.append(more)
  return jnp.concatenate(outputs, axis=1)


@pytest.mark.slow
def test_block(case, golden):
  options, arrays, check = golden_cases.load(golden, case)
  assert options['pre_norm']
  shape = options['batch'], options['length']
  mask = cases.visible(options['attention'] | options)
  num_tokens = shape[0] * shape[1]

  def run(params):
    seen = cases.Seen()
    block = decoder_only_stack.Block(
      block_config(options, num_tokens, seen), 0, {}, {}, {}
    )
    norm = lambda name: {
      part: params[f'{name}_{part}'] for part in ('scale', 'bias')
    }
    tree = {
      'pre_self_attention_layer_norm': norm('ln1'),
      'self_attention': cases.attention_tree(params),
      'pre_mlp_layer_norm': norm('ln2'),
      'mlp': cases.mlp_tree(params, 'mlp_'),
    }
    with nn.intercept_methods(seen):
      outputs, sown = block.apply(
        {'params': tree},
        params['x'],
        positions(0, shape[1], shape[1]),
        mask,
        model_config.StreamRouting(),
        False,
        True,
        mutable=['router_stats'],
      )
    found = {'y': outputs, 'att': seen.weights[-1], 'loss': 0.0}
    sublayers = {'att': ('attention', 'self_attention'), 'mlp': ('mlp', 'mlp')}
    for (prefix, (key, name)), z in zip(
      sublayers.items(), seen.logits, strict=True
    ):
      stats = sown['router_stats'][name]['stats']
      found['loss'] += cases.loss(options[key], stats)
      for role, array in cases.choices(options[key], z, shape).items():
        found[f'{prefix}_{role}'] = array
    return found

  params = arrays['params'] | {'x': arrays['inputs']['x']}
  check_all(options, run, params, arrays['cotangents'], check)


def block_config(options, num_tokens, seen):
  own = options['attention']
  fields = cases.attention_fields(own, num_tokens)
  return decoder_only_config.DecoderOnlyConfig(
    vocab_size=1,
    emb_dim=options['embed_dim'],
    num_heads=own['num_heads'],
    head_dim=own['head_dim'],
    mlp_dim=1,
    num_layers=1,
    dropout_rate=0.0,
    attention=functools.partial(
      mixture_of_heads.MixtureOfSelfAttentionHeads,
      inner=cases.Weighing(seen),
      **fields,
    ),
    norm=functools.partial(
      centered_norm.CenteredLayerNorm, epsilon=options['layer_norm_epsilon']
    ),
    sparse_feed_forward=functools.partial(
      moe.MoeLayer, **cases.mlp_fields(options['mlp'], num_tokens)
    ),
    sparse_decoder_layers=(0,),
  )


def check_all(options, run, params, cotangents, check):
  with jax.default_matmul_precision('highest'):
    found, grads = golden_cases.values_and_gradients(
      options, run, params, cotangents
    )
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)
