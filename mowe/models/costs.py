"""Parameters and forward FLOPs of a model, from its shapes."""

import dataclasses

import flax
import jax
import numpy as np

from mowe.models import initialization, parameters, t5


@dataclasses.dataclass(frozen=True)
class ModelCosts:
  """Sizes and costs of a model.

  A product with a kernel of n numbers costs 2n FLOPs. Attention scores, which
  depend on the length and are the same for all feed-forwards, are left out; so
  are norms and activations. A word expert is counted for every token, also for
  those that are skipped.

  Attributes:
    total_parameters: all numbers that are stored.
    expert_parameters: those in expert tables.
    active_expert_parameters: those that one token reads, over all layers that
      it passes, counted once per table row.
    flops_per_input_token: forward, one encoder token (its keys and values for
      cross attention included).
    flops_per_target_token: forward, one decoder token, logits included.
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
    """Forward FLOPs of an example with so many tokens."""
    return (
      inputs * self.flops_per_input_token
      + targets * self.flops_per_target_token
    )


def model_costs(config: t5.T5Config) -> ModelCosts:
  """Costs of a model, read off the shapes of its parameters."""
  model = t5.T5(config)
  params = initialization.abstract_variables(model)['params']
  ordinary, tables = parameters.split_tables(params)
  row = sum(
    int(np.prod(leaf.shape[1:])) for leaf in jax.tree.leaves(tables)
  ) // max(1, len(tables))
  encoder = decoder = 0
  for path, leaf in flax.traverse_util.flatten_dict(ordinary).items():
    if path[-1] != 'kernel':
      continue
    size = int(np.prod(leaf.shape))
    # The decoder projects each encoder token once to a key and a value.
    of_input = path[0] == 'encoder' or (path[-3:-1] in _MEMORY_PROJECTIONS)
    encoder += size if of_input else 0
    decoder += 0 if of_input else size
  if config.logits_via_embedding:
    decoder += config.vocab_size * config.emb_dim
  encoder += row * len(config.sparse_encoder_layers)
  decoder += row * len(config.sparse_decoder_layers)
  total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
  in_tables = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tables))
  return ModelCosts(
    total_parameters=total,
    expert_parameters=in_tables,
    active_expert_parameters=row * len(tables),
    flops_per_input_token=2 * encoder,
    flops_per_target_token=2 * decoder,
  )


_MEMORY_PROJECTIONS = {
  ('encoder_decoder_attention', 'key'),
  ('encoder_decoder_attention', 'value'),
}
