"""Tests adding and pruning modules: shapes, outputs, and saved configs.

Also tests `modules_added`, `modules_edits`, and `modules_pruned`.
"""

import dataclasses
import functools
import json

import flax
import jax
import numpy as np
import pytest

from mowe.layers.attention import self_attention
from mowe.layers.mixtures import mixture_of_heads, moe
from mowe.layers.routers import experts_choose, module_router, tokens_choose
from mowe.models import initialization
from mowe.models.decoder_only import decoder_only_config
from mowe.models.families import families, saved_config
from mowe.models.surgery import (
  module_surgery,
  modules_added,
  modules_edits,
  modules_pruned,
)
from mowe.models.t5 import t5_config

NUM, VOCAB = 6, 23
TOP2 = tokens_choose.TokensChoose(2)
PLACES = ('decoder/layers_0/mlp', 'decoder/layers_1/mlp')


def make_layer(**fields):
  settings = {
    'expert_dim': 3,
    'routing': TOP2,
    'logits': module_router.MlpLogits(5),
  }
  return functools.partial(moe.MoeLayer, NUM, **(settings | fields))


def one_stack(**changes):
  settings = {
    'vocab_size': VOCAB,
    'emb_dim': 8,
    'num_heads': 2,
    'head_dim': 4,
    'mlp_dim': 7,
    'num_layers': 2,
    'dropout_rate': 0.0,
    'attention': self_attention.RotaryAttention,
    'sparse_feed_forward': make_layer(),
    'sparse_decoder_layers': (0, 1),
  }
  return decoder_only_config.DecoderOnlyConfig(**(settings | changes))


def two_stacks(**changes):
  settings = {
    'vocab_size': VOCAB,
    'emb_dim': 8,
    'num_heads': 2,
    'head_dim': 4,
    'mlp_dim': 7,
    'num_encoder_layers': 2,
    'num_decoder_layers': 1,
    'dropout_rate': 0.0,
    'sparse_feed_forward': make_layer(logits=module_router.CentroidLogits(5)),
    'sparse_decoder_feed_forward': make_layer(
      routing=tokens_choose.TokensChoose(1, sigmoid=True, bias_rate=0.01),
      expert_dim=4,
    ),
    'sparse_encoder_layers': (1,),
    'sparse_decoder_layers': (0,),
  }
  return t5_config.T5Config(**(settings | changes))


def of_heads(stack=mixture_of_heads.MixtureOfSelfAttentionHeads, **fields):
  settings = {'num_experts': 5, 'routing': TOP2} | fields
  return functools.partial(stack, **settings)


def heads_in_one_stack():
  return one_stack(
    attention=of_heads(), logits_via_embedding=True, num_layers=2
  )


def heads_in_two_stacks():
  """In a T5, all three attentions are made by the same field."""
  whole = mixture_of_heads.MixtureOfAttentionHeads
  return two_stacks(
    attention=of_heads(whole),
    sparse_feed_forward=None,
    sparse_decoder_feed_forward=None,
    sparse_encoder_layers=(),
    sparse_decoder_layers=(),
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('make', 'numbers'),
  [
    (heads_in_one_stack, {'mlp': 3, 'attention': 2}),
    (heads_in_two_stacks, {'attention': 3}),
  ],
)
def test_attention_modules_come_and_go(make, numbers):
  config = make()
  params = make_params(config)
  larger, edits = modules_added.add(config, numbers)
  new = modules_edits.apply(edits, params)
  check_shapes(larger, new)
  before = outputs(config, params)[0]
  assert_close(outputs(larger, new)[0], before)
  # Pruning takes the new modules away again, and one more module of one layer.
  layers = module_surgery.module_layers(larger)
  number = lambda one: numbers[one.kind]
  kept = {one.place: tuple(range(one.num_modules)) for one in layers}
  one = next(one for one in layers if one.kind == 'attention')
  left = (0, 1, 3, 4, 5)
  assert number(one) >= 1
  kept[one.place] = left
  smaller, edits = modules_pruned.prune(
    larger, {one.place: left}, modules_pruned.KeepGates()
  )
  last = modules_edits.apply(edits, new)
  check_shapes(smaller, last)
  found = {
    one.place: one.num_modules for one in module_surgery.module_layers(smaller)
  }
  assert found == {place: len(numbers) for place, numbers in kept.items()}
  tree = json.loads(json.dumps(saved_config.to_json(smaller)))
  again = saved_config.from_json(tree)
  logits = outputs(again, last)[0]
  assert np.isfinite(logits).all() and np.abs(logits - before).max() > 0


def make_params(config, seed=0):
  """Parameters with routers that are far from even."""
  rng = np.random.default_rng(seed)
  shapes = initialization.abstract_variables(families.build(config))['params']
  return {
    path: rng.normal(size=x.shape).astype(np.float32)
    for path, x in flax.traverse_util.flatten_dict(shapes).items()
  }


def make_batch(config, seed=0):
  rng = np.random.default_rng(seed)
  ids = lambda n: np.where(
    np.arange(n) < np.array([[n], [n - 2]]), rng.integers(1, VOCAB, (2, n)), 0
  ).astype(np.int32)
  batch = {'decoder_target_tokens': ids(9)}
  batch['decoder_input_tokens'] = np.pad(
    batch['decoder_target_tokens'], ((0, 0), (1, 0))
  )[:, :-1]
  if 'encoder' in config.streams:
    batch['encoder_input_tokens'] = ids(7)
  return batch


def outputs(config, params):
  logits, sown = jax.jit(
    lambda p, batch: families.build(config).apply(
      {'params': p},
      batch,
      enable_dropout=False,
      method='of_batch',
      mutable=['router_stats'],
    )
  )(flax.traverse_util.unflatten_dict(params), make_batch(config))
  real = make_batch(config)['decoder_target_tokens'] > 0
  return np.asarray(logits)[real], sown['router_stats']


def check_shapes(config, params):
  shapes = initialization.abstract_variables(families.build(config))['params']
  wanted = flax.traverse_util.flatten_dict(flax.core.unfreeze(shapes))
  assert {p: x.shape for p, x in params.items()} == {
    p: x.shape for p, x in wanted.items()
  }


def assert_close(actual, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.slow
@pytest.mark.parametrize('make', [one_stack, two_stacks])
def test_added_modules_leave_the_model_as_it_is(make):
  config = make()
  params = make_params(config)
  larger, edits = modules_added.add(config, {'mlp': 3}, seed=1)
  new = modules_edits.apply(edits, params)
  check_shapes(larger, new)
  for path, array in params.items():
    if path not in edits:
      assert new[path] is array
  assert_close(outputs(larger, new)[0], outputs(config, params)[0])
  for one in module_surgery.module_layers(larger):
    assert one.num_modules == NUM + 3
    for path in one.outputs:
      assert not new[path][NUM:].any()
    inner = [path for path in one.slabs if path not in one.outputs]
    assert inner and all(new[path][NUM:].std() > 0 for path in inner)
  parts = modules_added.new_parts(larger)
  assert set(parts) == set(edits)
  assert all(number == 3 for _, number in parts.values())
  assert modules_added.new_parts(config) == {}


@pytest.mark.slow
def test_added_modules_are_saved_with_the_config():
  larger, _ = modules_added.add(two_stacks(), {'mlp': 2, 'attention': 0}, k=2)
  assert larger.block_layers == ()
  tree = json.loads(json.dumps(saved_config.to_json(larger)))
  again = saved_config.from_json(tree)
  assert saved_config.to_json(again) == tree
  (first, _) = module_surgery.module_layers(again)
  assert first.layer.routing.num_old == NUM
  assert first.layer.routing.k == 2
  again_larger, _ = modules_added.add(again, {'mlp': 1})
  assert module_surgery.module_layers(again_larger)[0].num_modules == NUM + 3


@dataclasses.dataclass(frozen=True)
class Masked(tokens_choose.TokensChoose):
  """A router of all modules that masks some, before or after the softmax."""

  removed: tuple[int, ...] = ()
  before: bool = False

  def __call__(self, inputs, **settings):
    mask = np.isin(np.arange(NUM), self.removed)[None, None]
    logits = inputs.logits
    if self.before:
      logits = jax.numpy.where(mask, -1e9, logits)
    inputs = inputs._replace(logits=logits, excluded=jax.numpy.asarray(mask))
    return super().__call__(inputs, **settings)


KEPT = {PLACES[0]: (0, 2, 5), PLACES[1]: (1, 2, 3, 4)}


def masked(before):
  """The whole model with the modules masked that were not kept."""
  changes = {
    place: {
      'routing': Masked(
        2,
        removed=tuple(m for m in range(NUM) if m not in kept),
        before=before,
      )
    }
    for place, kept in KEPT.items()
  }
  return module_surgery.with_layers(one_stack(), changes)


@pytest.mark.slow
@pytest.mark.parametrize(
  'gates', [modules_pruned.Renormalise(), modules_pruned.KeepGates()]
)
def test_a_pruned_model_is_the_masked_one(gates):
  config = one_stack()
  params = make_params(config)
  smaller, edits = modules_pruned.prune(config, KEPT, gates)
  new = modules_edits.apply(edits, params)
  check_shapes(smaller, new)
  before = isinstance(gates, modules_pruned.Renormalise)
  expected = outputs(masked(before), params)[0]
  assert_close(outputs(smaller, new)[0], expected)
  assert np.abs(outputs(config, params)[0] - expected).max() > 1e-3
  tree = json.loads(json.dumps(saved_config.to_json(smaller)))
  again = saved_config.from_json(tree)
  assert_close(outputs(again, new)[0], expected)
  assert [one.num_modules for one in module_surgery.module_layers(again)] == [
    3,
    4,
  ]
  # The smaller model is pruned once more, with the numbers of its own modules.
  less = {PLACES[1]: (0, 3)}
  least, edits = modules_pruned.prune(again, less, gates)
  last = modules_edits.apply(edits, new)
  check_shapes(least, last)
  if isinstance(gates, modules_pruned.KeepGates):
    (_, second) = module_surgery.module_layers(least)
    assert second.layer.routing.kept == (1, 4)
    assert second.num_columns == NUM


@pytest.mark.slow
def test_pruning_added_modules_renormalises_both_kinds():
  config, edits = modules_added.add(one_stack(), {'mlp': 3})
  params = modules_edits.apply(edits, make_params(one_stack()))
  kept = dict.fromkeys(PLACES, (0, 1, 4, 7))
  smaller, edits = modules_pruned.prune(
    config, kept, modules_pruned.Renormalise()
  )
  new = modules_edits.apply(edits, params)
  check_shapes(smaller, new)
  assert smaller.block_layers == ()
  router = module_surgery.module_layers(smaller)[0].layer.routing
  assert (router.num_old, router.k) == (3, 1)
  kept = dict.fromkeys(PLACES, (0, 1, 2, 3, 4, 5, 8))
  smaller, edits = modules_pruned.prune(
    config, kept, modules_pruned.KeepGates()
  )
  new = modules_edits.apply(edits, params)
  check_shapes(smaller, new)
  # Only modules whose outputs are zero were removed.
  assert_close(outputs(smaller, new)[0], outputs(config, params)[0])


def test_sigmoids_do_not_depend_on_removed_modules():
  config = two_stacks()
  kept = {'decoder/layers_0/mlp': (1, 2)}
  smaller, edits = modules_pruned.prune(
    config, kept, modules_pruned.KeepGates()
  )
  new = modules_edits.apply(edits, make_params(config))
  check_shapes(smaller, new)
  assert smaller.of_block('encoder', 1) is smaller
  layer = module_surgery.layer_at(smaller, 'decoder/layers_0/mlp')
  assert layer.num_experts == 2
  assert isinstance(layer.routing, tokens_choose.TokensChoose)


def test_which_modules_are_left():
  one = module_surgery.module_layers(one_stack())[0]
  counts = [5, 9, 0, 9, 1, 6]
  assert modules_pruned.most_used(one, counts, 0.5) == (1, 3, 5)
  assert modules_pruned.most_used(one, counts, 1.0) == tuple(range(NUM))
  # The mean of the counts is 5.
  assert modules_pruned.above_threshold(one, counts, 1.0) == (0, 1, 3, 5)
  assert modules_pruned.above_threshold(one, counts, 0.1) == (0, 1, 3, 4, 5)
  assert modules_pruned.above_threshold(one, counts, 99.0) == (1, 3)
  assert modules_pruned.above_threshold(one, counts, 1.1, 4) == (0, 1, 3, 5)
  larger, _ = modules_added.add(one_stack(), {'mlp': 3})
  one = module_surgery.module_layers(larger)[0]
  counts = [5, 9, 0, 9, 1, 6, 0, 2, 1]
  # A new module is kept, however seldom it was chosen, as every token must meet
  # one.
  assert modules_pruned.most_used(one, counts, 0.33) == (1, 3, 7)


@pytest.mark.slow
def test_what_cannot_be_done_is_said():
  dense = one_stack(sparse_feed_forward=None, sparse_decoder_layers=())
  with pytest.raises(ValueError, match='trained with MoeLayer'):
    modules_added.add(dense, {'mlp': 1})
  with pytest.raises(ValueError, match='There is nothing to prune'):
    modules_pruned.prune(dense, {}, modules_pruned.KeepGates())
  config = one_stack()
  with pytest.raises(ValueError, match='Leave --attention out'):
    modules_added.add(config, {'mlp': 1, 'attention': 2})
  with pytest.raises(ValueError, match='Give --mlp or --attention'):
    modules_added.add(config, {'mlp': 0})
  with pytest.raises(ValueError, match='or lower --k'):
    modules_added.add(config, {'mlp': 2}, k=3)
  encoder = two_stacks(
    sparse_feed_forward=make_layer(routing=experts_choose.ExpertsChoose(1.0))
  )
  with pytest.raises(ValueError, match='Train such a model'):
    modules_added.add(encoder, {'mlp': 1})
  prune = lambda kept: modules_pruned.prune(
    config, kept, modules_pruned.KeepGates()
  )
  with pytest.raises(ValueError, match='so at least 2 must be left, but 1'):
    prune({PLACES[0]: (3,)})
  with pytest.raises(ValueError, match='so at least 2 must be left, but 0'):
    prune({PLACES[0]: ()})
  with pytest.raises(ValueError, match='Name each one that is left once'):
    prune({PLACES[0]: (1, 6)})
  with pytest.raises(ValueError, match='Measure this very model'):
    prune({'decoder/layers_7/mlp': (1, 2)})
  one = module_surgery.module_layers(config)[0]
  with pytest.raises(ValueError, match='above 0 and at most 1, but is 0'):
    modules_pruned.most_used(one, [1] * NUM, 0.0)
  with pytest.raises(ValueError, match='0.2 of 6 are 1'):
    modules_pruned.most_used(one, [1] * NUM, 0.2)
  with pytest.raises(ValueError, match='but there are 5'):
    modules_pruned.most_used(one, [1] * 5, 0.5)
  with pytest.raises(ValueError, match='threshold must not be negative'):
    modules_pruned.above_threshold(one, [1] * NUM, -1.0)
  smaller, _ = modules_pruned.prune(config, KEPT, modules_pruned.KeepGates())
  with pytest.raises(ValueError, match='in the same way again'):
    modules_pruned.prune(
      smaller, {PLACES[1]: (0, 1)}, modules_pruned.Renormalise()
    )
  with pytest.raises(ValueError, match='block_layers must name layers'):
    dataclasses.replace(config, block_layers=(('decoder/layers_9/mlp', None),))
