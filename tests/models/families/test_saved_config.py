"""Tests a config to JSON and back; files that name other things are refused.

Also tests `families`.
"""

import dataclasses
import functools
import json

import flaxformer_moe
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers.dispatch import capacity_dispatch, token_groups
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import moe
from mowe.layers.routers import (
  experts_choose,
  hash_routing,
  router_losses,
  tokens_choose,
)
from mowe.models import parameters
from mowe.models.families import saved_config
from mowe.models.t5 import t5, t5_config


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
  return t5_config.T5Config(**(sizes | changes))


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
  layer, expected = (c.make_sparse_layers()[0] for c in (again, config))
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
    'class': 'mowe.layers.memory.word_experts.MoweLayer',
    'fields': {
      'num_experts': 13,
      'expert_dim': 3,
      'activations': ['relu'],
      'share_experts': False,
      'table_dtype': 'float32',
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
  'name', ['os.system', 'mowe.cli.main.main', 'subprocess.Popen']
)
def test_a_file_cannot_call_anything(name):
  tree = _through_text(_mowe())
  tree['sparse_feed_forward'] = {'class': name, 'fields': {}}
  with pytest.raises(ValueError, match='mowe.layers.* that you trust'):
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


def _moe(routing, decoder_routing=None, **fields):
  layer = functools.partial(
    moe.MoeLayer,
    4,
    3,
    dispatch=capacity_dispatch.CapacityDispatch(1.5, 2),
    groups=token_groups.TokenGroups(16),
    **fields,
  )
  of_decoder = None
  if decoder_routing is not None:
    of_decoder = functools.partial(layer, routing=decoder_routing)
  return _dense(
    sparse_feed_forward=functools.partial(layer, routing=routing),
    sparse_decoder_feed_forward=of_decoder,
    sparse_encoder_layers=(1,),
    sparse_decoder_layers=(0,),
  )


_TABLE = hash_routing.balanced_table(np.arange(700), 4)


@pytest.mark.parametrize(
  'config',
  [
    _moe(tokens_choose.TokensChoose(2, renormalize=True, jitter=0.1)),
    _moe(
      experts_choose.ExpertsChoose(1.5),
      tokens_choose.TokensChoose(),
      losses=flaxformer_moe.FlaxformerLosses(),
      shared_expert_dim=5,
      expert_dropout_rate=0.25,
    ),
    _moe(hash_routing.HashRouter(700, table=_TABLE)),
    _moe(hash_routing.HashRouter(3, table=(3, 0, 1))),
    _moe(hash_routing.WordHashRouter(700, seed=3)),
  ],
)
def test_layers_of_parts_come_back(config, monkeypatch):
  monkeypatch.setattr(saved_config, '_trusted', {'flaxformer_moe'})
  again = saved_config.from_json(_through_text(config))
  assert again.make_sparse_layers() == config.make_sparse_layers()
  for layer in again.make_sparse_layers():
    assert isinstance(layer.losses, router_losses.RouterLosses)
  has_two = config.sparse_decoder_feed_forward is not None
  assert has_two == (again.sparse_decoder_feed_forward is not None)


def test_parts_are_plain_and_long_tables_short():
  router = hash_routing.HashRouter(700, table=_TABLE)
  tree = _through_text(_moe(router))['sparse_feed_forward']['fields']
  assert tree['groups'] == {
    'class': 'mowe.layers.dispatch.token_groups.TokenGroups',
    'fields': {'size': 16, 'multiple': 1},
  }
  # The experts of 700 ids are numbers below 256, so each has one byte, and
  # base64 has 4 letters for 3 bytes.
  table = tree['routing']['fields']['table']
  assert table['dtype'] == 'uint8' and len(table['integers']) < 700 * 4 / 3 + 4


@pytest.mark.parametrize('low, high', [(0, 256), (-1, 70_000), (0, 2**40)])
def test_integers_of_any_size_come_back(low, high):
  values = (low, high, *range(100))
  router = hash_routing.HashRouter(len(values), table=values)
  # No router of a model has such a table; here it is only written and read.
  tree = json.loads(json.dumps(saved_config._part_to_json(router)))
  assert saved_config._value_from_json(tree) == router


def test_a_class_that_no_file_could_name_is_not_saved():
  @dataclasses.dataclass(frozen=True)
  class Local(tokens_choose.TokensChoose):
    pass

  with pytest.raises(ValueError, match='Local. Move the class to a module'):
    saved_config.to_json(_moe(Local()))


def test_an_array_is_not_saved():
  table = np.arange(3, dtype=np.int32)
  with pytest.raises(ValueError, match=r'HashRouter.table .* is a ndarray'):
    saved_config._part_to_json(hash_routing.HashRouter(3, table=table))


@pytest.mark.parametrize(
  ('name', 'change'),
  [
    ('a function', {'class': 'os.system', 'fields': {}}),
    ('a layer', {'class': 'mowe.layers.mixtures.moe.MoeLayer', 'fields': {}}),
    (
      'a function of ours',
      {'class': 'mowe.layers.routers.router_base.jax', 'fields': {}},
    ),
    (
      'a class under another module',
      {'class': 'mowe.layers.mixtures.moe.Any', 'fields': {}},
    ),
    ('no class', {'fields': {}}),
    ('more than a class', {'class': 'os.system', 'fields': {}, 'call': 1}),
  ],
)
def test_a_part_cannot_be_anything_else(name, change):
  del name
  tree = _through_text(_moe(tokens_choose.TokensChoose()))
  tree['sparse_feed_forward']['fields']['routing'] = change
  expected = 'part of a saved feed-forward must name|modules that you trust'
  with pytest.raises(ValueError, match=expected):
    saved_config.from_json(tree)


def test_fields_and_integers_that_were_changed_are_refused():
  tree = _through_text(_moe(hash_routing.HashRouter(700, table=_TABLE)))
  fields = tree['sparse_feed_forward']['fields']['routing']['fields']
  fields['table']['dtype'] = 'O'
  with pytest.raises(ValueError, match="have 'O'. The file was changed"):
    saved_config.from_json(tree)
  fields['num_towers'] = 3
  with pytest.raises(ValueError, match=r"has \['num_towers'\]. It was written"):
    saved_config.from_json(tree)
