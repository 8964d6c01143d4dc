"""Tests language models from text to perplexity, with commands and gin files."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mowe.cli import main
from mowe.commands import cache_task, evaluations
from mowe.commands import evaluate as evaluate_command
from mowe.commands import infer as infer_command
from mowe.commands import train as train_command
from mowe.data import lm_tasks
from mowe.layers.attention import relative_attention, self_attention
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import moe
from mowe.models import initialization, threefry
from mowe.models.decoder_only import decoder_only_config
from mowe.models.families import families
from mowe.training import partitioning, train_state, training_step

LENGTHS = {'targets': 12}


@pytest.fixture(scope='module')
def lm_world(world):
  """The small world, with its text cached as running text."""
  cache_task.cache_task(
    f'{world.cache_dir}/running',
    world.vocabulary_path,
    cache_task.RunningTextFiles([str(world.folder / 'text.jsonl')]),
  )
  return world


def make_config(world, **changes):
  settings = {
    'vocab_size': world.vocabulary.size + 3,
    'emb_dim': 12,
    'num_heads': 2,
    'head_dim': 4,
    'mlp_dim': 14,
    'num_layers': 1,
    'dropout_rate': 0.1,
    'attention': self_attention.RotaryAttention,
  }
  return decoder_only_config.DecoderOnlyConfig(**(settings | changes))


def make_data(world, name='running', **changes):
  settings = {
    'task_feature_lengths': LENGTHS,
    'objective': lm_tasks.LanguageModelTask,
  }
  return world.data(name, **(settings | changes))


def memory_parts(world):
  return {
    'model': make_config(
      world,
      memory_length=9,
      attention=relative_attention.RelativeAttention,
    ),
    'data': make_data(world, objective=lm_tasks.ContiguousText),
  }


def _parts(world, kind):
  if kind == 'memory':
    return memory_parts(world)
  if kind == 'mowe':
    routed = {
      'sparse_feed_forward': functools.partial(word_experts.MoweLayer, 16, 4),
      'sparse_decoder_layers': (0,),
      'routing': world.routing,
    }
    return {'model': make_config(world, **routed), 'data': make_data(world)}
  assert kind == 'packed and routed'
  routed = {
    'sparse_feed_forward': functools.partial(moe.MoeLayer, 4, 5),
    'sparse_decoder_layers': (0,),
  }
  data = make_data(world, objective=lm_tasks.SeparateTexts, pack=True)
  return {'model': make_config(world, **routed), 'data': data}


def _same(one, other):
  one, other = jax.device_get((one, other))
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
  'kind',
  [
    'memory',
    pytest.param('packed and routed', marks=pytest.mark.slow),
    pytest.param('mowe', marks=pytest.mark.slow),
  ],
)
def test_a_run_that_was_resumed_ends_with_the_same_bits(
  kind, lm_world, tmp_path
):
  parts = _parts(lm_world, kind)
  whole = lm_world.train(tmp_path / 'whole', 5, **parts)
  lm_world.train(tmp_path / 'cut', 2, **parts)
  cut = lm_world.train(tmp_path / 'cut', 5, **parts)
  _same(cut, whole)
  if kind == 'memory':
    assert bool(whole.memory['decoder']['real'].all())
  lines = (tmp_path / 'whole' / 'train_metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line)['loss'] for line in lines]
  assert losses[-1] < losses[0]


@pytest.mark.slow
def test_an_epoch_begins_without_a_memory(lm_world):
  """A batch at the start of an epoch gives the same as in a fresh run."""
  config = memory_parts(lm_world)['model']
  model = families.build(config)
  state = train_state.begin(
    initialization.initial_parameters(model, threefry.key(0)),
    {},
    optimizer=optax.sgd(0.1),
    row_optimizer=None,
    make_memory=lambda: config.initial_memory(2),
  )
  old = jax.tree.map(jnp.ones_like, state.memory)
  rng = np.random.default_rng(0)
  targets = rng.integers(3, config.vocab_size, (2, 6)).astype(np.int32)
  batch = {
    'decoder_input_tokens': np.roll(targets, 1, axis=1),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones((2, 6), np.float32),
  }
  step = jax.jit(
    training_step.make_train_step(
      model,
      optimizer=optax.sgd(0.1),
      row_optimizer=None,
      loss=training_step.LossConfig(),
      seed=0,
    )
  )

  def loss(memory, begins):
    given = batch | {'decoder_begins_part': np.full(2, begins)}
    _, metrics = step(state.replace(memory=memory), {}, given, None)
    return float(metrics['loss'].compute())

  fresh = loss(state.memory, True)
  assert loss(old, True) == fresh
  assert loss(state.memory, False) == fresh
  assert loss(old, False) != fresh


@pytest.mark.slow
def test_microbatches_keep_every_row_of_the_memory(lm_world, tmp_path):
  """The gradients must be equal; only dropout could differ, and it is off."""
  parts = memory_parts(lm_world)
  parts['model'] = make_config(
    lm_world,
    memory_length=9,
    attention=relative_attention.RelativeAttention,
    dropout_rate=0.0,
  )
  one = lm_world.train(tmp_path / 'one', 3, **parts)
  two = lm_world.train(tmp_path / 'two', 3, **parts, num_microbatches=2)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
    jax.device_get(two.memory),
    jax.device_get(one.memory),
  )


@pytest.mark.slow
def test_devices_keep_the_memory_of_their_rows(lm_world, tmp_path):
  parts = memory_parts(lm_world)
  parts['model'] = make_config(
    lm_world,
    memory_length=9,
    attention=relative_attention.RelativeAttention,
    dropout_rate=0.0,
  )
  one = lm_world.train(tmp_path / 'one', 3, **parts)
  mesh = functools.partial(partitioning.make_mesh, devices=jax.devices()[:4])
  four = lm_world.train(tmp_path / 'four', 3, **parts, make_mesh=mesh)
  leaf = four.memory['decoder']['layers_0']['tokens']
  assert leaf.addressable_shards[0].data.shape == (2, *leaf.shape[1:])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
    jax.device_get(four.memory),
    jax.device_get(one.memory),
  )


@pytest.mark.slow
def test_evaluations_and_predictions(lm_world, tmp_path):
  evaluation = evaluations.TextEvaluation(make_data(lm_world, batch_size=3))
  folder = tmp_path / 'run'
  lm_world.train(
    folder,
    4,
    model=make_config(lm_world),
    data=make_data(lm_world),
    eval_configs=(evaluation,),
    eval_period=2,
    save=train_command.SaveConfig(
      best_metric='validation/loss', best_mode='min'
    ),
  )
  lines = (folder / 'eval_metrics.jsonl').read_text().splitlines()
  during = json.loads(lines[-1])
  score = evaluate_command.evaluate(
    checkpoint_path=str(folder),
    output_dir=str(tmp_path / 'eval'),
    data=make_data(lm_world, batch_size=5),
  )
  cache = lm_world.data('running').open_cache('running', lm_world.vocabulary)
  assert score.num_tokens == len(cache.flat('targets'))
  assert score.num_bytes == cache.totals['bytes']
  saved = json.loads((tmp_path / 'eval' / 'results.json').read_text())
  for name, value in score.metrics().items():
    assert saved[name] == value
    assert during[f'validation/{name}'] == pytest.approx(value, rel=1e-4)
  assert saved['perplexity'] == pytest.approx(math.exp(saved['loss']))
  path = infer_command.infer(
    checkpoint_path=str(folder),
    output_dir=str(tmp_path / 'infer'),
    data=make_data(lm_world, task_feature_lengths={'inputs': 5, 'targets': 3}),
  )
  first = json.loads(path.read_text().splitlines()[0])
  beginning = cache.tokens('targets', 0)[:5]
  assert first['inputs'] == lm_world.vocabulary.decode(beginning)
  assert first['score'] < 0


@pytest.mark.slow
def test_questions_are_answered_by_a_prefix_lm(lm_world, tmp_path):
  """Inputs and targets share a row; finetuning makes the few answers right."""
  lengths = {'inputs': 30, 'targets': 11}
  data = lm_world.data('questions', pack=True, task_feature_lengths=lengths)
  lm_world.train(
    tmp_path / 'run',
    60,
    model=make_config(lm_world, prefix_lm=True, dropout_rate=0.0, emb_dim=24),
    data=data,
    save=train_command.SaveConfig(period=100),
  )
  result = evaluate_command.evaluate(
    checkpoint_path=str(tmp_path / 'run'),
    output_dir=str(tmp_path / 'eval'),
    data=lm_world.data('questions', task_feature_lengths=lengths),
  )
  assert result.em == 100.0


def test_a_memory_needs_text_in_its_order(lm_world):
  config = memory_parts(lm_world)['model']
  open_for = lambda data, model: data.open(lm_world.vocabulary, model)
  with pytest.raises(ValueError, match='must read contiguous text'):
    open_for(make_data(lm_world), config)
  in_order = make_data(lm_world, objective=lm_tasks.ContiguousText, pack=True)
  with pytest.raises(ValueError, match='without packing'):
    open_for(in_order, config)
  plain = make_data(lm_world, objective=lm_tasks.ContiguousText)
  with pytest.raises(ValueError, match='has two'):
    open_for(plain, lm_world.config())


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'options'),
  [('memory', ['--gin.EVAL_MEMORY_LENGTH=256']), ('moduleformer', [])],
)
def test_an_example_runs(name, options, tmp_path, capsys):
  text = tmp_path / 'text.txt'
  text.write_text('\n'.join(['a line of text', '', 'and one more line'] * 400))
  run = lambda *arguments: main.main([str(x) for x in arguments])
  cache = tmp_path / 'cache' / 'text'
  assert not run(
    'cache-task', cache, text, '--vocabulary', 'bytes', '--unit', 'file',
    '--kind', 'language_model',
  )  # fmt: skip
  one_block = ['--gin.decoder_only_config.DecoderOnlyConfig.num_layers=1']
  if name == 'moduleformer':
    one_block = ['--gin.NUM_LAYERS=1']
  shared = (
    "--gin.MIXTURE_OR_TASK_NAME='text'",
    f"--gin.CACHE_DIR='{tmp_path / 'cache'}'",
    '--gin.BATCH_SIZE=8',
  )
  assert not run(
    'train', f'--gin_file=gin_configs/examples/text_pretrain_lm_{name}.gin', *shared,
    "--gin.VOCABULARY_PATH='bytes'", '--gin.VOCAB_SIZE=384',
    f"--gin.MODEL_DIR='{tmp_path / 'run'}'", '--gin.TRAIN_STEPS=30',
    '--gin.WARMUP_STEPS=3', *one_block,
  )  # fmt: skip
  assert not run(
    'evaluate', '--gin_file=gin_configs/runs/evaluate.gin', *shared,
    f"--gin.CHECKPOINT_PATH='{tmp_path / 'run'}'",
    f"--gin.EVAL_OUTPUT_DIR='{tmp_path / 'eval'}'",
    "--gin.TASK_FEATURE_LENGTHS={'targets': 128}", *options,
  )  # fmt: skip
  results = json.loads((tmp_path / 'eval' / 'results.json').read_text())
  assert results['num_bytes'] == results['num_tokens'] == text.stat().st_size
  assert 'word_perplexity' not in results
  # A uniform model needs 8 bits for a byte, and more than 3 even if it knows
  # which letters occur.
  assert results['bits_per_byte'] < 3
  assert 'bits per byte' in capsys.readouterr().out
