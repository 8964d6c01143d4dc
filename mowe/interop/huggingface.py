"""T5 and Switch of Hugging Face transformers: reading and writing models.

Source: transformers 5.23.0, models/t5 and models/switch_transformers. In its
Switch an expert has room for a fixed number of tokens of each sequence, and
padding is routed like any token, which our layers do if all routing ids are 0.
Weights are read from safetensors files alone, which cannot run code.

Tied embeddings: in transformers 5 every T5 with one array for inputs and
logits, or with two equal ones, shares one parameter. Whether logits are scaled
by d_model ** -0.5 is another matter (`huggingface_config`). A model that scales
them has one parameter here, too (T5 1.0). Without scaling our logits have a
kernel of their own, which is read from the embedding if the file has no other.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import ml_dtypes
import numpy as np

from mowe.interop import huggingface_config, rules, safetensors_folder
from mowe.models import parameters
from mowe.models.t5 import t5, t5_config

Rule = rules.Rule

_SHARED = 'shared.weight'
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
_HEAD = 'lm_head.weight'
_EMBEDDING = 'token_embedder/embedding'

_THEIRS = 'encoder.block.{layer}.layer', 'decoder.block.{layer}.layer'
_OURS = 'encoder/layers_{layer}', 'decoder/layers_{layer}'
_SHORT = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}

# Linear weights are [out, in] there and [in, out] here.
_COMMON = (
  Rule(_SHARED, _EMBEDDING),
  # A Switch whose config says that embeddings are separate has the same array
  # three times.
  *(Rule(name, _EMBEDDING, is_copy=True) for name in _COPIES),
  *(
    rule
    for stack in ('encoder', 'decoder')
    for rule in (
      Rule(f'{stack}.final_layer_norm.weight', f'{stack}/{stack}_norm/scale'),
      Rule(
        f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
        f'{stack}/relpos_bias/rel_embedding',
        is_transposed=True,
      ),
    )
  ),
  # Old T5 checkpoints have this tensor, which no model ever read.
  Rule(
    'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight',
    None,
  ),
  *(
    Rule(
      f'{block}.{number}.{theirs}.{_SHORT[name]}.weight',
      f'{path}/{ours}/{name}/kernel',
      is_transposed=True,
    )
    for block, path, number, theirs, ours in (
      (_THEIRS[0], _OURS[0], 0, 'SelfAttention', 'attention'),
      (_THEIRS[1], _OURS[1], 0, 'SelfAttention', 'self_attention'),
      (_THEIRS[1], _OURS[1], 1, 'EncDecAttention', 'encoder_decoder_attention'),
    )
    for name in _SHORT
  ),
  *(
    Rule(
      f'{block}.{number}.layer_norm.weight',
      f'{path}/pre_{ours}_layer_norm/scale',
    )
    for block, path, number, ours in (
      (_THEIRS[0], _OURS[0], 0, 'attention'),
      (_THEIRS[0], _OURS[0], 1, 'mlp'),
      (_THEIRS[1], _OURS[1], 0, 'self_attention'),
      (_THEIRS[1], _OURS[1], 1, 'cross_attention'),
      (_THEIRS[1], _OURS[1], 2, 'mlp'),
    )
  ),
)


def _mlp(
  theirs: str, ours: str, is_transposed: bool = True
) -> tuple[Rule, ...]:
  """Returns a rule for each stack, for a tensor of its feed-forwards."""
  return tuple(
    Rule(f'{block}.{number}.{theirs}', f'{path}/mlp/{ours}', is_transposed)
    for block, path, number in zip(_THEIRS, _OURS, (1, 2), strict=True)
  )


def _kernels(theirs: str, ours: str, names: Sequence[str]) -> tuple[Rule, ...]:
  """Returns rules for kernels of feed-forwards in both stacks."""
  return tuple(
    rule
    for name in names
    for rule in _mlp(f'{theirs}.{name}.weight', f'{ours}{name}/kernel')
  )


_UNTIED = Rule(_HEAD, 'decoder/logits_dense/kernel', is_transposed=True)
_TIED = Rule(_HEAD, _EMBEDDING, is_copy=True)

_T5 = (*_COMMON, *_kernels('DenseReluDense', '', ('wi', 'wi_0', 'wi_1', 'wo')))
_SWITCH = (
  *_COMMON,
  *_kernels('mlp', '', ('wi', 'wo')),
  *_kernels('mlp.experts.expert_{expert}', 'expert/', ('wi', 'wo')),
  *_mlp('mlp.router.classifier.weight', 'router/router_weights/w/kernel'),
  *_mlp('mlp.router.classifier.bias', 'router/router_weights/w/bias', False),
)

# Models whose logits have a kernel of their own.
T5_RULES = (*_T5, _UNTIED)
SWITCH_RULES = (*_SWITCH, _UNTIED)

DTYPES = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}


def load(folder: str | os.PathLike) -> tuple[t5_config.T5Config, Any]:
  """Reads a folder of `save_pretrained`: the config, and float32 parameters.

  Raises:
    FileNotFoundError: the folder, its config or its weights are not there.
    ValueError: the architecture is not ours, or weights are damaged, of another
      format, missing, too many, or of another shape.
  """
  described, tensors = safetensors_folder.read(folder)
  config = huggingface_config.make_config(described)
  num_blocks = config.num_encoder_layers + config.num_decoder_layers
  if num_blocks > len(tensors):
    # A wrong depth is found here, before a model of that depth is built.
    raise ValueError(
      'config.json must describe the weights beside it, but has '
      f'{num_blocks} blocks for {len(tensors)} tensors. Take both from the '
      'same checkpoint.'
    )
  is_switch = described['model_type'] == huggingface_config.SWITCH
  table = _rules(config, is_switch)
  tensors = rules.without_copies(tensors, table)
  if not is_switch and not config.logits_via_embedding:
    for missing, other in ((_HEAD, _SHARED), (_SHARED, _HEAD)):
      if other in tensors:
        tensors.setdefault(missing, tensors[other])
  rules.check_names(tensors, _expected_tensors(config, table))
  params = rules.to_ours(tensors, table)
  return config, flax.traverse_util.unflatten_dict(params)


def save(
  folder: str | os.PathLike,
  config: t5_config.T5Config,
  params: Any,
  *,
  dtype: str = 'float32',
  max_file_bytes: int = 5 * 10**9,
  attach: Callable[[pathlib.Path], None] | None = None,
) -> None:
  """Writes a folder that transformers and `load` read.

  A model without sparse blocks becomes a T5, one with them a Switch. The folder
  is there complete or not at all.

  Args:
    folder: the folder to write; it must not exist.
    config: the config of the model.
    params: the parameters of the model, nested.
    dtype: 'float32', or 'bfloat16', to which weights are rounded.
    max_file_bytes: bytes of weights in one file; a larger tensor has a file of
      its own.
    attach: called with the folder before it is complete, to put more files into
      it; None puts no more into it.

  Raises:
    FileExistsError: the folder is there.
    ValueError: transformers has no such model, the parameters are those of
      another model, or the dtype is another one.
  """
  if dtype not in DTYPES:
    raise ValueError(
      f'dtype must be one of {sorted(DTYPES)}, but is {dtype!r}. float16 '
      'cannot hold the activations of T5.'
    )
  described = huggingface_config.describe(config, dtype)
  is_switch = described['model_type'] == huggingface_config.SWITCH
  table = _rules(config, is_switch)
  flat = {
    path: np.asarray(value)
    for path, value in flax.traverse_util.flatten_dict(params).items()
  }
  tensors = rules.to_theirs(flat, table)
  rules.check_names(tensors, _expected_tensors(config, table))
  tensors = {
    name: tensor.astype(DTYPES[dtype], copy=False)
    for name, tensor in tensors.items()
  }
  if is_switch and not config.logits_via_embedding:
    # A Switch that is not tied has three parameters in transformers, which
    # would draw at random those that the file lacks.
    tensors |= dict.fromkeys(_COPIES, tensors[_SHARED])
  safetensors_folder.write(
    folder, described, tensors, max_file_bytes=max_file_bytes, attach=attach
  )


def _rules(config: t5_config.T5Config, is_switch: bool) -> tuple[Rule, ...]:
  """Returns the rules of a model."""
  head = _TIED if config.logits_via_embedding else _UNTIED
  return (*(_SWITCH if is_switch else _T5), head)


def _expected_tensors(
  config: t5_config.T5Config, table: Sequence[Rule]
) -> Mapping[str, np.ndarray]:
  """Returns zeros in the shapes of the model's tensors; they take no memory."""
  shapes = jax.eval_shape(
    functools.partial(parameters.initial_variables, t5.T5(config)),
    jax.random.key(0),
  )['params']
  flat = {
    path: np.broadcast_to(np.float32(0), leaf.shape)
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items()
  }
  return rules.to_theirs(flat, table)
