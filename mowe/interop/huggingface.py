"""T5 and Switch of Hugging Face transformers: config, names, weights.

Read from transformers 5.23.0, models/t5 and models/switch_transformers. Its
Switch differs from ours in that an expert has room for a fixed number of tokens
of each sequence, and that padding is routed like any token: give routing ids of
0 for that. Weights come from safetensors files alone, which cannot run code.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
from safetensors import numpy as safetensors

from mowe.interop import rules as rules_lib
from mowe.layers import (
  capacity_dispatch,
  moe,
  token_groups,
  tokens_choose,
)
from mowe.models import parameters, t5

Rule = rules_lib.Rule

_BLOCK = r'encoder\.block\.(\d+)\.layer', r'decoder\.block\.(\d+)\.layer'
_PATH = r'encoder/layers_\1', r'decoder/layers_\1'
_SHORT = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}

# Linear weights are [out, in] there and [in, out] here.
_COMMON = (
  # With separate embeddings in its config, Switch keeps the same array thrice.
  Rule(
    r'(?:shared|encoder\.embed_tokens|decoder\.embed_tokens)\.weight',
    'token_embedder/embedding',
  ),
  Rule(r'lm_head\.weight', 'decoder/logits_dense/kernel', np.transpose),
  Rule(r'(encoder|decoder)\.final_layer_norm\.weight', r'\1/\1_norm/scale'),
  Rule(
    r'(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention'
    r'\.relative_attention_bias\.weight',
    r'\1/relpos_bias/rel_embedding',
    np.transpose,
  ),
  # Old T5 checkpoints hold it, and no model ever read it.
  Rule(
    r'decoder\.block\.0\.layer\.1\.EncDecAttention'
    r'\.relative_attention_bias\.weight',
    None,
  ),
  *(
    Rule(
      rf'{block}\.{number}\.{theirs}\.{_SHORT[name]}\.weight',
      f'{path}/{ours}/{name}/kernel',
      np.transpose,
    )
    for block, path, number, theirs, ours in (
      (_BLOCK[0], _PATH[0], 0, 'SelfAttention', 'attention'),
      (_BLOCK[1], _PATH[1], 0, 'SelfAttention', 'self_attention'),
      (_BLOCK[1], _PATH[1], 1, 'EncDecAttention', 'encoder_decoder_attention'),
    )
    for name in _SHORT
  ),
  *(
    Rule(
      rf'{block}\.{number}\.layer_norm\.weight',
      f'{path}/pre_{ours}_layer_norm/scale',
    )
    for block, path, number, ours in (
      (_BLOCK[0], _PATH[0], 0, 'attention'),
      (_BLOCK[0], _PATH[0], 1, 'mlp'),
      (_BLOCK[1], _PATH[1], 0, 'self_attention'),
      (_BLOCK[1], _PATH[1], 1, 'cross_attention'),
      (_BLOCK[1], _PATH[1], 2, 'mlp'),
    )
  ),
)


def _mlp(theirs: str, ours: str) -> tuple[Rule, ...]:
  """A rule for each stack, below the block's feed-forward."""
  return tuple(
    Rule(rf'{block}\.{number}\.{theirs}', f'{path}/mlp/{ours}', np.transpose)
    for block, path, number in zip(_BLOCK, _PATH, (1, 2), strict=True)
  )


T5_RULES = (
  *_COMMON,
  *_mlp(r'DenseReluDense\.(wi|wi_0|wi_1|wo)\.weight', r'\2/kernel'),
)

SWITCH_RULES = (
  *_COMMON,
  *_mlp(r'mlp\.(wi|wo)\.weight', r'\2/kernel'),
  *_mlp(
    r'mlp\.experts\.expert_(?P<expert>\d+)\.(wi|wo)\.weight',
    r'expert/\3/kernel',
  ),
  *_mlp(r'mlp\.router\.classifier\.weight', 'router/router_weights/w/kernel'),
  *_mlp(r'mlp\.router\.classifier\.bias', 'router/router_weights/w/bias'),
)

RULES = {'t5': T5_RULES, 'switch_transformers': SWITCH_RULES}

# Their names of activations, of plain and of gated feed-forwards.
_ACTIVATIONS = {
  'relu': ('relu',),
  'gelu_new': ('gelu',),
  'gated-gelu': ('gelu', 'linear'),
  'gated-silu': ('silu', 'linear'),
}

_EMBEDDING = ('token_embedder', 'embedding')
_HEAD = ('decoder', 'logits_dense', 'kernel')

# What our T5 has built in.
_FIXED = {
  'relative_attention_num_buckets': 32,
  'relative_attention_max_distance': 128,
  'layer_norm_epsilon': 1e-6,
}

# So small that the least number of slots is the number of slots.
_NO_SHARE = 1e-9


def load(folder: str | pathlib.Path) -> tuple[t5.T5Config, Any]:
  """Config and float32 parameters of a folder of `save_pretrained`.

  Args:
    folder: holds config.json and one or more *.safetensors.

  Raises:
    FileNotFoundError: the folder lacks one of them.
    ValueError: an architecture or tensors that our T5 does not have.
  """
  folder = pathlib.Path(folder)
  files = sorted(folder.glob('*.safetensors'))
  if not files or not (folder / 'config.json').is_file():
    raise FileNotFoundError(
      f'{folder} must hold config.json and *.safetensors, but has '
      f'{sorted(path.name for path in folder.glob("*"))}. Save the model with '
      'save_pretrained(folder, safe_serialization=True).'
    )
  described = json.loads((folder / 'config.json').read_text())
  config = make_config(described)
  tensors: dict[str, np.ndarray] = {}
  for file in files:
    tensors |= safetensors.load_file(file)
  return config, make_parameters(
    config, tensors, RULES[described['model_type']]
  )


def make_parameters(
  config: t5.T5Config, tensors: Mapping[str, np.ndarray], rules: Sequence[Rule]
) -> Any:
  """The parameters of a model from the tensors of its twin.

  Raises:
    ValueError: names that the rules refuse, or parameters that are missing,
      too many, or of another shape.
  """
  found = rules_lib.translate(tensors, rules)
  if config.logits_via_embedding:
    head = found.pop(_HEAD, found[_EMBEDDING].T)
    if not np.array_equal(head, found[_EMBEDDING].T):
      raise ValueError(
        'lm_head.weight must equal the embedding, as config.json ties them, '
        'but differs. Set tie_word_embeddings to false there.'
      )
  shapes = jax.eval_shape(
    functools.partial(parameters.initial_variables, t5.T5(config)),
    jax.random.key(0),
  )['params']
  wanted = {
    path: leaf.shape
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items()
  }
  given = {path: value.shape for path, value in found.items()}
  different = [
    f'{"/".join(path)}: {given.get(path, "absent")} there, '
    f'{wanted.get(path, "absent")} here'
    for path in sorted({*wanted, *given})
    if wanted.get(path) != given.get(path)
  ]
  if different:
    raise ValueError(
      'The tensors must be those of the model in config.json, but differ in '
      f'{"; ".join(different[:3])}. Take both from the same checkpoint.'
    )
  return flax.traverse_util.unflatten_dict(
    {path: np.asarray(value, np.float32) for path, value in found.items()}
  )


def make_config(config: Mapping[str, Any]) -> t5.T5Config:
  """The model that a `config.json` describes.

  Raises:
    ValueError: another architecture, or a setting that our T5 does not have.
  """
  kind = config.get('model_type')
  if kind not in RULES:
    raise ValueError(
      f'model_type must be one of {sorted(RULES)}, but is {kind!r}. Other '
      'architectures cannot be read.'
    )
  for name, value in _FIXED.items():
    if config.get(name, value) != value:
      raise ValueError(
        f'{name} must be {value}, but is {config[name]}. Our T5 has that '
        'number built in: a checkpoint with another one cannot be read.'
      )
  is_switch = kind == 'switch_transformers'
  activation = config.get(
    'dense_act_fn' if is_switch else 'feed_forward_proj', 'relu'
  )
  if activation not in _ACTIVATIONS:
    raise ValueError(
      f'The activation must be one of {sorted(_ACTIVATIONS)}, but is '
      f'{activation!r}. A checkpoint with another one cannot be read.'
    )
  dense = t5.T5Config(
    vocab_size=config['vocab_size'],
    emb_dim=config['d_model'],
    num_heads=config['num_heads'],
    head_dim=config['d_kv'],
    mlp_dim=config['d_ff'],
    num_encoder_layers=config['num_layers'],
    num_decoder_layers=config.get('num_decoder_layers') or config['num_layers'],
    mlp_activations=_ACTIVATIONS[activation],
    # transformers 5 keeps T5's old flag under another name.
    logits_via_embedding=config.get(
      'scale_decoder_outputs', config.get('tie_word_embeddings', True)
    ),
    dropout_rate=config.get('dropout_rate', 0.1),
  )
  return _with_experts(dense, config) if is_switch else dense


def sparse_blocks(depth: int, step: int) -> tuple[int, ...]:
  """Blocks with experts: the second of every `step`, none if it is 0."""
  if step == 0:
    return ()
  return tuple(i for i in range(depth) if step == 1 or i % step == 1)


def _with_experts(dense, config):
  layers = (
    sparse_blocks(dense.num_encoder_layers, config['encoder_sparse_step']),
    sparse_blocks(dense.num_decoder_layers, config['decoder_sparse_step']),
  )
  if not any(layers):
    return dense
  layer = functools.partial(
    moe.MoeLayer,
    config['num_experts'],
    config['d_ff'],
    activations=dense.mlp_activations,
    routing=tokens_choose.TokensChoose(
      jitter=config.get('router_jitter_noise', 0.01),
      use_bias=config.get('router_bias', False),
    ),
    dispatch=capacity_dispatch.CapacityDispatch(
      _NO_SHARE, _NO_SHARE, min_capacity=config['expert_capacity']
    ),
    groups=token_groups.SequenceGroups(),
  )
  return dataclasses.replace(
    dense,
    sparse_feed_forward=layer,
    sparse_encoder_layers=layers[0],
    sparse_decoder_layers=layers[1],
  )
