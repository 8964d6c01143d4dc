"""Knocks out the memories of a model, to measure what they hold.

What a model still does without its memory, the rest of it can do alone.
"""

import dataclasses

from mowe.layers import silent_feed_forward
from mowe.models import model_config
from mowe.words.addresses import silent_address


def can_be_silenced(config: model_config.ModelConfig) -> bool:
  """Returns whether a model has memories or sparse feed-forwards."""
  return bool(config.memories) or config.sparse_feed_forward is not None


def silenced(
  config: model_config.ModelConfig,
) -> model_config.ModelConfig:
  """Returns the config of the model without what its memories hold.

  Sparse feed-forwards return zeros, and no token names a row of a memory. All
  other parts stay, so that the parameters of the model fit; those of the sparse
  feed-forwards are not read.

  Args:
    config: the config of a model that `can_be_silenced`.
  """
  changes = {
    'memories': tuple(
      dataclasses.replace(
        memory, address=silent_address.SilentAddress(memory.address)
      )
      for memory in config.memories
    ),
    'block_layers': tuple(
      (place, factory)
      for place, factory in config.block_layers
      if not place.endswith('/mlp')
    ),
    'expert_names': None,
    'routing': None,
  }
  if config.sparse_feed_forward is not None:
    sparse = {
      name
      for (_, part), name in config.layer_fields.items()
      if part == 'mlp' and getattr(config, name) is not None
    }
    changes |= dict.fromkeys(sparse, silent_feed_forward.SilentFeedForward)
  return dataclasses.replace(config, **changes)
