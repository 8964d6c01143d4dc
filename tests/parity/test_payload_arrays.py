"""Tests payloads of memories against arrays of their references.

The tests run on any folder in that format: `pytest tests/parity
--golden_dir=DIR`. All options of a case come from the JSON file.

Also tests `bank`, `causal_convolution`, `diagonal`, `gated_vector`,
`lookup_experts`, `ngram_embedding`, `payload_base`, and `per_layer_embedding`.
"""

import functools

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mowe.layers import centered_norm, layer_norm
from mowe.layers.memory import memory_plus, peer
from mowe.layers.memory.payloads import (
  bank,
  diagonal,
  gated_vector,
  lookup_experts,
  ngram_embedding,
  payload_base,
  per_layer_embedding,
)
from mowe.words.addresses import hashed_ngrams, ngram_hashes

_FILES = {
  'test_gated_vector': ('engram', {'engram'}),
  'test_diagonal': ('stem', {'stem', 'stem_shared'}),
  'test_inputs_per_layer': ('ple', {'ple_inputs'}),
  'test_embedding_per_layer': ('ple', {'ple_block'}),
  'test_bank': ('l3', {'l3'}),
  'test_ngram_embedding': ('over_encoding', {'over_encoding'}),
  'test_lookup_experts': ('mole', {'mole_train'}),
  'test_lookup_table': ('mole', {'mole_table'}),
  'test_memory_plus': ('memory_plus', {'memory_plus', 'memory_plus_shared'}),
  'test_peer': ('peer', {'peer'}),
}
_ACTIVATIONS = {'gelu_tanh': 'gelu', 'silu': 'silu', 'relu': 'relu'}


def pytest_generate_tests(metafunc):
  golden_cases.parametrize(metafunc, *_FILES[metafunc.function.__name__])


@pytest.fixture
def golden(request):
  name, _ = _FILES[request.function.__name__]
  return golden_cases.read(request.config.parity_dir, name)


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision('highest'):
    yield


def check_all(golden, case, run):
  """Compares the outputs of `run(params, inputs)` and their gradients."""
  options, arrays, check = golden_cases.load(golden, case)
  inputs = arrays['inputs']
  floats = {k: v for k, v in inputs.items() if v.dtype == jnp.float32}
  given = arrays['params'] | floats
  found, grads = golden_cases.values_and_gradients(
    options,
    lambda params: run(options, params, inputs | params),
    given,
    arrays['cotangents'],
  )
  check('outputs', found)
  for name, gradient in grads.items():
    check('grads', gradient, name)


def read(table, ids):
  """Rows [batch, length, slots, row] of a table, zeros for the id -1."""
  exist = ids >= 0
  values = jnp.where(exist[..., None], table[jnp.maximum(ids, 0)], 0)
  return payload_base.MemoryRows(values, exist)


def apply(layer, params, *args, look_at):
  """The outputs of a layer, and what one of its methods returned."""
  seen = []

  def look(call, args, kwargs, context):
    found = call(*args, **kwargs)
    if context.method_name == look_at and context.module.name is None:
      seen.append(found)
    return found

  with nn.intercept_methods(look):
    outputs = layer.apply({'params': params}, *args)
  return outputs, seen[0]


@pytest.mark.slow
def test_gated_vector(case, golden):
  def run(options, params, inputs):
    ids = inputs['hash_ids'] + jnp.array(options['offsets'])[None, None]
    rows = read(params['table'], ids)
    branches, embed = options['branches'], options['embed_dim']
    layer = gated_vector.GatedVector(
      options['row_dim'] * ids.shape[-1],
      signed_root=options['gate_root'],
      convolution_size=options['conv_kernel'] or 0,
      convolution_dilation=options['conv_dilation'] or 1,
      num_branches=branches,
      use_bias=options['bias'],
      norm_epsilon=options['norm_eps'],
    )
    tree = {
      'key': {
        'kernel': params['key_w'].reshape(branches * embed, -1).T,
        'bias': params['key_b'].reshape(-1),
      },
      'value': {'kernel': params['value_w'].T, 'bias': params['value_b']},
      'key_norm': params['key_norm'],
      'query_norm': params['query_norm'],
    }
    if options['conv']:
      assert options['conv_norm_eps'] == 1e-5
      tree['convolution_norm'] = params['conv_norm']
      tree['convolution'] = {'kernel': jnp.moveaxis(params['conv_w'], -1, 0)}
    outputs, gate = apply(layer, tree, inputs['hidden'], rows, look_at='_gate')
    return {
      'embeddings': payload_base.joined(rows),
      'gate': gate,
      'y': outputs,
    }

  check_all(golden, case, run)


@pytest.mark.slow
def test_diagonal(case, golden):
  def run(options, params, inputs):
    found = {}
    is_shared = options['kind'] == 'stem_shared'
    for end in ('_0', '_1') if is_shared else ('',):
      layer = diagonal.Diagonal(
        options['hidden_dim'], _ACTIVATIONS[options['activation']]
      )
      tree = {name: {'kernel': params[name + end]} for name in ('wi_0', 'wo')}
      hidden = []

      def look(call, args, kwargs, context, hidden=hidden):
        if context.module.name == 'wo' and context.method_name == '__call__':
          hidden.append(args[0])
        return call(*args, **kwargs)

      rows = read(params['table'], inputs['ids'][..., None])
      with nn.intercept_methods(look):
        found['y' + end] = layer.apply(
          {'params': tree}, inputs['x' + end], rows
        )
      found['hidden' + end] = hidden[0]
    return found

  check_all(golden, case, run)


@pytest.mark.slow
def test_inputs_per_layer(case, golden):
  def run(options, params, inputs):
    num_layers, width = options['num_layers'], options['per_layer_dim']
    ids = inputs['token_ids']
    outside = options.get('out_of_table_row')
    if outside is not None:
      ids = jnp.where(ids < options['table_rows'], ids, outside)
    table = params['table']
    frozen = options.get('frozen_row')
    if frozen is not None:
      # Torch gives the row of padding no gradient.
      is_frozen = jnp.arange(len(table)) == frozen
      table = jnp.where(is_frozen[:, None], jax.lax.stop_gradient(table), table)
    parts, tokens = [], []
    for layer in range(num_layers):
      own = slice(layer * width, (layer + 1) * width)
      payload = per_layer_embedding.PerLayerEmbedding(
        width, norm_epsilon=options['norm_eps']
      )
      tree = {
        'own': {'kernel': params['proj_w'][own].T},
        'own_norm': {'scale': params['norm']},
      }
      rows = read(table[:, own], ids[..., None])
      parts.append(
        payload.apply({'params': tree}, rows, inputs['x0'], method='mixed')
      )
      tokens.append(np.sqrt(width) * payload_base.joined(rows))
    return {
      'per_layer_inputs': jnp.stack(parts, axis=2),
      'token_part': jnp.stack(tokens, axis=2),
    }

  check_all(golden, case, run)


@pytest.mark.slow
def test_embedding_per_layer(case, golden):
  def run(options, params, inputs):
    layer = per_layer_embedding.PerLayerEmbedding(
      options['per_layer_dim'],
      _ACTIVATIONS[options['activation']],
      norm_epsilon=options['norm_eps'],
    )
    tree = {
      'gate': {'kernel': params['gate_w'].T},
      'up': {'kernel': params['proj_w'].T},
      'norm': {'scale': params['norm']},
    }
    is_altup = options['form'] == 'altup'
    hidden = (
      inputs['x']
      if not is_altup
      else (inputs['streams'][options['active_stream']])
    )
    if options.get('output_scale'):
      hidden = hidden * params['output_scale'][None, None]
    delta = layer.apply(
      {'params': tree}, hidden, inputs['per_layer_input'], method='gated'
    )
    if not is_altup:
      scale = options['layer_scalar']
      return {'delta': delta, 'y': (inputs['x'] + delta) * scale}
    added = jnp.isin(
      jnp.arange(len(inputs['streams'])), jnp.array(options['added_to_streams'])
    )
    streams = inputs['streams'] + jnp.where(
      added[:, None, None, None], delta[None], 0
    )
    return {'delta': delta, 'streams': streams}

  check_all(golden, case, run)


@pytest.mark.slow
def test_bank(case, golden):
  def run(options, params, inputs):
    widths = np.array(options['widths'])
    first = np.cumsum(widths) - widths
    slots = np.arange(widths.max())
    banks = np.where(slots < widths[:, None], first[:, None] + slots, -1)
    ids = inputs['ids']
    rows_of = jnp.where(
      (ids >= 0)[..., None], jnp.asarray(banks)[jnp.maximum(ids, 0)], -1
    )
    tied = options['tied']
    table = (
      params['rows']
      if tied
      else jnp.concatenate([params['keys'], params['values']], axis=1)
    )
    norms = {
      'rms': layer_norm.LayerNorm,
      'layer': centered_norm.CenteredLayerNorm,
    }
    norm = functools.partial(
      norms[options['norm']], epsilon=options['norm_eps']
    )
    tree = {'norm': {'scale': params['norm']}}
    if options['norm'] == 'layer':
      tree['norm']['bias'] = jnp.zeros_like(params['norm'])
    fields = {'read_dim': options['read_dim'], 'is_tied': tied, 'norm': norm}
    if options['form'] == 'concat':
      layer = bank.MixedBank(**fields, up_dim=options['up_dim'])
      tree['up'] = {'kernel': params['w_up']}
      tree['mix'] = {'kernel': params['w_mix']}
    else:
      layer = bank.Bank(**fields)
      tree['out'] = {'kernel': params['w_out']}
    rows = read(table, rows_of)
    outputs, (found, weights) = apply(
      layer, tree, inputs['x'], rows, look_at='read'
    )
    if options['form'] == 'residual':
      outputs += inputs['x']
    return {'read': found, 'weights': weights, 'y': outputs}

  check_all(golden, case, run)


def _beside_feed_forward(layer, tree, options, params, inputs, table):
  """The layer beside the feed-forward of its block, and what they return."""
  scale = params['input_norm']
  mean = jnp.mean(jnp.square(inputs['x']), axis=-1, keepdims=True)
  normed = (
    inputs['x'] * jax.lax.rsqrt(mean + options['norm_eps']) * scale[None, None]
  )
  rows = read(table, inputs['token_ids'][..., None])
  tree = tree | {'router': {'kernel': params['router'].T}}
  mixed, outputs = apply(
    layer, tree, normed, rows, look_at='outputs_of_experts'
  )
  hidden = jax.nn.gelu(normed @ params['shared_up'].T, approximate=False)
  shared = hidden @ params['shared_down'].T
  weights = jax.nn.softmax(normed @ params['router'].T, axis=-1)
  return {
    'y': inputs['x'] + shared + mixed,
    'shared': shared,
    'router_weights': weights,
    'expert_rows': outputs,
  }


@pytest.mark.slow
def test_lookup_experts(case, golden):
  def run(options, params, inputs):
    layer = lookup_experts.LookupExperts(
      options['num_experts'],
      expert_dim=options['hidden_dim'],
      norm_epsilon=options['norm_eps'],
    )
    tree = {
      'expert_norm': {'scale': params['expert_norm']},
      'up': params['expert_up'].swapaxes(1, 2),
      'down': params['expert_down'].swapaxes(1, 2),
    }
    found = _beside_feed_forward(
      layer, tree, options, params, inputs, params['embedding']
    )
    table = layer.apply(
      {'params': tree}, params['embedding'], method='outputs_of_experts'
    )
    return found | {'table': table}

  check_all(golden, case, run)


@pytest.mark.slow
def test_lookup_table(case, golden):
  def run(options, params, inputs):
    layer = lookup_experts.LookupMixture(options['num_experts'])
    table = params['table'].reshape(len(params['table']), -1)
    return _beside_feed_forward(layer, {}, options, params, inputs, table)

  check_all(golden, case, run)


@pytest.mark.slow
def test_ngram_embedding(case, golden):
  def run(options, params, inputs):
    moduli = tuple(map(tuple, options['moduli']))
    address = hashed_ngrams.HashedNGrams(
      ngram_hashes.Polynomial(options['base'], moduli),
      start_id=options['missing_token'],
      eos_id=options['eos_id'],
    )
    tokens = inputs['token_ids']
    ids = address.rows_of_all(tokens)
    amplifications = {
      None: None,
      'sqrt_dim': ngram_embedding.TimesRoot,
      'layer_norm': functools.partial(
        centered_norm.CenteredLayerNorm, epsilon=options['norm_eps']
      ),
    }
    layer = ngram_embedding.NGramEmbedding(
      options['row_dim'] * address.num_slots,
      is_mean=options['combine'] == 'mean',
      amplification=amplifications[options['amplification']],
    )
    proj = params['proj']
    tree = {'proj': {'kernel': proj.reshape(-1, proj.shape[-1])}}
    if 'norm' in params:
      scale = params['norm']
      tree['amplification'] = {'scale': scale, 'bias': jnp.zeros_like(scale)}
    embedded = params['token_table'][tokens]
    outputs = layer.apply(
      {'params': tree}, embedded, read(params['ngram_table'], ids)
    )
    offsets = jnp.array(options['offsets'])[None, None]
    return {'ids': ids - offsets, 'y': outputs}

  check_all(golden, case, run)


@pytest.mark.slow
def test_memory_plus(case, golden):
  def run(options, params, inputs):
    layer = memory_plus.MemoryPlus(
      options['num_half_keys'],
      options['num_heads'],
      options['key_dim'],
      options['knn'],
      options['value_dim'],
      share_values=False,
      is_gated=options['gate'] == 'swilu',
      has_scalar_gate=options['gate'] == 'scalar',
      projects=options['output_projection'],
      use_bias=options['bias'],
    )
    is_shared = options['kind'] == 'memory_plus_shared'
    ends = (
      [f'_{i}' for i in range(options['num_layers'])] if is_shared else ['']
    )
    found = {}
    for end in ends:
      own = lambda name, end=end: params.get(name + end)
      dense = lambda kernel, bias, own=own: {
        name: value
        for name, value in (('kernel', own(kernel)), ('bias', own(bias)))
        if value is not None
      }
      keys = own('keys')
      tree = {
        'query': dense('wq', 'bq'),
        'keys_0': keys[:, 0],
        'keys_1': keys[:, 1],
        'memory_values': {'values': params['values']},
        'gate': dense('wg', 'bg'),
        'out': dense('wo', 'bo'),
        'scalar_gate': dense('ws', 'none'),
      }
      if tree['scalar_gate']:
        tree['scalar_gate'] = {'kernel': own('ws')[:, None]}
      tree = {name: value for name, value in tree.items() if len(value)}
      x = inputs['x' + end]
      found['y' + end], chosen = apply(layer, tree, x, look_at='choose')
      found['indices' + end], found['weights' + end] = chosen
    return found

  check_all(golden, case, run)


def batch_norm(x, scale, bias, epsilon):
  """Normalizes over all positions of a batch, as PEER's paper does."""
  centered = x - x.mean((0, 1), keepdims=True)
  variance = (centered**2).mean((0, 1), keepdims=True)
  normed = centered / jnp.sqrt(variance + epsilon)
  return normed * scale[None, None] + bias[None, None]


@pytest.mark.slow
def test_peer(case, golden):
  def run(options, params, inputs):
    assert options['score'] == 'softmax' and not options['bias']
    layer = peer.Peer(
      options['num_half_keys'],
      options['num_heads'],
      options['key_dim'],
      options['knn'],
      options['activation'],
      normalizes_queries=options['query_norm'] is not None,
    )
    tree = {
      'query': {'kernel': params['wq']},
      'keys_0': params['keys'][:, 0],
      'keys_1': params['keys'][:, 1],
      'down': params['down'],
      'up': params['up'],
    }
    if options['query_norm'] is not None:
      assert options['query_norm'] == 'batch'
      tree['query_norm'] = {'scale': params['bn_scale']}

    def over_batch(call, args, kwargs, context):
      if context.module.name != 'query_norm':
        return call(*args, **kwargs)
      return batch_norm(
        args[0],
        params['bn_scale'],
        params['bn_bias'],
        options['query_norm_eps'],
      )

    x = inputs['x']
    with nn.intercept_methods(over_batch):
      outputs, (index, scores) = apply(layer, tree, x, look_at='choose')
    products = jnp.einsum('btd,bthkd->bthk', x, params['down'][index])
    activation = (
      jax.nn.relu
      if options['activation'] == 'relu'
      else functools.partial(jax.nn.gelu, approximate=False)
    )
    return {
      'y': outputs,
      'indices': index,
      'weights': jax.nn.softmax(scores, axis=-1),
      'activations': activation(products),
    }

  check_all(golden, case, run)
