"""The plug-in in the real T5X, where it is installed; docs/t5x.md says which.

With T5X on PYTHONPATH:

  python -m pytest tests/interop/test_t5x_models.py tests/interop/test_t5x_runs.py --slow
"""

import dataclasses
import functools
import importlib.util

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.layers import (
  capacity_dispatch,
  moe,
  token_groups,
  tokens_choose,
  word_experts,
)
from mowe.models import initialization, parameters, t5, threefry
from mowe.training import (
  optimizers,
  router_training,
  row_optimizers,
  step,
  train_state,
)
from mowe.words import build, routing_vocabulary, subwords
from mowe.words import plan as plans

if importlib.util.find_spec('t5x') is None:
  pytest.skip(
    'needs T5X on PYTHONPATH; docs/t5x.md says how to install it',
    allow_module_level=True,
  )

from t5x import (  # noqa: E402
  adafactor,
  partitioning,
  trainer,
)
from t5x import train_state as t5x_train_state  # noqa: E402

from mowe.data import seqio_stream  # noqa: E402
from mowe.interop import t5x_models, t5x_rules  # noqa: E402

# Every expert has a token in each of these sequences of bytes.
_BATCH, _INPUTS, _TARGETS = 8, 13, 9
_EXPERTS = 3
_WORDS = ('a', 'b', 'c', 'd', 'e', 'f')


@dataclasses.dataclass(frozen=True)
class _World:
  vocabulary: subwords.ByteVocabulary
  routing: routing_vocabulary.RoutingVocabulary

  def config(self, kind, **changes) -> t5.T5Config:
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
        dispatch=capacity_dispatch.CapacityDispatch(1.25, 2.0),
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
    return t5.T5Config(**(sizes | changes))

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
  vocabulary = subwords.ByteVocabulary(extra_ids=3)
  routing, _ = build.build_routing_vocabulary(
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
  """Rows of uneven lengths that hold every expert, in inputs and targets."""
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
  variables = flax.core.freeze({**variables, 'params': params})
  return t5x_train_state.FlaxOptimTrainState.create(
    model.optimizer_def, variables
  )


class _OneDevice(partitioning.PjitPartitioner):
  """T5X takes all devices there are; ours have sizes for one."""

  @property
  def mesh(self):
    return jax.sharding.Mesh(
      np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'model')
    )


class _Run:
  """T5X's own Trainer, batch by batch."""

  def __init__(self, model, params, folder, num_microbatches=None):
    partitioner = _OneDevice(
      num_partitions=1,
      logical_axis_rules=partitioning.standard_logical_axis_rules(
        additional_rules=t5x_rules.axis_rules()
      ),
    )
    state = _start(model, params)
    self.trainer = trainer.Trainer(
      model,
      state,
      partitioner,
      eval_names=[],
      summary_dir=str(folder),
      train_state_axes=partitioner.get_mesh_axes(state),
      rng=jax.random.key(0),
      learning_rate_fn=_rate,
      num_microbatches=num_microbatches,
    )

  def step(self, batch):
    """Metrics of one more step."""
    values = self.trainer.train(iter([batch]), 1).result()
    return {name: float(value.value) for name, value in values.items()}


@pytest.fixture(autouse=True)
def as_in_t5x():
  """T5X adds scalars to arrays."""
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  yield
  jax.config.update('jax_numpy_rank_promotion', 'raise')


def _rate(count):
  return 0.05 * jax.lax.rsqrt(jnp.asarray(count, jnp.float32) + 4.0)


def _with_plan(world, batch):
  """The batch with routing ids, and its plan, in which any batch fits."""
  batch = batch | {
    'encoder_routing_ids': world.routing.encoder_ids(
      batch['encoder_input_tokens']
    ),
    'decoder_routing_ids': world.routing.decoder_ids(
      batch['decoder_input_tokens']
    ),
  }
  ids = {name: batch[f'{name}_routing_ids'] for name in plans.STREAMS}
  one = plans.ClassSizes(((_BATCH * _INPUTS, _EXPERTS),))
  both = plans.ClassSizes(((2 * _BATCH * _INPUTS, _EXPERTS),))
  profile = plans.CapacityProfile(tuple((name, one) for name in ids), both)
  plan = plans.make_plan(ids, profile, _EXPERTS)
  # T5X's statistics of an expert change also in steps that lack it.
  for array in ids.values():
    assert set(range(_EXPERTS)) <= set(array.flat)
  return batch, plan


def _initial_parameters(config, seed=0):
  return initialization.initial_parameters(t5.T5(config), threefry.key(seed))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dense', 'moe', 'mowe'])
def test_both_loops_train_the_same(world, kind, tmp_path):
  """Equal parameters, batches and Adafactor: equal curves over 20 steps."""
  config = world.config(kind)
  params = _initial_parameters(config)
  loss = step.LossConfig(
    z_loss=1e-4, router=router_training.RouterLossConfig(0.01, 0.001)
  )
  # The mean over target tokens, as in our loop. In sums, Adafactor's moments
  # would follow longer batches more.
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
    step.make_train_step(
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
