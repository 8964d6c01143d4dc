"""Tests T5 with other parts: refusals, packing, padding, sparse blocks.

Also tests `embedding`, `feed_forward`, `layer_norm`, `linear`, `multi_head`,
`relative_position`, `t5_config`, and `t5_stacks`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.attention import inner_attention, multi_head
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import mixture_of_heads
from mowe.models import parameters
from mowe.models.t5 import t5, t5_config

_BATCH, _INPUTS, _TARGETS, _VOCAB, _EXPERTS = 2, 7, 6, 17, 5


_PLAIN_SELF_ATTENTION = {
  'encoder_attention': multi_head.MultiHeadAttention,
  'decoder_attention': multi_head.MultiHeadAttention,
}


@dataclasses.dataclass(frozen=True)
class _Routing:
  """Routes by the token alone, so that ids need no routing vocabulary."""

  num_experts: int = _EXPERTS

  def encoder_ids(self, tokens, segment_ids=None):
    return jnp.where(tokens > 0, tokens % (self.num_experts + 1), -1)

  decoder_ids = encoder_ids


def _config(sparse=False, **changes):
  sizes = {
    'vocab_size': _VOCAB,
    'emb_dim': 8,
    'num_heads': 2,
    'head_dim': 3,
    'mlp_dim': 9,
    'num_encoder_layers': 2,
    'num_decoder_layers': 1,
  }
  if sparse:
    sizes |= {
      'sparse_feed_forward': functools.partial(
        word_experts.MoweLayer, _EXPERTS, 4
      ),
      'sparse_encoder_layers': (1,),
      'sparse_decoder_layers': (0,),
      'routing': _Routing(),
    }
  return t5_config.T5Config(**(sizes | changes))


@functools.cache
def _params(sparse):
  model = t5.T5(_config(sparse))
  shapes = jax.eval_shape(
    functools.partial(parameters.initial_variables, model), jax.random.key(0)
  )['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), shapes
  )


@functools.cache
def _logits_function(sparse, **changes):
  model = t5.T5(_config(sparse, **changes))
  return jax.jit(functools.partial(model.apply, enable_dropout=False))


def _logits(sparse, inputs, targets, **keywords):
  decoder_inputs = keywords.pop('decoder_inputs', None)
  if decoder_inputs is None:
    decoder_inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  return np.asarray(
    _logits_function(sparse)(
      {'params': _params(sparse)}, inputs, decoder_inputs, targets, **keywords
    )
  )


def _tokens(seed, length, batch=_BATCH):
  return np.random.default_rng(seed).integers(
    2, _VOCAB, (batch, length), dtype=np.int32
  )


@pytest.mark.slow
@pytest.mark.parametrize('sparse', [False, True])
def test_padding_changes_nothing(sparse):
  inputs, targets = _tokens(0, _INPUTS), _tokens(1, _TARGETS)
  expected = _logits(sparse, inputs, targets)
  longer = [np.pad(x, ((0, 0), (0, 2))) for x in (inputs, targets)]
  actual = _logits(sparse, *longer)
  np.testing.assert_allclose(
    actual[:, :_TARGETS], expected, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('sparse', [False, True])
def test_the_decoder_sees_only_what_was(sparse):
  inputs, targets = _tokens(0, _INPUTS), _tokens(1, _TARGETS)
  changed = targets.copy()
  changed[:, 3] = (changed[:, 3] - 1) % (_VOCAB - 2) + 2
  one, other = (
    _logits(sparse, inputs, targets),
    _logits(sparse, inputs, changed),
  )
  # Target 3 is the input of the decoder at place 4.
  np.testing.assert_allclose(one[:, :4], other[:, :4], rtol=1e-5, atol=1e-5)
  assert np.abs(one[:, 4:] - other[:, 4:]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('sparse', [False, True])
def test_packed_examples_do_not_see_each_other(sparse):
  inputs, targets = _tokens(0, 3, batch=2), _tokens(1, 3, batch=2)
  alone = _logits(sparse, inputs, targets)
  shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  row = lambda x: np.pad(x.reshape(1, -1), ((0, 0), (0, 1)))
  segments = row(np.repeat([1, 2], 3))
  packed = _logits(
    sparse,
    row(inputs),
    row(targets),
    decoder_inputs=row(shifted),
    encoder_segment_ids=segments,
    decoder_segment_ids=segments,
  )
  np.testing.assert_allclose(
    packed[0, :6].reshape(2, 3, -1), alone, rtol=1e-4, atol=1e-4
  )


def test_routing_ids_of_the_batch_are_those_of_the_tokens():
  inputs, targets = _tokens(0, _INPUTS), _tokens(1, _TARGETS)
  routing = _Routing()
  shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  given = {
    'encoder_routing_ids': np.asarray(routing.encoder_ids(inputs)),
    'decoder_routing_ids': np.asarray(routing.decoder_ids(shifted)),
  }
  expected = _logits(True, inputs, targets)
  np.testing.assert_allclose(
    _logits(True, inputs, targets, **given), expected, rtol=1e-6
  )
  given['encoder_routing_ids'] = np.roll(given['encoder_routing_ids'], 1, 1)
  assert np.abs(_logits(True, inputs, targets, **given) - expected).max() > 1e-3


def test_float_tokens_are_cast():
  # t5x gives float tokens when it initializes a model.
  inputs, targets = _tokens(0, _INPUTS), _tokens(1, _TARGETS)
  np.testing.assert_array_equal(
    _logits(True, inputs.astype(np.float32), targets.astype(np.float32)),
    _logits(True, inputs, targets),
  )


@pytest.mark.slow
@pytest.mark.parametrize('sparse', [False, True])
def test_recomputing_blocks_changes_no_gradient(sparse):
  inputs, targets = _tokens(0, _INPUTS), _tokens(1, _TARGETS)

  def gradient(remat):
    model = t5.T5(_config(sparse, remat=remat, dropout_rate=0.2))
    loss = lambda params: jnp.sum(
      model.apply(
        {'params': params},
        inputs,
        targets,
        targets,
        rngs={'dropout': jax.random.key(1)},
      )
      ** 2
    )
    return jax.jit(jax.grad(loss))(_params(sparse))

  for one, other in zip(
    jax.tree.leaves(gradient(False)),
    jax.tree.leaves(gradient(True)),
    strict=True,
  ):
    scale = np.abs(one).max() + 1e-6
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * scale)


def test_float16_is_refused():
  with pytest.raises(ValueError, match="NaN. Use 'bfloat16'"):
    _config(dtype='float16')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'sparse_encoder_layers': (2,)}, r'0..1, as the encoder .* holds \[2\]'),
    ({'sparse_decoder_layers': (-1,)}, r'0..0, as the decoder .* \[-1\]'),
    ({'sparse_feed_forward': None}, 'Set both or neither'),
    (
      {'sparse_encoder_layers': (), 'sparse_decoder_layers': ()},
      'Set both or neither',
    ),
    ({'routing': _Routing(4)}, 'layer has 5 and the vocabulary 4'),
    ({'mlp_activations': ('gelu', 'nonsense')}, 'nonsense'),
  ],
)
def test_configs_that_cannot_work_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    _config(sparse=True, **changes)


@pytest.mark.parametrize(
  ('field', 'inner', 'message'),
  [
    ('encoder_attention', 'StickBreaking', 'must look in both directions'),
    ('decoder_attention', 'NearestFirst', 'one query at a time'),
    ('attention', 'StickBreaking', 'order of its tokens'),
  ],
)
def test_attention_that_does_not_fit_its_place_is_refused(
  field, inner, message
):
  heads = functools.partial(
    mixture_of_heads.MixtureOfAttentionHeads,
    inner=getattr(inner_attention, inner)(),
  )
  # `attention` also makes the attention of the encoder, which would be refused
  # first.
  others = {} if field != 'attention' else _PLAIN_SELF_ATTENTION
  with pytest.raises(ValueError, match=message):
    _config(**({field: heads} | others))


def test_a_sparse_model_without_routing_needs_ids():
  model = t5.T5(_config(True, routing=None))
  ids = jnp.ones((1, 2), jnp.int32)
  with pytest.raises(
    ValueError, match='Set T5Config.routing to a RoutingVocabulary'
  ):
    jax.eval_shape(
      functools.partial(model.apply, enable_dropout=False),
      {'params': _params(True)},
      ids,
      ids,
      ids,
    )
