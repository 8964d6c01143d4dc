"""Tests `train`: exact resuming, finetuning, refusals, and evaluations.

Also tests `evaluations`, `model_folder`, `model_weights`, and
`periodic_evaluation`.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import small_runs

from mowe.commands import evaluations
from mowe.commands import train as train_command
from mowe.data.caches import verified_array
from mowe.layers.dispatch import expert_parallel, token_groups
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import moe
from mowe.model_folders import model_folder
from mowe.models import parameters
from mowe.training import (
  checkpointing,
  loop,
  loss_spikes,
  partitioning,
  train_metrics,
)
from mowe.training.optimization import optimizers, row_optimizers
from mowe.words import (
  byte_vocabulary,
  sentencepiece_vocabulary,
  subword_vocabularies,
  vocabulary_builder,
)

_TOTAL = 7


def _assert_same_bits(actual, expected):
  actual, expected = jax.device_get((actual, expected))
  named = jax.tree_util.tree_leaves_with_path(expected)
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, want), got in zip(named, jax.tree.leaves(actual), strict=True):
    same = np.asarray(got).tobytes() == np.asarray(want).tobytes()
    assert same, jax.tree_util.keystr(path)


@pytest.fixture(scope='module')
def straight(world, tmp_path_factory):
  """A run that was never interrupted: its folder and its last state."""
  folder = tmp_path_factory.mktemp('straight') / 'run'
  jax.config.update('jax_disable_most_optimizations', True)
  return folder, jax.device_get(world.train(folder, _TOTAL))


def test_the_run_is_longer_than_an_epoch(world):
  per_epoch = (
    world.data().open(world.vocabulary, world.config()).steps_per_epoch
  )
  assert 1 < per_epoch < _TOTAL and 3 % per_epoch


@pytest.mark.slow
@pytest.mark.parametrize('stops', [(3,), (1, 4, 5)])
def test_an_interrupted_run_ends_with_the_same_bits(
  world, straight, tmp_path, stops
):
  for stop in stops:
    world.train(tmp_path / 'run', stop)
  state = world.train(tmp_path / 'run', _TOTAL)
  _assert_same_bits(state, straight[1])
  # The table and its state have changed, so the equality above means something.
  assert np.any(np.asarray(state.table_state['experts'].counts) > 1)


def test_a_finished_run_stays_as_it_is(world, straight):
  folder, expected = straight
  _assert_same_bits(world.train(folder, _TOTAL), expected)
  assert checkpointing.Checkpoints(folder).all_steps() == [3, 6, 7]
  lines = train_metrics.read_json_lines(folder / 'train_metrics.jsonl')
  assert [line['step'] for line in lines] == [2, 4, 6, 7]
  assert all(np.isfinite(line['loss']) for line in lines)


def _finetune(world, source, folder, **changes):
  return world.train(
    folder,
    2,
    data=world.data('questions'),
    initial_checkpoint_path=str(source),
    **changes,
  )


@pytest.mark.parametrize('kind', ['subword', 'routing'])
def test_weights_for_other_words_are_refused(world, tmp_path, kind):
  other, routing = world.vocabulary, world.routing
  if kind == 'subword':
    other = sentencepiece_vocabulary.train_sentencepiece(
      small_runs.TEXTS, tmp_path / 'other.model', 39
    )
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    small_runs.TEXTS,
    other,
    num_words=7,
    num_experts=small_runs.NUM_EXPERTS,
    num_skipped=2,
  )
  source = model_folder.create(
    str(tmp_path / 'source'), world.config(routing=routing), other
  )
  for path in (source, source / 'checkpoint_3'):
    with pytest.raises(
      ValueError, match=f'of its own {kind} vocabulary, but .* that of sha256'
    ):
      _finetune(world, path, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  # A dense model has no routing vocabulary that could differ.
  model_folder.check_same_vocabularies(
    str(source), world.config(sparse=False), other
  )


@pytest.mark.slow
def test_finetuning_with_frozen_experts(world, straight, tmp_path):
  source, pretrained = straight
  state = _finetune(world, source, tmp_path / 'run', freeze_experts=True)
  assert int(state.step) == 2 and state.table_state == {}
  _assert_same_bits(state.tables, pretrained.tables)
  moved = state.params['token_embedder']['embedding']
  assert np.any(moved != pretrained.params['token_embedder']['embedding'])
  # The checkpoint is complete, so it can be loaded without the initial one.
  loaded = model_folder.load(str(tmp_path / 'run'))
  assert loaded.step == 2
  _assert_same_bits(
    loaded.params, parameters.merge_tables(state.params, state.tables)
  )
  # The run resumes from its own checkpoint, and not from the initial one.
  again = _finetune(world, source, tmp_path / 'run', freeze_experts=True)
  _assert_same_bits(again, state)


@pytest.mark.slow
def test_experts_of_a_mixture_are_frozen_by_the_same_switch(
  world, tmp_path, capsys
):
  mixture = world.config(
    sparse=False,
    sparse_feed_forward=functools.partial(moe.MoeLayer, 4, 3),
    sparse_encoder_layers=(0,),
    dropout_rate=0.0,
  )
  first = world.train(tmp_path / 'first', 1, model=mixture)
  params = {}
  for freeze in (True, False):
    capsys.readouterr()
    state = world.train(
      tmp_path / str(freeze),
      2,
      model=mixture,
      initial_checkpoint_path=str(tmp_path / 'first'),
      freeze_experts=freeze,
    )
    params[freeze] = state.params
    # The table before the run counts four experts of three kernels as frozen.
    (line,) = (
      line for line in capsys.readouterr().out.splitlines() if '│ all' in line
    )
    assert line.split('│')[4].strip() == f'{freeze * 4 * 3 * 12 * 3}'
  of_layer = lambda params: params['encoder']['layers_0']['mlp']
  before = of_layer(first.params)
  _assert_same_bits(of_layer(params[True])['expert'], before['expert'])
  kernel = lambda layer: layer['router']['router_weights']['w']['kernel']
  assert np.any(kernel(of_layer(params[True])) != kernel(before))
  wo = lambda layer: layer['expert']['wo']['kernel']
  assert np.any(wo(of_layer(params[False])) != wo(before))


@pytest.mark.slow
def test_finetuning_with_trained_experts_from_an_earlier_step(
  world, straight, tmp_path
):
  source, pretrained = straight
  slow_rows = row_optimizers.RowAdafactor(1e-4)
  state = _finetune(
    world, source / 'checkpoint_3', tmp_path / 'run', row_optimizer=slow_rows
  )
  counts = np.asarray(state.table_state['experts'].counts)
  # The row state is fresh, so visits are counted from here.
  assert counts.max() == 2 and counts.min() == 0
  early = model_folder.load(str(source / 'checkpoint_3')).params
  still = counts == 0
  for name, table in state.tables['experts'].items():
    old = np.asarray(early['experts'][name])
    np.testing.assert_array_equal(np.asarray(table)[still], old[still])
    assert np.any(np.asarray(table)[~still] != old[~still])
    assert np.any(old != pretrained.tables['experts'][name])


def _with_layer(world, **fields):
  settings = {'num_experts': 16, 'expert_dim': 4} | fields
  return world.config(
    sparse_feed_forward=functools.partial(word_experts.MoweLayer, **settings)
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('changes', 'old', 'new'),
  [
    (lambda world: {'seed': 1}, '0', '1'),
    (lambda world: {'data': world.data(batch_size=4)}, '8', '4'),
    (lambda world: {'data': world.data(seed=5)}, '0', '5'),
    (lambda world: {'data': world.data('questions')}, '', 'rates.questions'),
    (lambda world: {'num_microbatches': 2}, '1', '2'),
    (lambda world: {'freeze_experts': True}, 'False', 'True'),
    (lambda world: {'model': world.config(mlp_dim=15)}, '14', '15'),
    (lambda world: {'model': world.config(dropout_rate=0.2)}, '0.1', '0.2'),
    (lambda world: {'model': _with_layer(world, expert_dim=5)}, '4', '5'),
    (lambda world: {'model': world.config(sparse=False)}, 'Mowe', 'None'),
    (
      lambda world: {
        'vocabulary': byte_vocabulary.ByteVocabulary(),
        'model': world.config(sparse=False, vocab_size=384),
        'data': world.data(),
      },
      '',
      '',
    ),
  ],
)
def test_resuming_with_other_settings_is_refused(
  world, straight, changes, old, new
):
  folder, _ = straight
  before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
  with pytest.raises(ValueError) as caught:
    world.train(folder, _TOTAL + 1, **changes(world), config_text=lambda: 'new')
  text = str(caught.value)
  assert old in text and new in text, text
  after = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
  assert after == before, 'a refused run must not write'


def test_a_folder_of_another_routing_vocabulary_is_refused(world, straight):
  routing = world.routing.with_experts(16, num_skipped=5)
  config = dataclasses.replace(world.config(), routing=routing)
  with pytest.raises(
    checkpointing.CheckpointMismatchError, match='routing.sha256'
  ):
    world.train(straight[0], _TOTAL + 1, model=config)


@pytest.mark.slow
def test_a_diverged_run_stops_and_saves_nothing(world, tmp_path):
  folder = tmp_path / 'run'
  with pytest.raises(loop.DivergedError, match='Lower the learning rate'):
    world.train(
      folder,
      9,
      model=world.config(sparse=False),
      optimizer=optimizers.AdamW(float('inf')),
      save=train_command.SaveConfig(period=2),
      log_period=9,
    )
  assert checkpointing.Checkpoints(folder).all_steps() == []


@pytest.mark.slow
def test_a_resumed_run_leaves_out_the_updates_of_the_same_batches(
  world, tmp_path
):
  # Losses hardly fall, and so low a limit takes ordinary batches for spikes.
  settings = {
    'optimizer': optimizers.AdamW(1e-4),
    'row_optimizer': row_optimizers.RowAdafactor(1e-4),
    'spikes': loss_spikes.SpikeConfig('skip', window=32, deviations=1e-3),
    'save': train_command.SaveConfig(period=50),
    'log_period': 1,
  }
  expected = world.train(tmp_path / 'straight', 46, **settings)
  for stop in (37, 46):
    settings['log_period'] += 1
    state = world.train(tmp_path / 'resumed', stop, **settings)
  _assert_same_bits(state, expected)
  lines = train_metrics.read_json_lines(
    tmp_path / 'straight' / 'train_metrics.jsonl'
  )
  skipped = [line[loss_spikes.SKIPPED] for line in lines]
  assert 0 < sum(skipped) < 11 and not any(skipped[:34])


@pytest.mark.slow
def test_evaluations_during_training(world, tmp_path):
  folder = tmp_path / 'run'
  state = world.train(
    folder,
    5,
    eval_configs=[
      evaluations.LossEvaluation(world.data(), num_batches=2, name='held_out'),
      evaluations.QuestionEvaluation(world.data('questions')),
    ],
    eval_period=2,
    save=train_command.SaveConfig(keep_last=1, best_metric='held_out/loss', best_mode='min'),
  )  # fmt: skip
  lines = train_metrics.read_json_lines(folder / 'eval_metrics.jsonl')
  assert [line['step'] for line in lines] == [2, 4, 5]
  assert {'held_out/loss', 'validation/em', 'validation/f1'} <= set(lines[0])
  assert lines[-1]['held_out/loss'] < lines[0]['held_out/loss']
  with checkpointing.Checkpoints(
    folder, best_metric='held_out/loss', best_mode='min'
  ) as saved:
    best = min(lines, key=lambda line: line['held_out/loss'])['step']
    assert saved.best_step() == best
    assert set(saved.all_steps()) == {best, 5}
    for step in saved.all_steps():
      line = next(line for line in lines if line['step'] == step)
      assert saved.metrics(step)['held_out/loss'] == pytest.approx(
        line['held_out/loss']
      )
  assert int(state.step) == 5


@dataclasses.dataclass
class _Scripted:
  """An evaluation with given results, one for each time that it is run."""

  results: list[float]

  def prepare(self, model, vocabulary, loss):
    del model, vocabulary, loss
    return lambda params, tables: {'validation/em': self.results.pop(0)}


@pytest.mark.parametrize('stops', [(), (3,)])
def test_a_run_ends_when_its_evaluations_are_no_better(
  world, tmp_path, capsys, stops
):
  scripted = _Scripted([3.0, 5.0, 5.0, 4.0, 9.0])
  settings = {
    'eval_configs': [scripted],
    'eval_period': 1,
    'save': train_command.SaveConfig(best_metric='validation/em', patience=2),
  }
  for total_steps in (*stops, 9):
    state = world.train(tmp_path / 'run', total_steps, **settings)
  assert int(state.step) == 4 and scripted.results == [9.0]
  said = (
    'validation/em is not better than 5 in 2 evaluations. The best step is 3.'
  )
  assert said in capsys.readouterr().out
  # The same command finds that the run has ended.
  assert int(world.train(tmp_path / 'run', 9, **settings).step) == 4
  assert scripted.results == [9.0]


def test_patience_needs_a_metric():
  with pytest.raises(ValueError, match='patience must be a number .* but is 0'):
    train_command.SaveConfig(best_metric='validation/em', patience=0)
  with pytest.raises(ValueError, match='with best_metric None'):
    train_command.SaveConfig(patience=3)


@pytest.mark.slow
def test_eight_devices_and_microbatches_train_alike(world, tmp_path, capsys):
  settings = {
    'model': world.config(dropout_rate=0.0),
    'eval_configs': [evaluations.LossEvaluation(world.data(), num_batches=2)],
  }
  plain = world.train(tmp_path / 'one', 2, **settings)
  assert 'blocks of' not in capsys.readouterr().out
  spread = world.train(
    tmp_path / 'eight',
    2,
    make_mesh=functools.partial(partitioning.make_mesh, expert=2, data=4),
    data=world.data(batch_size=8),
    **settings,
  )
  assert 'Experts    2 blocks of' in capsys.readouterr().out
  for name in ('train_metrics.jsonl', 'eval_metrics.jsonl'):
    one, eight = (
      train_metrics.read_json_lines(tmp_path / run / name)[-1]
      for run in ('one', 'eight')
    )
    assert one.keys() == eight.keys()
    for key in set(one) & {
      'loss',
      'validation/loss',
      'experts/distinct',
      'experts/tokens_each',
      'experts/never_seen',
    }:
      assert eight[key] == pytest.approx(one[key], rel=1e-5), key
  for one, other in zip(
    jax.tree.leaves(jax.device_get(plain.tables)),
    jax.tree.leaves(jax.device_get(spread.tables)),
    strict=True,
  ):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_sizes_that_do_not_fit_are_refused_before_anything(world, tmp_path):
  refused = functools.partial(pytest.raises, ValueError)
  run = functools.partial(world.train, tmp_path / 'run', 2)
  with refused(match=f'{world.vocabulary.size}, but is 50. Set it to 256'):
    run(model=world.config(vocab_size=50))
  with refused(match='multiple of data x expert x microbatches .* but is 8'):
    run(num_microbatches=3)
  with refused(match='needs a row_optimizer'):
    run(row_optimizer=None)
  with refused(match='routing vocabulary must be built for'):
    run(
      vocabulary=subword_vocabularies.load_subwords(
        world.vocabulary_path, extra_ids=102
      ),
      model=world.config(),
    )
  with refused(match='layer has 15 and the vocabulary 16'):
    run(model=_with_layer(world, num_experts=15))
  with refused(match='vocabulary'):
    run(vocabulary=byte_vocabulary.ByteVocabulary(), model=world.config(
      sparse=False, vocab_size=384
    ))  # fmt: skip
  assert not (tmp_path / 'run').exists()
  file = tmp_path / 'file'
  file.write_text('')
  with refused(match='must be a folder, but .* is a file'):
    world.train(file, 2)


@pytest.mark.parametrize('is_read', [True, False])
def test_nothing_is_saved_of_a_run_on_damaged_tokens(
  is_read, world, tmp_path, monkeypatch
):
  message = r'its bytes 0 to [\d,]+ have changed'
  if not is_read:
    # As if the damage were in a block that no batch has read yet.
    monkeypatch.setattr(
      verified_array.VerifiedArray, '_verify', lambda self, blocks: None
    )
    message = 'must have the sha'
  shutil.copytree(f'{world.cache_dir}/text', tmp_path / 'text')
  file = tmp_path / 'text' / 'targets.tokens.bin'
  content = bytearray(file.read_bytes())
  content[100:120] = content[120:140]
  file.write_bytes(content)
  with pytest.raises(ValueError, match=f'targets.tokens.bin .*{message}'):
    world.train(
      tmp_path / 'run',
      1,
      model=world.config(sparse=False),
      data=world.data(cache_dir=str(tmp_path)),
    )
  assert not list((tmp_path / 'run').glob('checkpoint_*'))


def test_a_task_without_cache_is_refused(world, tmp_path):
  # Other test modules share this folder and may have made more caches.
  there = sorted(path.name for path in world.folder.glob('cache/*'))
  with pytest.raises(FileNotFoundError, match=re.escape(f'are {there}.')):
    world.train(tmp_path / 'run', 2, data=world.data('absent'))


def test_the_model_folder_says_what_it_holds(world, straight):
  described = json.loads((straight[0] / 'model.json').read_text())
  assert described['subwords'] == {
    'file': 'vocabulary.model',
    'extra_ids': 100,
    'sha256': world.vocabulary.sha256,
  }
  assert described['routing']['sha256'] == world.routing.sha256
  assert described['config']['emb_dim'] == 12
  config, vocabulary = model_folder.load_config(straight[0])
  assert config.routing.sha256 == world.routing.sha256
  assert vocabulary.size == world.vocabulary.size


def test_a_model_folder_with_another_vocabulary_file_is_refused(
  world, straight, tmp_path
):
  from mowe.words import routing_vocabulary

  copied = tmp_path / 'copied'
  copied.mkdir()
  for name in ('model.json', 'vocabulary.model'):
    (copied / name).write_bytes((straight[0] / name).read_bytes())
  world.routing.with_experts(16, num_skipped=5).save(
    copied / 'routing_vocabulary.npz'
  )
  assert routing_vocabulary.load(copied / 'routing_vocabulary.npz')
  with pytest.raises(ValueError, match='routing vocabulary beside it'):
    model_folder.load_config(copied)


def test_paths_of_models_and_checkpoints():
  split = model_folder.split_checkpoint_path
  assert split('runs/a') == (pathlib.Path('runs/a'), None)
  assert split('runs/a/checkpoint_120') == (pathlib.Path('runs/a'), 120)
  assert split('runs/checkpoint_best') == (
    pathlib.Path('runs/checkpoint_best'),
    None,
  )


class _PartsOfExperts:
  """An evaluation that reports into how many parts the experts are split."""

  def prepare(self, model, vocabulary, loss):
    return lambda params, tables: {'parts': expert_parallel.num_shards()}


@pytest.mark.slow
def test_evaluations_on_a_mesh_are_those_of_one_device(world, tmp_path):
  layer = functools.partial(
    moe.MoeLayer, 4, 6, groups=token_groups.TokenGroups(multiple=8)
  )
  values = []
  for name, mesh in (('one', {}), ('eight', {'expert': 2})):
    changes = {}
    if mesh:
      changes['make_mesh'] = functools.partial(partitioning.make_mesh, **mesh)
    world.train(
      tmp_path / name,
      1,
      model=world.config(
        dropout_rate=0.0, sparse_feed_forward=layer, routing=None
      ),
      eval_configs=[
        evaluations.LossEvaluation(world.data(), num_batches=2),
        evaluations.QuestionEvaluation(world.data('questions')),
        _PartsOfExperts(),
      ],
      **changes,
    )
    path = tmp_path / name / 'eval_metrics.jsonl'
    values.append(train_metrics.read_json_lines(path)[-1])
  one, eight = values
  assert one['step'] == 1 and one.keys() == eight.keys()
  assert (one['parts'], eight['parts']) == (1, 2)
  for key in ('validation/loss', 'validation/em', 'validation/f1'):
    assert eight[key] == pytest.approx(one[key], rel=1e-5), key
