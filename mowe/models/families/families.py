"""The families of models: which module is built from which config."""

from typing import NamedTuple

from flax import linen as nn

from mowe.models import model_config
from mowe.models.decoder_only import decoder_only, decoder_only_config
from mowe.models.t5 import t5, t5_config


class Family(NamedTuple):
  """One kind of model.

  Attributes:
    name: the name of the family in `model.json`.
    config_class: holds the sizes and parts; a `model_config.ModelConfig`.
    module_class: the Linen module, made of such a config.
  """

  name: str
  config_class: type[model_config.ModelConfig]
  module_class: type[nn.Module]


FAMILIES = (
  Family('t5', t5_config.T5Config, t5.T5),
  Family(
    'decoder_only',
    decoder_only_config.DecoderOnlyConfig,
    decoder_only.DecoderOnly,
  ),
)


def of_config(config: model_config.ModelConfig) -> Family:
  """Returns the family whose config this is.

  Raises:
    ValueError: the config is of no family.
  """
  for family in FAMILIES:
    if isinstance(config, family.config_class):
      return family
  known = [family.config_class.__name__ for family in FAMILIES]
  raise ValueError(
    f'A model config must be one of {known}, but is a '
    f'{type(config).__name__}. Use one of these, or make the module yourself.'
  )


def family_of_name(name: str | None) -> Family:
  """Returns the family that a saved config names.

  Raises:
    ValueError: there is no family of this name.
  """
  for family in FAMILIES:
    if family.name == name:
      return family
  raise ValueError(
    'The family of a saved model must be one of '
    f'{sorted(family.name for family in FAMILIES)}, but is {name!r}. It was '
    'written by another version of mowe: use that version.'
  )


def build(config: model_config.ModelConfig) -> nn.Module:
  """Returns the Linen module that a config describes."""
  return of_config(config).module_class(config)
