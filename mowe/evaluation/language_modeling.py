"""Measures how well a model predicts a text: perplexity, and bits per byte."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.data import lm_batches
from mowe.data.caches import token_cache
from mowe.evaluation import inference
from mowe.models import model_config
from mowe.models.families import families
from mowe.words import base_vocabulary


@dataclasses.dataclass(frozen=True)
class TextScore:
  """The cost of all tokens of a text.

  Words and bytes are counted in the text before it was cut into tokens, so that
  models with different vocabularies can be compared. The end of each line or
  record counts as well.

  Attributes:
    nats: sum of -ln(probability) over all tokens.
    num_tokens: number of predicted tokens, EOS included.
    num_words: number of words of the text, or 0 if it is unknown.
    num_bytes: number of bytes of the text, or 0 if it is unknown.
    num_unknown: how many of the tokens are `<unk>`. They count like all others,
      though they are easily predicted.
  """

  nats: float
  num_tokens: int
  num_words: int = 0
  num_bytes: int = 0
  num_unknown: int = 0

  def metrics(self) -> dict[str, float]:
    """The metrics by name.

    'loss' is in nats per token, and 'perplexity' is e^loss. If words were
    counted, 'word_perplexity' is e^(nats per word). If bytes were counted,
    'bits_per_byte' is nats / ln 2 per byte; papers on enwik8 call it bits per
    character.
    """
    loss = self.nats / max(1, self.num_tokens)
    values = {'loss': loss, 'perplexity': _exp(loss)}
    if self.num_words:
      values['word_perplexity'] = _exp(self.nats / self.num_words)
    if self.num_bytes:
      values['bits_per_byte'] = self.nats / math.log(2) / self.num_bytes
    return values


def _exp(value: float) -> float:
  # A poor model of long words may have 1000 nats per word; e^1000 overflows.
  return math.exp(value) if value < 700 else math.inf


@dataclasses.dataclass(frozen=True)
class ReadingConfig:
  """How a text is cut into windows.

  Without a memory each window is read alone, and only those of its tokens count
  that no window before it has. With a memory each window continues the one
  before, and all of its tokens count.

  Attributes:
    stride: number of tokens by which the window moves; None: its whole length.
    memory_length: number of tokens that a model with a memory remembers; None:
      as many as in training.
  """

  stride: int | None = None
  memory_length: int | None = None


def score_text(
  model: nn.Module,
  params: Any,
  cache: token_cache.TokenCache,
  *,
  batch_size: int,
  length: int,
  reading: ReadingConfig = ReadingConfig(),
  progress: inference.Progress | None = None,
) -> TextScore:
  """Predicts every token of a token cache from those before it.

  Args:
    model: a decoder-only model.
    params: all parameters of the model, expert tables included.
    cache: a token cache of the kind 'language_model'; or of the kind 'text',
      whose words and bytes were not counted.
    batch_size: number of windows that are read at once. For a model with a
      memory it is also the number of parts into which the text is cut; each
      part begins with an empty memory, and 1 keeps the text whole.
    length: number of tokens of a window.
    reading: how the windows follow each other.
    progress: called with the number of tokens done so far.

  Raises:
    ValueError: the model has an encoder, or cannot read as `reading` says.
  """
  config = _check(model.config, reading)
  stream = cache.stream('targets')
  if config.memory_length:
    batches = lm_batches.segments(stream, batch_size, length)
    memory = config.initial_memory(batch_size)
  else:
    batches = lm_batches.sliding_windows(
      stream, batch_size, length, reading.stride or length
    )
    memory = {}
  module = model if config is model.config else families.build(config)
  nats, num_tokens, num_unknown = 0.0, 0, 0
  for batch in batches:
    of_batch, memory = _score_batch(module, params, memory, batch)
    nats += float(of_batch)
    counted = batch['decoder_loss_weights'] > 0
    is_unknown = batch['decoder_target_tokens'] == base_vocabulary.UNK_ID
    num_tokens += int(counted.sum())
    num_unknown += int((counted & is_unknown).sum())
    if progress is not None:
      progress(num_tokens)
  return TextScore(
    nats,
    num_tokens,
    cache.totals.get('words', 0),
    cache.totals.get('bytes', 0),
    num_unknown,
  )


def _check(
  config: model_config.ModelConfig, reading: ReadingConfig
) -> model_config.ModelConfig:
  """Returns the config to read with, or raises ValueError if there is none."""
  if 'encoder' in config.streams:
    raise ValueError(
      'A text is scored by a model with one stack, but this one has an '
      'encoder. Evaluate it on questions, or follow its loss during training.'
    )
  if reading.memory_length is not None:
    if not config.memory_length and reading.memory_length:
      raise ValueError(
        'Only a model that was trained with a memory can be read with another '
        f'memory_length, but {reading.memory_length} was given for a model '
        'without one. Leave memory_length out, and set a stride.'
      )
    config = dataclasses.replace(config, memory_length=reading.memory_length)
  if config.memory_length and reading.stride is not None:
    raise ValueError(
      'A text is read with a memory or in windows that overlap, but '
      f'memory_length is {config.memory_length} and stride is '
      f'{reading.stride}. Leave stride out, or set memory_length to 0.'
    )
  return config


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(model, params, memory, batch):
  """Sum of the costs, in nats, of tokens that count; and the next memory."""
  logits, changed = model.apply(
    {'params': params, model_config.MEMORY: memory},
    batch,
    enable_dropout=False,
    method='of_batch',
    mutable=[model_config.MEMORY],
  )
  targets = batch['decoder_target_tokens']
  right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  costs = jax.scipy.special.logsumexp(logits, axis=-1) - right
  nats = jnp.sum(costs * batch['decoder_loss_weights'])
  return nats, changed.get(model_config.MEMORY, {})


def describe(score: TextScore) -> str:
  """The metrics as one line of text."""
  values = score.metrics()
  shown = '  '.join(
    f'{name.replace("_", " ")} {values[name]:.4g}'
    for name in ('perplexity', 'word_perplexity', 'bits_per_byte')
    if name in values
  )
  counted = f'{score.num_tokens:,} tokens'
  if score.num_unknown:
    counted += f', {score.num_unknown / score.num_tokens:.2%} unknown'
  return f'{shown}  ({counted})'


def as_json(score: TextScore) -> dict[str, Any]:
  """Counts and metrics by name; None for infinity, which JSON cannot hold."""
  values = dataclasses.asdict(score) | score.metrics()
  return {k: v if np.isfinite(v) else None for k, v in values.items()}
