"""Sparse T5-style language models in JAX: word experts and their baselines.

The names in `__all__` are the public Python interface. Each of them is imported
when it is first used. So `import mowe` itself loads neither jax nor anything
else that takes long.
"""

import importlib
from typing import Any

__version__ = '0.1.0'

# Each public name, and the module that defines it under the same name.
_PLACES = {
  'Adafactor': 'mowe.training.optimization.optimizers',
  'AdamW': 'mowe.training.optimization.optimizers',
  'ClaimFiles': 'mowe.commands.cache_task',
  'DataConfig': 'mowe.commands.data_config',
  'DecoderOnlyConfig': 'mowe.models.decoder_only.decoder_only_config',
  'FeedForward': 'mowe.layers.feed_forward_base',
  'MoeLayer': 'mowe.layers.mixtures.moe',
  'MoweLayer': 'mowe.layers.memory.word_experts',
  'QuestionFiles': 'mowe.commands.cache_task',
  'RowAdafactor': 'mowe.training.optimization.row_optimizers',
  'RowAdam': 'mowe.training.optimization.row_optimizers',
  'RunningTextFiles': 'mowe.commands.cache_task',
  'SalientSpanTask': 'mowe.data.text_tasks',
  'SaveConfig': 'mowe.commands.train',
  'SeqioTask': 'mowe.commands.cache_task',
  'SpanCorruptionTask': 'mowe.data.text_tasks',
  'T5Config': 'mowe.models.t5.t5_config',
  'TextFiles': 'mowe.commands.cache_task',
  'Training': 'mowe.commands.train',
  'ask': 'mowe.commands.ask',
  'build_routing_vocabulary': 'mowe.words.vocabulary_builder',
  'cache_task': 'mowe.commands.cache_task',
  'evaluate': 'mowe.commands.evaluate',
  'load': 'mowe.model_folders.model_folder',
  'load_subwords': 'mowe.words.subword_vocabularies',
  'train': 'mowe.commands.train',
  'train_vocabulary': 'mowe.commands.train_vocabulary',
  'trust': 'mowe.models.families.saved_config',
}

__all__ = [
  'Adafactor',
  'AdamW',
  'ClaimFiles',
  'DataConfig',
  'DecoderOnlyConfig',
  'FeedForward',
  'MoeLayer',
  'MoweLayer',
  'QuestionFiles',
  'RowAdafactor',
  'RowAdam',
  'RunningTextFiles',
  'SalientSpanTask',
  'SaveConfig',
  'SeqioTask',
  'SpanCorruptionTask',
  'T5Config',
  'TextFiles',
  'Training',
  'ask',
  'build_routing_vocabulary',
  'cache_task',
  'evaluate',
  'load',
  'load_subwords',
  'train',
  'train_vocabulary',
  'trust',
]


def __getattr__(name: str) -> Any:
  if name not in _PLACES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(_PLACES[name]), name)
  # Python finds a global directly, so it calls this function once per name.
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_PLACES})
