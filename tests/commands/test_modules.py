"""Tests `mowe modules`: models with added or pruned modules, and their usage.

Also tests `module_usage`, `module_usage_figure`, `modules_folder`, and
`saved_model`.
"""

import functools
import hashlib
import json

import flax
import numpy as np
import pytest

from mowe.cli import main
from mowe.commands import cache_task
from mowe.data import lm_tasks
from mowe.interop.t5x import orbax_arrays
from mowe.layers.attention import self_attention
from mowe.layers.mixtures import moe
from mowe.layers.routers import tokens_choose
from mowe.model_folders import model_folder
from mowe.models.decoder_only import decoder_only_config
from mowe.models.surgery import module_surgery

NUM, LENGTHS = 6, {'targets': 12}
PLACES = ('decoder/layers_0/mlp', 'decoder/layers_1/mlp')


def make_config(world, **changes):
  settings = {
    'vocab_size': world.vocabulary.size + 3,
    'emb_dim': 12,
    'num_heads': 2,
    'head_dim': 4,
    'mlp_dim': 14,
    'num_layers': 2,
    'dropout_rate': 0.0,
    'attention': self_attention.RotaryAttention,
    'sparse_feed_forward': functools.partial(
      moe.MoeLayer,
      NUM,
      5,
      routing=tokens_choose.TokensChoose(2),
    ),
    'sparse_decoder_layers': (0, 1),
  }
  return decoder_only_config.DecoderOnlyConfig(**(settings | changes))


def parts(world):
  return {
    'model': make_config(world),
    'data': world.data(
      'modules_text',
      task_feature_lengths=LENGTHS,
      objective=lm_tasks.LanguageModelTask,
    ),
  }


@pytest.fixture(scope='module')
def folder(world, tmp_path_factory):
  """The folder of a model after a few steps of training on text."""
  cache_task.cache_task(
    f'{world.cache_dir}/modules_text',
    world.vocabulary_path,
    cache_task.RunningTextFiles([str(world.folder / 'text.jsonl')]),
  )
  path = tmp_path_factory.mktemp('modules') / 'run'
  world.train(path, 4, **parts(world))
  return path


def run(*arguments):
  return main.main([str(argument) for argument in arguments])


def digests(path):
  return {
    str(file): hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(path.rglob('*'))
    if file.is_file()
  }


def flat_params(path):
  loaded = model_folder.load(str(path))
  return loaded, flax.traverse_util.flatten_dict(loaded.params)


def text_gin(world):
  return (
    "--gin.MIXTURE_OR_TASK_NAME='modules_text'",
    f"--gin.CACHE_DIR='{world.cache_dir}'",
    "--gin.TASK_FEATURE_LENGTHS={'targets': 12}",
    '--gin.BATCH_SIZE=8',
  )


def loss_of(path, world, output):
  assert not run(
    'evaluate', '--gin_file=gin_configs/runs/evaluate.gin', *text_gin(world),
    f"--gin.CHECKPOINT_PATH='{path}'", f"--gin.EVAL_OUTPUT_DIR='{output}'",
  )  # fmt: skip
  return json.loads((output / 'results.json').read_text())['loss']


def train_gin(world, source, target, steps=6):
  return (
    'train', '--gin_file=gin_configs/optimizers/adamw.gin',
    '--gin_file=gin_configs/runs/pretrain_lm.gin',
    '--gin_file=gin_configs/modules/added_modules.gin', *text_gin(world),
    f"--gin.INITIAL_CHECKPOINT_PATH='{source}'", f"--gin.MODEL_DIR='{target}'",
    f'--gin.TRAIN_STEPS={steps}', '--gin.WARMUP_STEPS=1', '--gin.LOG_PERIOD=2',
    '--gin.LEARNING_RATE=0.03',
  )  # fmt: skip


@pytest.mark.slow
def test_added_modules_learn_and_all_else_stays(world, folder, tmp_path):
  before = digests(folder)
  larger = tmp_path / 'larger'
  assert not run('modules', 'add', folder, larger, '--mlp', 2)
  assert digests(folder) == before
  told = json.loads((larger / 'modules.json').read_text())
  assert told['source']['step'] == 4 and told['added'] == {'mlp': 2}
  whole = loss_of(folder, world, tmp_path / 'eval')
  assert loss_of(larger, world, tmp_path / 'eval2') == pytest.approx(
    whole, rel=1e-6
  )
  trained = tmp_path / 'trained'
  assert not run(*train_gin(world, larger, trained))
  old_model, old = flat_params(larger)
  new_model, new = flat_params(trained)
  assert new_model.model.config.of_block('decoder', 0) is not None
  for path, array in old.items():
    is_slab = 'expert' in path
    is_column = path[-2:] == ('w', 'kernel') and 'router' in path
    if not (is_slab or is_column):
      np.testing.assert_array_equal(new[path], array, str(path))
      continue
    axis = 0 if is_slab else 1
    cut = lambda x, axis=axis: np.split(np.asarray(x), [NUM], axis)
    np.testing.assert_array_equal(cut(new[path])[0], cut(array)[0])
    assert (cut(new[path])[1] != cut(array)[1]).any(), path
  assert loss_of(trained, world, tmp_path / 'eval3') < whole
  # Only the new modules are trained, so only they have moments.
  saved = orbax_arrays.read(trained / 'checkpoint_6' / 'state')
  moments = {p: x.shape for p, x in saved.items() if 'mu' in p}
  assert len(moments) == 2 * 4
  assert all(2 in shape for shape in moments.values())


@pytest.mark.slow
def test_a_model_goes_on_with_the_state_of_its_optimizer(
  world, folder, tmp_path, capsys
):
  """The whole larger model is trained here, with the old optimizer state."""
  larger = tmp_path / 'larger'
  assert not run('modules', 'add', folder, larger, '--mlp', 2)
  assert 'state kept' in capsys.readouterr().out
  config, _ = model_folder.load_config(larger)
  state = world.train(larger, 6, **(parts(world) | {'model': config}))
  assert int(state.step) == 6
  assert 'Resumed' in capsys.readouterr().out


@pytest.mark.slow
def test_usage_and_pruning(world, folder, tmp_path, capsys):
  before = digests(folder)
  usage = tmp_path / 'usage'
  measure = (
    'modules', 'usage', '--gin_file=gin_configs/runs/modules_usage.gin',
    *text_gin(world), f"--gin.USAGE_OUTPUT_DIR='{usage}'",
  )  # fmt: skip
  assert not run(*measure, f"--gin.CHECKPOINT_PATH='{folder}'")
  assert 'effective' in capsys.readouterr().out
  measured = json.loads((usage / 'usage.json').read_text())
  text = world.data().open_cache('modules_text', world.vocabulary)
  for place in PLACES:
    layer = measured['layers'][place]
    assert layer['num_tokens'] == len(text.flat('targets'))
    assert sum(layer['counts']) == 2 * layer['num_tokens']
  assert (usage / 'usage.png').stat().st_size > 10_000
  losses = {}
  for gates in ('keep', 'renormalise'):
    smaller = tmp_path / gates
    assert not run(
      'modules', 'prune', folder, smaller, '--usage', usage / 'usage.json',
      '--threshold', 0.9, '--gates', gates,
    )  # fmt: skip
    told = json.loads((smaller / 'modules.json').read_text())
    for place in PLACES:
      counts = np.asarray(measured['layers'][place]['counts'])
      kept = told['kept'][place]
      assert kept == np.flatnonzero(counts >= 0.9 * counts.mean()).tolist()
    losses[gates] = loss_of(smaller, world, tmp_path / f'eval_{gates}')
    loaded, params = flat_params(smaller)
    layers = module_surgery.module_layers(loaded.model.config)
    assert [one.num_modules for one in layers] == [
      len(told['kept'][place]) for place in PLACES
    ]
    _, whole = flat_params(folder)
    path = (*PLACES[0].split('/'), 'expert', 'wo', 'kernel')
    np.testing.assert_array_equal(
      params[path], np.asarray(whole[path])[told['kept'][PLACES[0]]]
    )
  assert digests(folder) == before
  assert losses['keep'] != losses['renormalise']
  # The usage of one model must not be used to prune another.
  assert run(
    'modules', 'prune', tmp_path / 'keep', tmp_path / 'no', '--fraction', 0.5,
    '--usage', usage / 'usage.json',
  )  # fmt: skip
  assert 'Measure this very model' in capsys.readouterr().err
  # The pruned model can be finetuned from its weights.
  assert not run(*_finetune(world, tmp_path / 'keep', tmp_path / 'on'))


def _finetune(world, source, target):
  return (
    'train', '--gin_file=gin_configs/optimizers/adamw.gin',
    '--gin_file=gin_configs/modules/saved_model.gin',
    '--gin_file=gin_configs/runs/pretrain_lm.gin', *text_gin(world),
    f"--gin.INITIAL_CHECKPOINT_PATH='{source}'", f"--gin.MODEL_DIR='{target}'",
    '--gin.TRAIN_STEPS=2', '--gin.WARMUP_STEPS=1',
  )  # fmt: skip


@pytest.mark.slow
def test_what_cannot_be_done_leaves_nothing(world, folder, tmp_path, capsys):
  dense = tmp_path / 'dense'
  world.train(
    dense,
    1,
    **(
      parts(world)
      | {
        'model': make_config(
          world, sparse_feed_forward=None, sparse_decoder_layers=()
        )
      }
    ),
  )
  usage = tmp_path / 'usage.json'
  usage.write_text('{"format": "another"}')
  target = tmp_path / 'target'
  before = digests(folder)
  bad = {
    'trained with MoeLayer': ('add', dense, target, '--mlp', 1),
    'Leave --attention out': ('add', folder, target, '--attention', 1),
    'Give --mlp or --attention': ('add', folder, target),
    'or lower --k': ('add', folder, target, '--mlp', 1, '--k', 2),
    'would have 7. Make it 8': (
      'add', folder, target, '--mlp', 1, '--expert_parts', 4,
    ),
    'must not be there yet': ('add', folder, dense, '--mlp', 1),
    'in another model folder': ('add', folder, folder / 'a', '--mlp', 1),
    'must not be that of a checkpoint': (
      'add', folder, tmp_path / 'checkpoint_3', '--mlp', 1,
    ),
    'must have a model.json': ('add', tmp_path, target, '--mlp', 1),
    'Give exactly one': ('prune', folder, target, '--usage', usage),
    'Give its usage.json': (
      'prune', folder, target, '--usage', usage, '--fraction', 0.5,
    ),
    'Measure it with': (
      'prune', folder, target, '--usage', 'none', '--fraction', 0.5,
    ),
  }  # fmt: skip
  for text, arguments in bad.items():
    assert run('modules', *arguments) == 1
    assert text in capsys.readouterr().err
  assert not target.exists() and digests(folder) == before
  assert not list(tmp_path.glob('*partial*'))
