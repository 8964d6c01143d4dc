"""The tree of a T5X checkpoint: the parameters of a model, and its optimizer.

The names of our T5's parameters are those of t5x, so that no table of rules is
needed: `target/<name>` is the parameter <name>, and
`state/param_states/<name>/{v_row,v_col,v,m}` are Adafactor's statistics of it.

Source: t5x, examples/t5/network.py for names and shapes, train_state.py and
adafactor.py for the state.
"""

import re
from collections.abc import Mapping

import numpy as np

from mowe.interop import rules, weights
from mowe.models import model_config
from mowe.models.t5 import t5_config

Path = weights.Path

MOMENTS = ('v_row', 'v_col', 'v', 'm')

_TARGET = ('target',)
_STATES = ('state', 'param_states')
_STEP = ('state', 'step')

_LAYER = re.compile(r'layers_(\d+)')

# T5 1.1 as it was released, and Flan-T5, with a vocabulary of 32128: emb_dim,
# num_heads, head_dim, mlp_dim, and the blocks of each stack.
_SIZES = {
  'small': (512, 6, 64, 1024, 8),
  'base': (768, 12, 64, 2048, 12),
  'large': (1024, 16, 64, 2816, 24),
  'xl': (2048, 32, 64, 5120, 24),
  'xxl': (4096, 64, 64, 10240, 24),
}
RELEASED = {
  f't5_1_1_{name}': t5_config.T5Config(
    vocab_size=32128,
    emb_dim=emb_dim,
    num_heads=num_heads,
    head_dim=head_dim,
    mlp_dim=mlp_dim,
    num_encoder_layers=depth,
    num_decoder_layers=depth,
  )
  for name, (emb_dim, num_heads, head_dim, mlp_dim, depth) in _SIZES.items()
}


def to_weights(
  state: Mapping[Path, weights.Array],
  config: model_config.ModelConfig | None = None,
) -> weights.Weights:
  """Returns the model whose arrays a checkpoint has.

  Args:
    state: arrays by path, such as ('target', 'token_embedder', 'embedding').
    config: the config of the model; None for the T5 that has arrays of these
      names and shapes.

  Raises:
    ValueError: the arrays are not those of a T5 of t5x/examples/t5, or of the
      model of `config`.
  """
  params = _below(state, _TARGET)
  if not params:
    raise ValueError(
      'A T5X checkpoint must have parameters below target, but has '
      f'{rules.listed(sorted({path[0] for path in state}))}. Take one that '
      't5x saved in training.'
    )
  others = [
    path for path in state if path[:1] != _TARGET and path[:1] != _STATES[:1]
  ]
  if others:
    raise ValueError(
      'A T5X checkpoint must have target and state alone, but also has '
      f'{rules.listed(sorted(map("/".join, others)))}. A model with other '
      'collections cannot be read.'
    )
  source = 'its config'
  if config is None:
    config, source = infer_config(params), 't5x/examples/t5/network.py'
  found = weights.for_model(params, config, source)
  states = _below(state, _STATES)
  moments = _moments(states, params)
  return weights.Weights(
    config,
    found,
    weights.check_step(state[_STEP][...], 'state/step')
    if _STEP in state
    else 0,
    moments,
    has_other_state=moments is None and bool(states),
  )


def from_weights(given: weights.Weights) -> dict[Path, weights.Array]:
  """Returns the arrays of a checkpoint by path; inverse of `to_weights`.

  Without moments there are the parameters and the step.
  """
  state = {(*_TARGET, *path): array for path, array in given.params.items()}
  state[_STEP] = np.asarray(given.step, np.int32)
  for name, arrays in (given.moments or {}).items():
    for path, array in arrays.items():
      state[(*_STATES, *path, name)] = array
  return state


def infer_config(params: Mapping[Path, weights.Array]) -> t5_config.T5Config:
  """Returns the dense T5 that has parameters of these names and shapes.

  Activations have no shape, so they are guessed: two input kernels are taken
  for a gated GELU (T5 1.1, Flan, mT5, ByT5), one for a ReLU (T5 1.0).

  Raises:
    ValueError: a parameter that a size follows from is not there.
  """

  def shape(name, rank):
    array = params.get(tuple(name.split('/')))
    found = 'not there' if array is None else f'{list(array.shape)}'
    if array is None or len(array.shape) != rank:
      raise ValueError(
        f'{name} must have {rank} axes, as in t5x/examples/t5, but is {found}. '
        'Layers that are scanned (scalable_t5, umT5) and other networks cannot '
        'be read; for a model of mowe, say which one it is with --like.'
      )
    return array.shape

  is_gated = ('encoder', 'layers_0', 'mlp', 'wi_0', 'kernel') in params
  vocab_size, emb_dim = shape('token_embedder/embedding', 2)
  num_heads, _ = shape('encoder/relpos_bias/rel_embedding', 2)
  _, joined = shape('encoder/layers_0/attention/query/kernel', 2)
  wi = 'wi_0' if is_gated else 'wi'
  _, mlp_dim = shape(f'encoder/layers_0/mlp/{wi}/kernel', 2)
  if joined % num_heads:
    raise ValueError(
      f'The {num_heads} heads of rel_embedding must share the {joined} columns '
      'of encoder/layers_0/attention/query/kernel evenly, but do not. The '
      'checkpoint is of another network, or damaged.'
    )
  return t5_config.T5Config(
    vocab_size=vocab_size,
    emb_dim=emb_dim,
    num_heads=num_heads,
    head_dim=joined // num_heads,
    mlp_dim=mlp_dim,
    num_encoder_layers=_depth(params, 'encoder'),
    num_decoder_layers=_depth(params, 'decoder'),
    mlp_activations=('gelu', 'linear') if is_gated else ('relu',),
    logits_via_embedding=('decoder', 'logits_dense', 'kernel') not in params,
  )


def released_name(config: t5_config.T5Config) -> str | None:
  """Returns the name of a released model of these sizes, or None."""
  names = [name for name, one in RELEASED.items() if one == config]
  return names[0] if names else None


def _depth(params, stack):
  """Counts the layers of a stack; their numbers are checked with the names."""
  return len(
    {
      path[1]
      for path in params
      if path[0] == stack and len(path) > 1 and _LAYER.fullmatch(path[1])
    }
  )


def _below(state, prefix):
  """Returns the arrays whose paths begin so, by the rest of their paths."""
  size = len(prefix)
  return {
    path[size:]: array for path, array in state.items() if path[:size] == prefix
  }


def _moments(states, params):
  """Returns the state of Adafactor, or None if it is another optimizer's."""
  wanted = {(*path, name) for path in params for name in MOMENTS}
  if not wanted & set(states):
    return None
  missing = wanted - set(states)
  if missing:
    raise ValueError(
      'A state of Adafactor must be that of all parameters, but '
      f'{rules.listed(sorted(map("/".join, missing)))} are not there. Fetch '
      'the rest of the checkpoint.'
    )
  if set(states) != wanted:
    return None
  for *path, name in wanted:
    _check_moment(path, name, params[tuple(path)], states[*path, name])
  return {
    name: {path: states[*path, name] for path in params} for name in MOMENTS
  }


def _check_moment(path, name, param, moment):
  """Raises ValueError unless a moment has a shape that it can have."""
  left = iter(param.shape)
  # `v_row` and `v_col` have some of the parameter's axes, in their order. The
  # shape of a statistic that is not used is [1].
  fits = (
    tuple(param.shape) == tuple(moment.shape)
    if name in ('v', 'm')
    else len(moment.shape) < len(param.shape)
    and all(size in left for size in moment.shape)
  )
  if not fits and tuple(moment.shape) != (1,):
    raise ValueError(
      f'{name} of {"/".join(path)} must be a part of its state of Adafactor, '
      f'whose shape is {list(param.shape)}, but has {list(moment.shape)}. The '
      'checkpoint is damaged: fetch it again.'
    )
