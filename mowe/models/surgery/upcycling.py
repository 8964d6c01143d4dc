"""Makes a mixture of experts from a dense T5: experts are copies of its MLP.

Source: sparse upcycling, arXiv 2212.05055. If the weights of each token's
experts add up to one, copies of one MLP give what the MLP gave: the logits of
real tokens are the same before training, but for tokens that a capacity drops.

Weights that are raw probabilities, as in Switch, add up to less. A factor in
`wo` could make up for that only if it were the same for all tokens, which needs
a router that tells no experts apart. Such routers are refused here.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from mowe.layers.mixtures import moe
from mowe.layers.routers import hash_routing, tokens_choose
from mowe.models import model_config, parameters


def check(config: model_config.ModelConfig) -> None:
  """Raises ValueError unless the logits will be those of the dense model."""
  blocks = config.sparse_blocks()
  for stream, layer in config.sparse_layers().items():
    if blocks[stream]:
      _check_layer(stream, layer, config)


def dense_shapes(params: Any) -> Any:
  """Returns the shapes that a dense checkpoint must have to be upcycled.

  Args:
    params: tree of `jax.ShapeDtypeStruct`, the parameters of the model with
      experts, with or without shardings.
  """
  shapes = {}
  for path, leaf in flax.traverse_util.flatten_dict(params).items():
    source = _source(path)
    if source == path:
      shapes[path] = leaf
    elif source is not None:
      shapes[source] = jax.ShapeDtypeStruct(
        leaf.shape[1:], leaf.dtype, sharding=_without_experts(leaf.sharding)
      )
  return flax.traverse_util.unflatten_dict(shapes)


def upcycle(model: nn.Module, dense: Any, params: Any, key: jax.Array) -> Any:
  """Makes the parameters of a model with experts from those of a dense model.

  Args:
    model: the model with experts; its config has passed `check`.
    dense: tree of the dense model's parameters, in the shapes that
      `dense_shapes` returns.
    params: tree of `jax.ShapeDtypeStruct` of the parameters of `model`; each
      parameter is made in the sharding that its entry has.
    key: random key from which the routers are drawn.

  Raises:
    ValueError: `dense` has other parameters than are needed.
  """
  wanted = flax.traverse_util.flatten_dict(params)
  given = flax.traverse_util.flatten_dict(dense)
  needed = flax.traverse_util.flatten_dict(dense_shapes(params))
  different = [
    '/'.join(path)
    for path in sorted({*given, *needed})
    if path not in given
    or path not in needed
    or given[path].shape != needed[path].shape
  ]
  if different:
    raise ValueError(
      'The dense model must have the layers and sizes of the one with experts, '
      f'but differs in {", ".join(different[:3])}. Set the sizes of T5Config '
      'and expert_dim to those of the checkpoint.'
    )

  def make(dense, key):
    # Only the routers are used, so XLA draws nothing else.
    fresh = parameters.initial_variables(model, key)['params']
    fresh = flax.traverse_util.flatten_dict(fresh)
    values = {}
    for path, leaf in wanted.items():
      source = _source(path)
      values[path] = fresh[path] if source is None else dense[source]
      if source not in (None, path):
        # [embed, mlp] -> [expert, embed, expert_mlp]
        values[path] = jnp.broadcast_to(values[path][None], leaf.shape)
    return values

  shardings = {path: leaf.sharding for path, leaf in wanted.items()}
  made = jax.jit(make, out_shardings=shardings)(given, key)
  return flax.traverse_util.unflatten_dict(made)


def _source(path):
  """Returns the path of the dense parameter, None for those of a router."""
  if 'router' in path:
    return None
  if 'expert' in path:
    return tuple(name for name in path if name != 'expert')
  return path


def _without_experts(sharding):
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding
  spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
  return jax.sharding.NamedSharding(sharding.mesh, spec)


def _why_weights_differ(routing, vocab_size) -> str | None:
  """Why the weights of a token may not add up to one; None if they do."""
  if isinstance(routing, hash_routing.HashRouter):
    if routing.num_ids >= vocab_size and not routing.reads_words:
      return None
    return 'this hash router leaves some tokens without an expert'
  if isinstance(routing, tokens_choose.TokensChoose):
    if routing.renormalize:
      return None
    return f'those of TokensChoose(k={routing.k}) are raw scores'
  return f'{type(routing).__name__} gives a token any number of experts'


def _check_layer(stack, layer, config):
  if not isinstance(layer, moe.MoeLayer) or layer.shared_expert_dim:
    raise ValueError(
      'Only a MoeLayer without a shared expert can be made from a dense MLP, '
      f'but the {stack} has {type(layer).__name__}, shared_expert_dim='
      f'{getattr(layer, "shared_expert_dim", None)}. Use such a layer, or a '
      'checkpoint of this very model.'
    )
  ours = layer.expert_dim, tuple(layer.activations)
  if ours != (config.mlp_dim, tuple(config.mlp_activations)):
    raise ValueError(
      'An expert must be as wide as the MLP that it is a copy of, with the '
      f'same activations, but is {ours} in the {stack} where the MLP is '
      f'{(config.mlp_dim, tuple(config.mlp_activations))}. Set expert_dim and '
      'activations of MoeLayer to those of T5Config.'
    )
  reason = _why_weights_differ(layer.routing, config.vocab_size)
  if reason:
    raise ValueError(
      'The weights of a token must add up to one for the logits of a dense '
      f'checkpoint to stay the same, but in the {stack} {reason}. Use '
      'TokensChoose with k of at least 2 and renormalize=True, or a HashRouter '
      'of all token ids.'
    )
