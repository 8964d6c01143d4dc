"""Tests the plug-in in the real T5X, where this is installed; see docs/t5x.md.

Run it with T5X on PYTHONPATH:

  python -m pytest tests/interop/t5x/test_t5x_models.py tests/interop/t5x/test_t5x_models_runs.py --slow
"""

import dataclasses
import functools
import importlib.util

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_memories

from mowe.layers.dispatch import capacity_dispatch, token_groups
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import moe
from mowe.layers.routers import tokens_choose
from mowe.models import decoding, initialization, parameters, threefry
from mowe.models.t5 import t5, t5_config
from mowe.training import router_training, train_state, training_step
from mowe.training.optimization import optimizers, row_optimizers
from mowe.words import byte_vocabulary, routing_vocabulary, vocabulary_builder
from mowe.words.plans import batch_plans, step_plans

if importlib.util.find_spec('t5x') is None:
  pytest.skip(
    'needs T5X on PYTHONPATH; docs/t5x.md says how to install it',
    allow_module_level=True,
  )

from t5x import adafactor, partitioning, trainer
from t5x import metrics as t5x_metrics
from t5x import optimizers as t5x_optimizers
from t5x import train_state as t5x_train_state
from t5x.contrib.moe import partitioning as moe_partitioning
from t5x.contrib.moe import trainer as moe_trainer

from mowe.data import seqio_stream
from mowe.interop.t5x import t5x_models, t5x_rules

# Each of these sequences of bytes holds a token of every expert.
_BATCH, _INPUTS, _TARGETS = 8, 13, 9
_EXPERTS = 3
_TOKENS = (
  'encoder_input_tokens',
  'decoder_input_tokens',
  'decoder_target_tokens',
)
_WORDS = ('a', 'b', 'c', 'd', 'e', 'f')


@dataclasses.dataclass(frozen=True)
class _World:
  vocabulary: byte_vocabulary.ByteVocabulary
  routing: routing_vocabulary.RoutingVocabulary

  def config(self, kind, **changes) -> t5_config.T5Config:
    sizes = {
      'vocab_size': self.vocabulary.size + 2,
      'emb_dim': 12,
      'num_heads': 2,
      'head_dim': 5,
      'mlp_dim': 14,
      'num_encoder_layers': 2,
      'num_decoder_layers': 2,
      'dropout_rate': 0.0,
    }
    sparse = {
      'dense': None,
      'mowe': functools.partial(word_experts.MoweLayer, _EXPERTS, 4),
      'moe': functools.partial(
        moe.MoeLayer,
        4,
        6,
        routing=tokens_choose.TokensChoose(2, renormalize=True),
        dispatch=capacity_dispatch.CapacityDispatch(1.25),
        groups=token_groups.TokenGroups(24),
      ),
    }[kind]
    if sparse is not None:
      sizes |= {
        'sparse_feed_forward': sparse,
        'sparse_encoder_layers': (1,),
        'sparse_decoder_layers': (0,),
      }
    if kind == 'mowe':
      sizes['routing'] = self.routing
    return t5_config.T5Config(**(sizes | changes))

  def model(self, kind, optimizer=None, config=None, **settings):
    vocabulary = seqio_stream.seqio_vocabulary(self.vocabulary)
    if optimizer is None:
      optimizer = _adafactor()
    return t5x_models.EncoderDecoderModel(
      t5.T5(config or self.config(kind)),
      vocabulary,
      vocabulary,
      optimizer,
      z_loss=1e-4,
      **settings,
    )


@pytest.fixture(scope='module')
def world():
  vocabulary = byte_vocabulary.ByteVocabulary(extra_ids=3)
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    [' '.join(_WORDS)],
    vocabulary,
    num_words=len(_WORDS),
    num_experts=_EXPERTS,
    num_skipped=0,
  )
  return _World(vocabulary, routing)


def _adafactor():
  return adafactor.Adafactor(
    decay_rate=0.8, logical_factor_rules=t5x_rules.factor_rules()
  )


def _batch(world, seed=0):
  """Rows of uneven lengths; inputs and targets hold a token of every expert."""
  rng = np.random.default_rng(seed)

  def tokens(length, shortest):
    texts = [' '.join(rng.permutation(_WORDS)) for _ in range(_BATCH)]
    ids = np.array([world.vocabulary.encode(text)[:length] for text in texts])
    ids = np.pad(ids, ((0, 0), (0, length - ids.shape[1])))
    ends = rng.integers(shortest, length + 1, (_BATCH, 1))
    ends[0] = length
    return np.where(np.arange(length) < ends, ids, 0).astype(np.int32)

  inputs, targets = tokens(_INPUTS, 5), tokens(_TARGETS, 0)
  decoder_inputs = np.zeros_like(targets)
  decoder_inputs[:, 1:] = targets[:, :-1]
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': decoder_inputs,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets > 0).astype(np.float32),
  }


def _start(model, params):
  """A train state of T5X with these parameters, at step 0."""
  variables = model.get_initial_variables(jax.random.key(0), {})
  # These are copies, because the trainer donates them.
  params = jax.tree.map(jnp.array, params)
  variables = flax.core.freeze({**variables, 'params': params})
  return t5x_train_state.FlaxOptimTrainState.create(
    model.optimizer_def, variables
  )


class _OneDevice(partitioning.PjitPartitioner):
  """A partitioner for one device; T5X's own takes all of them."""

  @property
  def mesh(self):
    return jax.sharding.Mesh(
      np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'model')
    )


class _FourDevices(moe_partitioning.MoePjitPartitioner):
  """A partitioner for four devices; contrib/moe's does not split CPUs."""

  @property
  def mesh(self):
    return jax.sharding.Mesh(
      np.array(jax.devices()[:4]).reshape(2, 2, 1), ('data', 'expert', 'model')
    )


class _Run:
  """A trainer of T5X that is called batch by batch."""

  def __init__(self, model, params, folder, on_four_devices=False):
    if on_four_devices:
      partitioner = _FourDevices(2, num_partitions=1)
      make = functools.partial(moe_trainer.MoeTrainer, num_expert_partitions=2)
    else:
      make = trainer.Trainer
      partitioner = _OneDevice(
        num_partitions=1,
        logical_axis_rules=partitioning.standard_logical_axis_rules(
          additional_rules=t5x_rules.axis_rules()
        ),
      )
    state = _start(model, params)
    axes = partitioner.get_mesh_axes(state)
    self.trainer = make(
      model=model,
      train_state=partitioner.move_params_to_devices(state, axes),
      partitioner=partitioner,
      eval_names=[],
      summary_dir=str(folder),
      train_state_axes=axes,
      rng=jax.random.key(0),
      learning_rate_fn=_rate,
      num_microbatches=None,
    )

  def step(self, batch):
    """Trains one more step, and returns its metrics."""
    values = self.trainer.train(iter([batch]), 1).result()
    return {name: float(value.value) for name, value in values.items()}


@pytest.fixture(autouse=True)
def as_in_t5x():
  """Allows rank promotion, because T5X adds scalars to arrays."""
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  yield
  jax.config.update('jax_numpy_rank_promotion', 'raise')


def _rate(count):
  return 0.05 * jax.lax.rsqrt(jnp.asarray(count, jnp.float32) + 4.0)


def _with_plan(world, batch):
  """The batch with routing ids, and a plan whose sizes hold any batch."""
  batch = batch | {
    'encoder_routing_ids': world.routing.encoder_ids(
      batch['encoder_input_tokens']
    ),
    'decoder_routing_ids': world.routing.decoder_ids(
      batch['decoder_input_tokens']
    ),
  }
  ids = {name: batch[f'{name}_routing_ids'] for name in batch_plans.STREAMS}
  one = batch_plans.ClassSizes(((_BATCH * _INPUTS, _EXPERTS),))
  both = batch_plans.ClassSizes(((2 * _BATCH * _INPUTS, _EXPERTS),))
  profile = batch_plans.CapacityProfile(
    tuple((name, one) for name in ids), both
  )
  plan = batch_plans.make_plan(ids, profile, _EXPERTS)
  # T5X updates the statistics of an expert also in steps without its tokens. So
  # every expert must be present.
  for array in ids.values():
    assert set(range(_EXPERTS)) <= set(array.flat)
  return batch, step_plans.StepPlan(plan, {})


def _initial_parameters(config, seed=0):
  return initialization.initial_parameters(t5.T5(config), threefry.key(seed))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dense', 'moe', 'mowe'])
def test_both_loops_train_the_same(world, kind, tmp_path):
  """Equal parameters, batches and Adafactor give equal curves over 20 steps."""
  config = world.config(kind)
  params = _initial_parameters(config)
  loss = training_step.LossConfig(
    z_loss=1e-4, router=router_training.RouterLossConfig(0.01, 0.001)
  )
  # The loss is the mean over target tokens, as in our loop. If it were the sum,
  # batches with more tokens would weigh more in Adafactor's moments.
  settings = {'loss_normalizing_factor': 'NUM_REAL_TARGET_TOKENS'}
  run = _Run(
    world.model(kind, router_loss=loss.router, **settings), params, tmp_path
  )

  model = t5.T5(config)
  axes = initialization.abstract_variables(model)['params_axes']
  ordinary, tables = parameters.split_tables(params)
  axes = flax.linen.partitioning.get_axis_names(flax.core.freeze(axes))
  axes, _ = parameters.split_tables(flax.core.unfreeze(axes))
  optimizer = optimizers.Adafactor(_rate).build(axes)
  rows = row_optimizers.RowAdafactor(_rate) if tables else None
  state = train_state.begin(
    ordinary, tables, optimizer=optimizer, row_optimizer=rows
  )
  train_step = jax.jit(
    training_step.make_train_step(
      model, optimizer=optimizer, row_optimizer=rows, loss=loss, seed=0
    )
  )
  ours, theirs = [], []
  for number in range(20):
    batch = _batch(world, number)
    planned, plan = _with_plan(world, batch) if tables else (batch, None)
    state, metrics = train_step(state, {}, planned, plan)
    metrics = {
      name: float(mean.compute())
      for name, mean in jax.device_get(metrics).items()
      if np.ndim(mean.total) == 0
    }
    ours.append(metrics)
    theirs.append(run.step(batch))
  curve = np.array([m['loss'] for m in ours])
  for name, curves in (('cross_ent_loss', 'loss'), ('z_loss', 'z_loss')):
    np.testing.assert_allclose(
      [m[name] for m in theirs], [m[curves] for m in ours], rtol=1e-4
    )
  assert curve[-1] < 0.8 * curve[0]
  same = set(ours[0]) & set(theirs[0]) - {'loss', 'z_loss'}
  for name in same:
    np.testing.assert_allclose(
      [m[name] for m in theirs], [m[name] for m in ours], rtol=1e-3, atol=1e-6
    )
  if kind == 'moe':
    assert 'encoder/layers_1/mlp/load_balance_loss' in same
  if kind == 'mowe':
    assert {'encoder_routed', 'decoder_skipped', 'decoder_padding'} <= same


@pytest.mark.slow
def test_contrib_moe_splits_experts_over_devices(world, tmp_path):
  layer = world.config('moe').sparse_layers()['encoder']
  factory = functools.partial(
    moe.MoeLayer,
    layer.num_experts,
    layer.expert_dim,
    dispatch=layer.dispatch,
    groups=token_groups.TokenGroups(24, multiple=4),
  )
  config = world.config('moe', sparse_feed_forward=factory)
  params = _initial_parameters(config)
  one, four = (
    _Run(
      world.model('moe', config=config), params, tmp_path / str(split), split
    )
    for split in (False, True)
  )
  for number in range(3):
    batch = _batch(world, number)
    expected, found = one.step(batch), four.step(batch)
    for name in ('loss', 'accuracy', 'experts/expert_usage'):
      assert found[name] == pytest.approx(expected[name], rel=1e-4)
  mlp = four.trainer.train_state.params['encoder']['layers_1']['mlp']
  assert mlp['expert']['wi_0']['kernel'].sharding.spec[0] == 'expert'


@pytest.mark.slow
def test_losses_of_routers_are_parts_of_the_mean_loss(world):
  params = _initial_parameters(world.config('moe'))
  batch = _batch(world)
  found = []
  for factor in (None, 'NUM_REAL_TARGET_TOKENS', 7.0):
    model = world.model(
      'moe',
      loss_normalizing_factor=factor,
      router_loss=router_training.RouterLossConfig(0.3, 0.2),
    )
    loss, metrics = jax.jit(model.loss_fn)(params, batch, None)
    metrics = {
      name: float(metric.compute())
      for name, metric in metrics.items()
      if not isinstance(metric, t5x_metrics.Time)
    }
    assert metrics['loss'] == loss
    found.append(metrics)
  summed, mean, by_seven = found
  num_tokens = batch['decoder_loss_weights'].sum()
  for name in ('loss', 'z_loss', 'cross_ent_loss'):
    assert summed[name] == pytest.approx(num_tokens * mean[name], rel=1e-5)
    assert summed[name] == pytest.approx(7 * by_seven[name], rel=1e-5)
  layers = ('encoder/layers_1/mlp', 'decoder/layers_0/mlp')
  of_routers = sum(
    0.3 * mean[f'{layer}/load_balance_loss']
    + 0.2 * mean[f'{layer}/router_z_loss']
    for layer in layers
  )
  assert mean['loss'] - mean['z_loss'] - mean['cross_ent_loss'] == (
    pytest.approx(of_routers / 2, rel=1e-4)
  )
  # The names are those of t5x/contrib/moe. Each metric is over all tokens of
  # both layers.
  assert {name for name in mean if name.startswith('experts/')} == {
    'experts/auxiliary_loss',
    'experts/router_z_loss',
    'experts/fraction_tokens_left_behind',
    'experts/expert_usage',
    'experts/router_confidence',
  }
  smaller, larger = sorted(mean[f'{layer}/confidence'] for layer in layers)
  assert smaller <= mean['experts/router_confidence'] <= larger


@pytest.mark.slow
def test_frozen_experts_do_not_change(world, tmp_path):
  frozen = world.model('mowe', t5x_models.freeze_experts(_adafactor()))
  params = _initial_parameters(world.config('mowe'))
  run = _Run(frozen, params, tmp_path)
  trained = _start(world.model('mowe'), params)
  # A checkpoint of either run fits the other.
  same = jax.tree.map(
    lambda one, other: one.shape == other.shape,
    run.trainer.train_state.state_dict(),
    trained.state_dict(),
  )
  assert all(jax.tree.leaves(same))
  run.step(_batch(world))
  state = jax.device_get(run.trainer.train_state.state_dict())
  after = flax.traverse_util.flatten_dict(state['target'])
  for path, before in flax.traverse_util.flatten_dict(params).items():
    is_same = np.array_equal(after[path], before)
    assert is_same == t5x_rules.is_expert(path), path
  statistics = state['state']['param_states']['experts']['wi_0']
  assert not any(value.any() for value in statistics.values())
  assert state['state']['step'] == 1


def test_experts_can_only_be_frozen_where_there_are_some(world):
  optimizer = t5x_models.freeze_experts(_adafactor())
  with pytest.raises(ValueError, match='needs a model with experts.* Leave'):
    _start(
      world.model('dense', optimizer),
      _initial_parameters(world.config('dense')),
    )
  with pytest.raises(ValueError, match='got a OptaxWrapper. With optax'):
    t5x_models.freeze_experts(t5x_optimizers.sgd(0.1))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['moe', 'mowe'])
def test_beams_and_scores_are_those_of_our_decoding(world, kind):
  model = world.model(kind)
  # With larger logits, beams end early and differ from each other.
  params = jax.tree.map(
    lambda x: 3 * x, _initial_parameters(world.config(kind), seed=1)
  )
  batch = _batch(world)
  predict = jax.jit(
    functools.partial(model.predict_batch_with_aux, num_decodes=3)
  )
  tokens, aux = predict(params, batch)
  ours, scores = decoding.generate(
    model.module,
    {'params': params},
    batch['encoder_input_tokens'],
    _TARGETS,
    decoding.BeamSearch(3, alpha=0.6),
  )
  np.testing.assert_array_equal(tokens, ours)
  np.testing.assert_allclose(aux['scores'], scores, rtol=1e-5)
  assert len({tuple(row) for row in np.asarray(ours)}) > 1

  logits = model.module.apply(
    {'params': params},
    *(jnp.asarray(batch[name]) for name in _TOKENS),
    enable_dropout=False,
  )
  log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
  targets = batch['decoder_target_tokens'][..., None]
  of_targets = np.take_along_axis(log_probs, targets, axis=-1)[..., 0]
  np.testing.assert_allclose(
    jax.jit(model.score_batch)(params, batch),
    (of_targets * batch['decoder_loss_weights']).sum(axis=1),
    rtol=1e-5,
  )


def test_what_t5x_cannot_train_is_refused(world):
  layer = functools.partial(word_experts.MoweLayer, _EXPERTS, 4)
  bits = functools.partial(layer, table_dtype='bfloat16')
  biased = functools.partial(
    moe.MoeLayer, 4, 6, routing=tokens_choose.TokensChoose(1, bias_rate=0.1)
  )
  for kind, changes, message in (
    ('mowe', {'routing': None}, 'routing is None. Set ROUTING_VOCABULARY'),
    (
      'mowe',
      {'sparse_feed_forward': bits},
      "table_dtype must be 'float32'.* Set it to float32",
    ),
    (
      'moe',
      {'sparse_feed_forward': biased},
      'bias_rate must be 0, but is 0.1.* Set it to 0',
    ),
    (
      'moe',
      {'memories': (tiny_memories.make_memories()[0],)},
      r"must have no memories.*\['engram'\]. Train it with `mowe train`",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      world.model(kind, config=world.config(kind, **changes))
  other = dataclasses.replace(
    world, vocabulary=byte_vocabulary.ByteVocabulary(4)
  )
  with pytest.raises(ValueError, match='with 262 ids, but .* Set VOCAB'):
    other.model('mowe')


def test_the_train_state_holds_parameters_alone(world):
  variables = world.model('moe').get_initial_variables(
    jax.random.key(0), {'encoder_input_tokens': (8, 13)}
  )
  assert set(variables) == {'params', 'params_axes'}
