"""config.json of T5 and Switch in Hugging Face transformers, and our T5Config.

Source: transformers 5.23.0, models/t5 and models/switch_transformers, and
5.18.0, models/mt5. ByT5 and T5 1.1 are of the type `t5`.

The rows of the embedding are read and written as they are. The released models
have 32128 rows for 32100 ids (32000 pieces and 100 sentinels, rounded up to a
multiple of 128), and some later models have 32100. Rows beyond the vocabulary
are never an input, but have logits, here as in transformers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from mowe.interop import rules
from mowe.layers.dispatch import capacity_dispatch, token_groups
from mowe.layers.mixtures import moe
from mowe.layers.routers import tokens_choose
from mowe.models.families import saved_config
from mowe.models.t5 import t5_config

T5 = 't5'
MT5 = 'mt5'
SWITCH = 'switch_transformers'
KINDS = (MT5, SWITCH, T5)

# `feed_forward_proj` of T5 -> the activations that transformers makes of it.
_PROJECTIONS = {
  'relu': ('relu',),
  'gelu_new': ('gelu',),
  'silu': ('silu',),
  'gated-relu': ('relu', 'linear'),
  'gated-gelu': ('gelu', 'linear'),
  'gated-silu': ('silu', 'linear'),
}
# `dense_act_fn` of Switch, whose feed-forwards cannot be gated -> likewise.
_PLAIN = {
  name: parts for name, parts in _PROJECTIONS.items() if len(parts) == 1
}

# Settings that our T5 cannot change.
_FIXED = {
  'relative_attention_num_buckets': 32,
  'relative_attention_max_distance': 128,
  'layer_norm_epsilon': 1e-6,
  'is_encoder_decoder': True,
  'router_dtype': 'float32',
}
# Ids that our T5 cannot change; in some configs null stands for them.
_IDS = {'pad_token_id': 0, 'eos_token_id': 1, 'decoder_start_token_id': 0}

_SIZES = ('vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_heads', 'num_layers')

_TAKE = 'Take the config.json that was saved with the weights.'

# The largest size that is accepted: no model has a larger one, and a wrong one
# up to here fills no memory.
_LARGEST = 2**24

# A capacity factor so small that the least number of slots, which is the fixed
# number of transformers, is always the number of slots.
_NO_SHARE = 1e-9


def make_config(config: Mapping[str, Any]) -> t5_config.T5Config:
  """Returns the model that a `config.json` describes.

  Raises:
    ValueError: another architecture, or a setting that our T5 does not have.
  """
  kind = config.get('model_type')
  if kind not in KINDS:
    raise ValueError(
      f'model_type must be one of {list(KINDS)}, but is {kind!r}. Other '
      'architectures cannot be read.'
    )
  for name, value in _FIXED.items():
    if config.get(name, value) != value:
      raise ValueError(
        f'{name} must be {value}, but is {config[name]}. Our T5 has that '
        'built in: a checkpoint with another one cannot be read.'
      )
  for name, value in _IDS.items():
    if config.get(name) not in (None, value):
      raise ValueError(
        f'{name} must be {value}, but is {config[name]!r}. Our T5 has that '
        'built in: a checkpoint with another one cannot be read.'
      )
  sizes = {name: _size(config, name) for name in _SIZES}
  has_depth = config.get('num_decoder_layers') is not None
  dense = t5_config.T5Config(
    vocab_size=sizes['vocab_size'],
    emb_dim=sizes['d_model'],
    num_heads=sizes['num_heads'],
    head_dim=sizes['d_kv'],
    mlp_dim=sizes['d_ff'],
    num_encoder_layers=sizes['num_layers'],
    num_decoder_layers=_size(
      config, 'num_decoder_layers' if has_depth else 'num_layers'
    ),
    mlp_activations=_activations(config, kind),
    logits_via_embedding=_scales_logits(config, kind),
    dropout_rate=_rate(config, 'dropout_rate', 0.1),
  )
  return _with_experts(dense, config) if kind == SWITCH else dense


def describe(config: t5_config.T5Config, dtype: str) -> dict[str, Any]:
  """Returns the `config.json` of a model, with weights in `dtype`.

  Raises:
    ValueError: transformers has no such model.
  """
  is_switch = config.sparse_feed_forward is not None
  described = {
    'd_ff': config.mlp_dim,
    'd_kv': config.head_dim,
    'd_model': config.emb_dim,
    'dropout_rate': config.dropout_rate,
    'dtype': dtype,
    'initializer_factor': 1.0,
    'is_decoder': False,
    'is_encoder_decoder': True,
    'layer_norm_epsilon': 1e-6,
    'num_decoder_layers': config.num_decoder_layers,
    'num_heads': config.num_heads,
    'num_layers': config.num_encoder_layers,
    'relative_attention_max_distance': 128,
    'relative_attention_num_buckets': 32,
    'tie_word_embeddings': config.logits_via_embedding,
    'use_cache': True,
    'vocab_size': config.vocab_size,
    **_IDS,
  }
  described |= _describe_experts(config) if is_switch else _describe_t5(config)
  _check_same(config, described)
  return described


def sparse_blocks(depth: int, step: int) -> tuple[int, ...]:
  """Returns the numbers of the blocks with experts, as transformers has them.

  Args:
    depth: the number of blocks.
    step: the second of every `step` blocks has experts; with 1 all have, and
      with 0 none.
  """
  if step == 0:
    return ()
  return tuple(i for i in range(depth) if step == 1 or i % step == 1)


def _size(config, name):
  """Returns a size of config.json, after a check."""
  value = config.get(name)
  if type(value) is not int or not 1 <= value <= _LARGEST:
    raise ValueError(
      f'{name} of config.json must be a number from 1 to {_LARGEST}, but is '
      f'{value!r}. {_TAKE}'
    )
  return value


def _rate(config, name, default):
  """Returns a rate of config.json, or the default, after a check."""
  value = config.get(name, default)
  if type(value) not in (int, float) or not 0 <= value < 1:
    raise ValueError(
      f'{name} of config.json must be at least 0 and below 1, but is '
      f'{value!r}. {_TAKE}'
    )
  return value


def _activations(config, kind):
  """Returns the activations of the feed-forwards, after a check."""
  known = _PLAIN if kind == SWITCH else _PROJECTIONS
  default = 'gated-gelu' if kind == MT5 else 'relu'
  field = 'dense_act_fn' if kind == SWITCH else 'feed_forward_proj'
  name = config.get(field, default)
  if not isinstance(name, str) or name not in known:
    raise ValueError(
      f'{field} must be one of {sorted(known)}, but is {name!r}. A checkpoint '
      'with another activation cannot be read.'
    )
  parts = _described_activations(name)
  for field in () if kind == SWITCH else parts:
    if config.get(field, parts[field]) != parts[field]:
      raise ValueError(
        f'{field} must be {parts[field]!r}, as feed_forward_proj is {name!r}, '
        f'but is {config[field]!r}. Correct the one that is wrong.'
      )
  return known[name]


def _described_activations(name):
  """Returns what transformers derives from feed_forward_proj, and saves too."""
  act_fn = name.split('-')[-1]
  return {
    'dense_act_fn': 'gelu_new' if name == 'gated-gelu' else act_fn,
    'is_gated_act': name.startswith('gated-'),
  }


def _scales_logits(config, kind):
  """Whether logits are scaled, which only models with a tied head do."""
  if kind == MT5:
    # transformers 5 does not scale them in mT5, whatever the flag says.
    return False
  tied = config.get('tie_word_embeddings', True) is not False
  if kind == SWITCH:
    return tied
  # In older files the flag said both that a T5 is tied and that it is scaled.
  # transformers 5 ties every T5 with one array or two equal ones, and has a
  # flag of its own for scaling, whose default is the old flag.
  return bool(config.get('scale_decoder_outputs', tied))


def _with_experts(dense, config):
  """Returns a Switch: a dense T5, with experts in some of its blocks."""
  layers = tuple(
    sparse_blocks(depth, _sparse_step(config, stack, depth))
    for stack, depth in (
      ('encoder', dense.num_encoder_layers),
      ('decoder', dense.num_decoder_layers),
    )
  )
  if not any(layers):
    return dense
  layer = functools.partial(
    moe.MoeLayer,
    _size(config, 'num_experts'),
    dense.mlp_dim,
    activations=dense.mlp_activations,
    routing=tokens_choose.TokensChoose(
      jitter=_rate(config, 'router_jitter_noise', 0.01),
      use_bias=config.get('router_bias', False) is True,
    ),
    dispatch=capacity_dispatch.SequenceCapacity(
      _NO_SHARE, min_capacity=_size(config, 'expert_capacity')
    ),
    groups=token_groups.SequenceGroups(),
  )
  return dataclasses.replace(
    dense,
    sparse_feed_forward=layer,
    sparse_encoder_layers=layers[0],
    sparse_decoder_layers=layers[1],
  )


def _sparse_step(config, stack, depth):
  """Returns the saved step between blocks with experts.

  Where there is none, transformers makes it of the number of such blocks.
  """
  step = config.get(f'{stack}_sparse_step')
  number = config.get(f'num_sparse_{stack}_layers', 3)
  value = number if step is None else step
  if type(value) is not int or value < 0:
    raise ValueError(
      f'{stack}_sparse_step and num_sparse_{stack}_layers of config.json must '
      f'be 0 or more, but one is {value!r}. {_TAKE}'
    )
  if step is not None:
    return step
  return depth // number if number else depth


def _describe_t5(config):
  """Returns the part of config.json that only a T5 has."""
  name = _name_of(config.mlp_activations, _PROJECTIONS)
  return _described_activations(name) | {
    'architectures': ['T5ForConditionalGeneration'],
    'classifier_dropout': 0.0,
    'feed_forward_proj': name,
    'model_type': T5,
    'scale_decoder_outputs': config.logits_via_embedding,
  }


def _describe_experts(config):
  """Returns the part of config.json that only a Switch has."""
  layer, _ = config.make_sparse_layers()
  is_ours = (
    isinstance(layer, moe.MoeLayer)
    and isinstance(layer.routing, tokens_choose.TokensChoose)
    and isinstance(layer.dispatch, capacity_dispatch.SequenceCapacity)
  )
  if not is_ours:
    raise ValueError(
      'Switch in transformers has a learned router and room for a fixed '
      f'number of tokens, but sparse_feed_forward is {_parts(layer)}. Save the '
      'model in our own format.'
    )
  steps, depths = {}, config.depths()
  for stack, blocks in config.sparse_blocks().items():
    steps[f'num_sparse_{stack}_layers'] = len(blocks)
    steps[f'{stack}_sparse_step'] = _step_of(blocks, depths[stack])
  return steps | {
    'add_cross_attention': False,
    'add_router_probs': False,
    'architectures': ['SwitchTransformersForConditionalGeneration'],
    'bos_token_id': None,
    'dense_act_fn': _name_of(config.mlp_activations, _PLAIN),
    'expert_capacity': layer.dispatch.min_capacity,
    'model_type': SWITCH,
    'num_experts': layer.num_experts,
    'router_aux_loss_coef': 0.001,
    'router_bias': layer.routing.use_bias,
    'router_dtype': 'float32',
    'router_ignore_padding_tokens': False,
    'router_jitter_noise': layer.routing.jitter,
    'router_z_loss_coef': 0.001,
  }


def _parts(layer):
  """Returns the classes of a layer and of its parts, for a message."""
  parts = [layer]
  if isinstance(layer, moe.MoeLayer):
    parts += [layer.routing, layer.dispatch]
  return ' with '.join(type(part).__name__ for part in parts)


def _step_of(blocks, depth):
  """Returns the step that gives these blocks.

  Where several steps do, it is the one that transformers would make of their
  number.
  """
  usual = depth // len(blocks) if blocks else 0
  for step in (usual, *range(1, depth + 1)):
    if sparse_blocks(depth, step) == tuple(blocks):
      return step
  raise ValueError(
    'Sparse blocks must be the second of every so many, as in transformers, '
    f'but are {blocks} of {depth}. Save the model in our own format.'
  )


def _name_of(activations, known):
  """Returns the name of activations in a table of names."""
  for name, parts in known.items():
    if parts == tuple(activations):
      return name
  raise ValueError(
    f'Activations must be among {list(known.values())}, but are '
    f'{tuple(activations)}. transformers has no such model: save it in our '
    'own format.'
  )


def _check_same(config, described):
  """Raises ValueError unless `make_config` makes the same model again."""
  given = saved_config.to_json(config)
  again = saved_config.to_json(make_config(described))
  different = [
    f'{name}: {given[name]} here, {again[name]} there'
    for name in again
    if name not in ('dtype', 'remat') and given[name] != again[name]
  ]
  if config.memories:
    names = [memory.name for memory in config.memories]
    different.append(f'memories: {names} here, none there')
  if config.routing is not None:
    different.append('routing: a vocabulary here, none there')
  if different:
    raise ValueError(
      'A model must be one that transformers has, but it differs in '
      f'{rules.listed(different)}. Save it in our own format.'
    )
