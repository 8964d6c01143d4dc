"""Parameters and forward FLOPs of a model, from its shapes."""

import dataclasses
import fractions
import re
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from mowe.layers import feed_forward_base
from mowe.layers.dispatch import token_groups
from mowe.layers.mixtures import moe
from mowe.models import initialization, model_config, parameters
from mowe.models.families import families
from mowe.words.plans import step_plans


@dataclasses.dataclass(frozen=True)
class ModelCosts:
  """Sizes and costs of a model.

  A product with a kernel of n numbers costs 2n FLOPs. Attention scores, which
  depend on the length and are the same for all feed-forwards, are left out, as
  are norms and activations. A word expert is counted for every token, also for
  skipped words. The experts of a MoeLayer and the modules of a mixture of heads
  are counted as often as the router chooses one per token, on average and
  before any token is dropped; every token uses the routers and shared experts.
  If a layer reads only a share of its parameters (`share_read`, as product-key
  memories do), that share is counted, and these parameters count as experts.
  Rows of memories count as parameters of experts, and their products with
  tokens are counted. Dense units that are zero are counted like all others.

  Attributes:
    total_parameters: number of all parameters of the model.
    expert_parameters: number of parameters of experts, in tables and in layers.
    active_expert_parameters: number of parameters of experts that one token
      reads in all layers together, where each table row counts once.
    flops_per_input_token: FLOPs of the forward pass for one encoder token, with
      its keys and values for cross attention.
    flops_per_target_token: FLOPs of the forward pass for one decoder token,
      with its logits.
  """

  total_parameters: int
  expert_parameters: int
  active_expert_parameters: int
  flops_per_input_token: int
  flops_per_target_token: int

  @property
  def active_parameters(self) -> int:
    """Parameters that take part in one token's computation."""
    dense = self.total_parameters - self.expert_parameters
    return dense + self.active_expert_parameters

  def flops_per_example(self, inputs: int, targets: int) -> int:
    """Returns the FLOPs of the forward pass for one example.

    Args:
      inputs: number of encoder tokens of the example.
      targets: number of decoder tokens of the example.
    """
    return (
      inputs * self.flops_per_input_token
      + targets * self.flops_per_target_token
    )


def model_costs(
  config: model_config.ModelConfig, params: Any = None
) -> ModelCosts:
  """Costs of a model, read off the shapes of its parameters.

  Args:
    config: the config of the model.
    params: the tree of its parameters, arrays or shapes; None finds the shapes,
      which takes about a second for a model of 24 blocks.
  """
  if params is None:
    model = families.build(config)
    params = initialization.abstract_variables(model)['params']
  ordinary, tables = parameters.split_tables(params)
  experts = parameters.in_groups(tables).get(step_plans.EXPERTS, {})
  row = sum(_size(x) // x.shape[0] for x in jax.tree.leaves(experts))
  row //= max(1, len(experts))
  in_experts = sum(map(_size, jax.tree.leaves(tables)))
  active = fractions.Fraction(row * len(experts))
  read = dict.fromkeys(_STACKS, fractions.Fraction(0))
  layers, blocks = config.sparse_layers(), config.sparse_blocks()
  for stack, layer in layers.items():
    if not isinstance(layer, moe.MoeLayer):
      read[stack] += row * len(blocks[stack])
  for memory in config.memories:
    slots = memory.address.num_slots
    payload = memory.make_payload(parent=None)
    width = payload.row_dim(config.emb_dim, slots)
    active += slots * width * len(memory.places())
    for stack, _ in memory.places():
      # `read` counts products, of two FLOPs each.
      read[stack] += fractions.Fraction(
        payload.row_flops(config.emb_dim, slots), 2
      )
  for path, leaf in flax.traverse_util.flatten_dict(ordinary).items():
    readers = shares_read(config, path)
    for one in readers:
      read[one.stream] += one.share * _size(leaf) * one.num_blocks
    if readers and (is_expert(path) or readers[0].share < 1):
      in_experts += _size(leaf)
      active += readers[0].share * _size(leaf)
  if config.logits_via_embedding:
    read['decoder'] += config.vocab_size * config.emb_dim
  return ModelCosts(
    total_parameters=sum(map(_size, jax.tree.leaves(params))),
    expert_parameters=in_experts,
    active_expert_parameters=round(active),
    flops_per_input_token=round(2 * read['encoder']),
    flops_per_target_token=round(2 * read['decoder']),
  )


class Reader(NamedTuple):
  """Layers of one stream that read a parameter.

  Attributes:
    stream: 'encoder' or 'decoder', to whose tokens the products are counted.
    share: the share of the parameter that one token is multiplied with in one
      block.
    num_blocks: number of blocks that read it.
  """

  stream: str
  share: fractions.Fraction
  num_blocks: int


def shares_read(
  config: model_config.ModelConfig, path: tuple[str, ...]
) -> list[Reader]:
  """Returns who reads an ordinary parameter; [] for those of norms.

  Args:
    config: the config of the model.
    path: the path of the parameter.
  """
  blocks = config.sparse_blocks()
  shared = []
  for stream, layer in config.sparse_layers().items():
    contract = feed_forward_base.contract(layer)
    if path[0] in contract.make_shared(config.emb_dim):
      share = contract.share_read(path[-1])
      shared.append(Reader(stream, share, len(blocks[stream])))
  if shared:
    return shared
  share = _share_read(path, _layer_of(config, path))
  # The decoder projects each encoder token once to a key and a value.
  of_input = path[0] == 'encoder' or (path[-3:-1] in _MEMORY_PROJECTIONS)
  stream = 'encoder' if of_input else 'decoder'
  return [Reader(stream, share, 1)] if share else []


def _layer_of(config, path):
  """The layer with experts of the block of a parameter, or None."""
  if len(path) < 2 or not path[1].startswith('layers_'):
    return None
  number = int(path[1].removeprefix('layers_'))
  own = config.of_block(path[0], number)
  attention = own.attentions().get(path[2])
  return attention or own.sparse_layers().get(path[0])


def is_expert(path: tuple[str, ...]) -> bool:
  """Whether a parameter belongs to the experts of a mixture, or to modules.

  Expert tables are not ordinary parameters; see `parameters.split_tables`.
  """
  return bool(re.fullmatch(EXPERTS, '/'.join(path)))


def _share_read(path, layer):
  """Share of a parameter that one token is multiplied with; 0 for norms."""
  if is_expert(path):
    is_kernel = path[-1] == 'kernel'
    return is_kernel * experts_per_token(layer) / layer.num_experts
  if path[-1] == 'kernel':
    return fractions.Fraction(1)
  if 'mlp' in path and layer is not None:
    return feed_forward_base.contract(layer).share_read(path[-1])
  return fractions.Fraction(0)


def experts_per_token(layer: moe.MoeLayer) -> fractions.Fraction:
  """Experts that a token meets on average, in a group of the usual size."""
  groups = layer.groups
  is_sized = isinstance(groups, token_groups.TokenGroups)
  size = groups.size if is_sized else _GROUP_SIZE
  pairs = layer.routing.num_pairs(size, layer.num_experts)
  return fractions.Fraction(pairs, size)


def _size(leaf) -> int:
  return int(np.prod(leaf.shape))


# Matches the full names of experts' parameters that are not in a table.
EXPERTS = r'.+/expert/[^/]+/[^/]+'

_STACKS = ('encoder', 'decoder')

# Group size in tokens that is assumed for groups without a fixed size, such as
# groups that are whole sequences.
_GROUP_SIZE = 512

_MEMORY_PROJECTIONS = {
  ('encoder_decoder_attention', 'key'),
  ('encoder_decoder_attention', 'value'),
}
