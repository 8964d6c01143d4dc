"""Tests perplexity and bits per byte of models with known probabilities."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mowe.data import lm_batches
from mowe.data.caches import lm_cache
from mowe.evaluation import language_modeling
from mowe.layers.attention import relative_attention
from mowe.models import initialization
from mowe.models.decoder_only import decoder_only_config
from mowe.models.families import families
from mowe.words import byte_vocabulary

BYTES = byte_vocabulary.ByteVocabulary(extra_ids=0)
TEXT = 'a b\n\nabc d\n'


@dataclasses.dataclass(frozen=True)
class _Config:
  streams: tuple[str, ...] = ('decoder',)
  memory_length: int = 0


class _Known(nn.Module):
  """A model that expects the last id plus 1 with 1/2, and the others equally."""

  config: _Config = _Config()

  def of_batch(self, batch, *, enable_dropout):
    assert not enable_dropout
    wanted = batch['decoder_input_tokens'] + 1
    is_wanted = jax.nn.one_hot(wanted, BYTES.size) > 0
    others = 0.5 / (BYTES.size - 1)
    return jnp.log(jnp.where(is_wanted, 0.5, others))


def _cache(tmp_path, text=TEXT):
  (tmp_path / 'text.txt').write_text(text)
  return lm_cache.cache_texts(
    [str(tmp_path / 'text.txt')], tmp_path / 'cache', BYTES
  )


def test_numbers_by_hand(tmp_path):
  # The tokens are a ␣ b EOS EOS a b c ␣ d EOS. Only b after a and c after b, in
  # `abc`, have probability 1/2: 2 of 11 tokens in a window of 11.
  score = language_modeling.score_text(
    _Known(), {}, _cache(tmp_path), batch_size=2, length=11
  )
  other = -math.log(0.5 / (BYTES.size - 1))
  nats = 2 * math.log(2) + 9 * other
  assert score.nats == pytest.approx(nats, rel=1e-6)
  # The words are a, b, end, end, abc, d and end. The bytes are those of the
  # file.
  assert (score.num_tokens, score.num_words, score.num_bytes) == (11, 7, 11)
  values = score.metrics()
  assert values['perplexity'] == pytest.approx(math.exp(score.nats / 11))
  assert values['word_perplexity'] == pytest.approx(math.exp(score.nats / 7))
  assert values['bits_per_byte'] == pytest.approx(nats / math.log(2) / 11)
  assert language_modeling.describe(score).endswith('(11 tokens)')
  some = dataclasses.replace(score, num_unknown=2)
  said = language_modeling.describe(some)
  assert said.endswith('(11 tokens, 18.18% unknown)')


def test_windows_that_do_not_overlap_lose_what_was_before(tmp_path):
  cache = _cache(tmp_path)
  # The second window of 6 begins at the b of abc, so b is not expected and only
  # c is.
  score = language_modeling.score_text(
    _Known(), {}, cache, batch_size=1, length=6
  )
  other = -math.log(0.5 / (BYTES.size - 1))
  assert score.nats == pytest.approx(math.log(2) + 10 * other, rel=1e-6)
  reading = language_modeling.ReadingConfig(stride=5)
  score = language_modeling.score_text(
    _Known(), {}, cache, batch_size=1, length=6, reading=reading
  )
  assert score.nats == pytest.approx(2 * math.log(2) + 9 * other, rel=1e-6)


def test_unknown_counts_have_no_metrics():
  values = language_modeling.TextScore(2.0, 4).metrics()
  assert values == {'loss': 0.5, 'perplexity': math.exp(0.5)}
  huge = language_modeling.TextScore(1e6, 4, 1)
  assert huge.metrics()['word_perplexity'] == math.inf
  assert language_modeling.as_json(huge)['word_perplexity'] is None


def _memory_model(**changes):
  settings = {
    'vocab_size': BYTES.size,
    'emb_dim': 8,
    'num_heads': 2,
    'head_dim': 4,
    'mlp_dim': 9,
    'num_layers': 2,
    'dropout_rate': 0.0,
    'attention': relative_attention.RelativeAttention,
  }
  model = families.build(
    decoder_only_config.DecoderOnlyConfig(**(settings | changes))
  )
  shapes = initialization.abstract_variables(model)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape, scale=0.4).astype(np.float32),
    shapes,
  )
  return model, params


@pytest.mark.slow
def test_a_memory_that_holds_all_is_one_long_row(tmp_path):
  """The model has one block, so a token sees no further than its memory."""
  cache = _cache(tmp_path, 'the dog and the fox, the fox and the cat\n')
  model, params = _memory_model(memory_length=100)
  score = language_modeling.score_text(
    model, params, cache, batch_size=1, length=7
  )
  whole, _ = _memory_model()
  expected = language_modeling.score_text(
    whole, params, cache, batch_size=1, length=score.num_tokens
  )
  assert score.num_tokens == expected.num_tokens == 41
  assert score.nats == pytest.approx(expected.nats, rel=1e-5)
  # Without a memory the model sees less, so the cost differs.
  none = language_modeling.score_text(
    model,
    params,
    cache,
    batch_size=1,
    length=7,
    reading=language_modeling.ReadingConfig(memory_length=0),
  )
  assert abs(none.nats - score.nats) > 0.1


@pytest.mark.slow
def test_sliding_by_one_token_is_a_row_for_each(tmp_path):
  cache = _cache(tmp_path, 'the dog and the fox\n')
  model, params = _memory_model()
  length = 5
  score = language_modeling.score_text(
    model,
    params,
    cache,
    batch_size=3,
    length=length,
    reading=language_modeling.ReadingConfig(stride=1),
  )
  stream = cache.flat('targets').astype(int)
  total = 0.0
  for end in range(1, len(stream) + 1):
    window = stream[max(0, end - length) : end]
    row = lm_batches.make_batch(
      [[(np.zeros(0, int), window)]], {'targets': length}
    )
    logits = model.apply(
      {'params': params}, row, enable_dropout=False, method='of_batch'
    )
    logits = np.asarray(logits[0, len(window) - 1], np.float64)
    total -= logits[window[-1]] - np.log(np.exp(logits).sum())
  assert score.nats == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
  ('config', 'reading', 'text'),
  [
    (_Config(('encoder', 'decoder')), {}, 'has an encoder'),
    (_Config(), {'memory_length': 3}, 'trained with a memory'),
    (_Config(memory_length=3), {'stride': 2}, 'set memory_length to 0'),
  ],
)
def test_what_cannot_be_read_is_refused(tmp_path, config, reading, text):
  with pytest.raises(ValueError, match=text):
    language_modeling.score_text(
      _Known(config),
      {},
      _cache(tmp_path),
      batch_size=1,
      length=4,
      reading=language_modeling.ReadingConfig(**reading),
    )
