"""A config to JSON and back; files that name other things are refused."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from mowe.layers import word_experts
from mowe.models import parameters, saved_config, t5


class _Routing:
  num_experts = 13


def _dense(**changes):
  sizes = {
    'vocab_size': 11,
    'emb_dim': 6,
    'num_heads': 2,
    'head_dim': 5,
    'mlp_dim': 7,
    'num_encoder_layers': 3,
    'num_decoder_layers': 2,
    'mlp_activations': ('relu',),
    'logits_via_embedding': True,
    'dropout_rate': 0.25,
    'dtype': jnp.bfloat16,
  }
  return t5.T5Config(**(sizes | changes))


def _mowe():
  return _dense(
    sparse_feed_forward=functools.partial(
      word_experts.MoweLayer,
      13,
      expert_dim=3,
      activations=('relu',),
      share_experts=False,
    ),
    sparse_encoder_layers=(0, 2),
    sparse_decoder_layers=(1,),
    routing=_Routing(),
  )


def _through_text(config):
  return json.loads(json.dumps(saved_config.to_json(config)))


def test_a_dense_config_comes_back():
  assert saved_config.from_json(_through_text(_dense())) == _dense()


def test_a_mowe_config_comes_back():
  config, routing = _mowe(), _Routing()
  again = saved_config.from_json(_through_text(config), routing)
  assert again.routing is routing
  assert again.sparse_encoder_layers == (0, 2)
  layer, expected = (c.make_sparse_feed_forward() for c in (again, config))
  assert layer == expected
  shapes = [
    jax.eval_shape(
      functools.partial(parameters.initial_variables, t5.T5(c)),
      jax.random.key(0),
    )['params']
    for c in (again, config)
  ]
  assert shapes[0] == shapes[1]


def test_the_text_is_plain():
  tree = _through_text(_mowe())
  assert tree['dtype'] == 'bfloat16'
  assert 'routing' not in tree
  assert tree['sparse_feed_forward'] == {
    'class': 'mowe.layers.word_experts.MoweLayer',
    'fields': {
      'num_experts': 13,
      'expert_dim': 3,
      'activations': ['relu'],
      'share_experts': False,
    },
  }


def test_changes_replace_fields():
  again = saved_config.from_json(
    _through_text(_dense()), dropout_rate=0.0, dtype='float32'
  )
  assert again.dropout_rate == 0.0 and again.dtype == jnp.float32
  assert again.emb_dim == 6


def test_a_field_of_another_version_is_refused():
  with pytest.raises(ValueError, match=r"has \['num_towers'\]. It was written"):
    saved_config.from_json(_through_text(_dense()) | {'num_towers': 3})


@pytest.mark.parametrize(
  'name', ['os.system', 'mowe.commands.main.main', 'subprocess.Popen']
)
def test_a_file_cannot_call_anything(name):
  tree = _through_text(_mowe())
  tree['sparse_feed_forward'] = {'class': name, 'fields': {}}
  with pytest.raises(ValueError, match='class in mowe.layers'):
    saved_config.from_json(tree, _Routing())


def test_a_layer_that_is_not_there_is_refused():
  tree = _through_text(_mowe())
  for name in ('word_experts.Absent', 'absent.MoweLayer', 'word_experts.jax'):
    tree['sparse_feed_forward']['class'] = f'mowe.layers.{name}'
    with pytest.raises(ValueError, match='mowe.layers'):
      saved_config.from_json(tree, _Routing())


def test_another_number_of_experts_is_refused():
  routing = _Routing()
  routing.num_experts = 5
  with pytest.raises(ValueError, match='layer has 13 and the vocabulary 5'):
    saved_config.from_json(_through_text(_mowe()), routing)
