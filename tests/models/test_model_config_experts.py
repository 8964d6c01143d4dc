"""Experts that an address names, in place of a routing vocabulary."""

import dataclasses
import functools
import json

import drawn_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training

from mowe.layers.memory import word_experts
from mowe.model_folders import model_folder
from mowe.models import model_config, token_memories
from mowe.models.decoder_only import decoder_only_config
from mowe.models.families import families, model_description, saved_config
from mowe.words import byte_vocabulary
from mowe.words.addresses import expert_address, hashed_ngrams, ngram_hashes

_VOCAB, _ROWS, _EXPERTS = tiny_training.VOCAB, 37, 48


def _names(seed=0):
  (hashed,) = ngram_hashes.engram_hashes(_VOCAB, [_ROWS], 1, seed=seed)
  return expert_address.ExpertAddress(
    hashed_ngrams.HashedNGrams(hashed), _EXPERTS
  )


def _t5(**changes):
  layer = functools.partial(word_experts.MoweLayer, _EXPERTS, 4)
  settings = {
    'routing': None,
    'expert_names': _names(),
    'sparse_feed_forward': layer,
  }
  return tiny_training.make_config(**(settings | changes))


def _language_model():
  return decoder_only_config.DecoderOnlyConfig(
    _VOCAB,
    24,
    4,
    2,
    20,
    2,
    dropout_rate=0.0,
    sparse_feed_forward=functools.partial(word_experts.MoweLayer, _EXPERTS, 4),
    sparse_decoder_layers=(1,),
    expert_names=_names(),
  )


@pytest.mark.parametrize('make', [_t5, _language_model])
def test_steps_of_decoding_name_the_experts_of_whole_texts(make):
  model = families.build(make())
  params = drawn_models.parameters(model)
  rng = np.random.default_rng(1)
  inputs = rng.integers(3, _VOCAB, (3, 5)).astype(np.int32)
  targets = rng.integers(3, _VOCAB, (3, 6)).astype(np.int32)
  whole = targets
  batch = {'encoder_input_tokens': inputs}
  if model.config.streams == ('decoder',):
    whole, batch = np.concatenate([inputs, targets], axis=1), {}
  batch |= {
    'decoder_input_tokens': np.pad(whole, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': whole,
  }
  expected = drawn_models.logits(model.config, params, batch)[
    :, -targets.shape[1] :
  ]
  step, cache = model.start_generation(
    {'params': params}, jnp.asarray(inputs), targets.shape[1], 1
  )
  step, found = jax.jit(step), []
  for tokens in np.pad(targets, ((0, 0), (1, 0)))[:, :-1].T:
    logits, cache, _ = step(tokens[:, None], cache)
    found.append(logits)
  tiny_training.assert_close(jnp.stack(found, axis=1), expected, 1e-5)
  # The routing ids matter: those of another seed give other logits.
  other = dataclasses.replace(model.config, expert_names=_names(seed=1))
  changed = drawn_models.logits(other, params, batch)[:, -targets.shape[1] :]
  assert np.abs(changed - expected).max() > 1e-3


def test_a_config_is_saved_and_read_again():
  for config in (_t5(), _language_model()):
    tree = json.loads(json.dumps(saved_config.to_json(config)))
    again = saved_config.from_json(tree)
    assert again.expert_names == config.expert_names
    assert saved_config.to_json(again) == tree
    (address,) = token_memories.addresses(again).values()
    assert address.fingerprint == config.expert_names.address.fingerprint
    assert model_config.names_experts(again) is again.expert_names


def test_weights_of_other_names_are_refused(tmp_path):
  vocabulary = byte_vocabulary.ByteVocabulary(0)
  described = model_description.describe(_t5(), vocabulary)
  (tmp_path / 'model.json').write_text(json.dumps(described))
  model_folder.check_same_vocabularies(str(tmp_path), _t5(), vocabulary)
  other = _t5(expert_names=_names(seed=1))
  with pytest.raises(ValueError, match='names the experts .* same routing'):
    model_folder.check_same_vocabularies(str(tmp_path), other, vocabulary)


def test_layer_and_address_have_equally_many_experts():
  layer = functools.partial(word_experts.MoweLayer, _EXPERTS + 1, 4)
  with pytest.raises(ValueError, match='layer has 49 and the address 48'):
    _t5(sparse_feed_forward=layer)


def test_names_without_experts_are_refused():
  with pytest.raises(ValueError, match='needs layers with word experts'):
    tiny_training.make_config(sparse=False, expert_names=_names())
