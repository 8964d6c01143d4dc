"""Tests the way from files of text and questions to a model that is scored.

Also tests `made_of`, `own_run`, `pretrain`, `shown_commands`, and `text_verbs`.
"""

import json
import shlex

import pytest
import small_runs

from mowe.cli import main
from mowe.commands import train
from mowe.commands.gin_files import gin_config
from mowe.commands.own_text import own_run, shown_commands
from mowe.model_folders import model_folder
from mowe.training import checkpointing

# Programs for eight devices take longer to compile.
_ONE_DEVICE = """
from __gin__ import dynamic_registration
import small_runs
from mowe.training import partitioning

partitioning.make_mesh.devices = @small_runs.one_device()
"""
_SMALL = (
  '--gin.t5_config.T5Config.emb_dim=12',
  '--gin.t5_config.T5Config.mlp_dim=14',
  '--gin.t5_config.T5Config.num_encoder_layers=2',
  '--gin.t5_config.T5Config.num_decoder_layers=2',
  '--gin.EXPERT_DIM=4',
)


def _run(*arguments):
  return main.main([str(argument) for argument in arguments])


def _pretrain(world, output, *more):
  return _run(
    'pretrain', world.folder / 'text.jsonl', '--output', output,
    '--questions', world.folder / 'questions.jsonl', '--vocabulary_size', 40,
    '--num_experts', small_runs.NUM_EXPERTS, *_SMALL, '--gin.BATCH_SIZE=8',
    *more,
  )  # fmt: skip


@pytest.mark.slow
def test_from_text_and_questions_to_scores(world, tmp_path, capsys):
  output = tmp_path / 'mine'
  file = tmp_path / 'one_device.gin'
  file.write_text(_ONE_DEVICE)
  on_one = f'--gin_file={file}'
  lengths = f'--gin.TASK_FEATURE_LENGTHS={small_runs.LENGTHS}'
  arguments = lengths, on_one, '--epochs', 0.5
  assert _pretrain(world, output, *arguments) == 0
  shown = capsys.readouterr().out
  for verb in ('train-vocabulary', 'build-routing-vocabulary', 'cache-task'):
    assert f'$ mowe {verb} {output}' in shown
  # Half of 30 texts are 15 rows, which are two batches of 8.
  assert '--gin.TRAIN_STEPS=2' in shown and '--gin.WARMUP_STEPS=0' in shown
  assert '--gin.LOG_PERIOD=1' in shown
  assert f'mowe finetune {output} questions.jsonl' in shown
  loaded = model_folder.load(str(output))
  assert (loaded.step, loaded.vocabulary.size) == (2, 140)
  assert loaded.model.config.routing.num_experts == small_runs.NUM_EXPERTS
  # The same command finds all of it.
  assert _pretrain(world, output, *arguments) == 0
  assert '$ mowe train-vocabulary' not in capsys.readouterr().out
  assert _pretrain(world, output, '--num_experts', 8) == 1
  said = capsys.readouterr().err
  assert 'has a checkpoint and differs in vocabularies. Restore them' in said

  questions = world.folder / 'questions.jsonl'
  arguments = (
    'finetune', output, questions, '--reported', questions, '--steps', 6,
    '--choosing', questions, '--gin.PATIENCE=2', '--gin.BATCH_SIZE=8', on_one,
  )  # fmt: skip
  assert _run(*arguments) == 0
  shown = capsys.readouterr().out
  number = len(questions.read_text().splitlines())
  assert f'Questions: {number} for training, {number} for choosing' in shown
  assert f'({number} questions, step' in shown
  finetuned = tmp_path / 'mine_finetuned'
  finished = json.loads((finetuned / 'data' / 'finished.json').read_text())
  with checkpointing.Checkpoints(finetuned) as checkpoints:
    assert checkpoints.latest_step() == finished['step']
    metrics = checkpoints.metrics()
  assert finished['metric'] == 'validation/f1'
  assert finished['value'] == metrics['validation/f1']
  scores = json.loads((finetuned / 'reported' / 'results.json').read_text())
  assert scores['em'] == pytest.approx(metrics['validation/em'])
  lengths = model_folder.trained_lengths(str(finetuned))
  assert lengths['inputs'] % 8 == lengths['targets'] % 8 == 0
  assert _run(*arguments) == 0
  shown = capsys.readouterr().out
  assert 'is finetuned. To do it anew' in shown and 'mowe train' not in shown
  # With other questions, what is reported might have been trained on.
  before = (finetuned / 'data' / 'training.jsonl').read_bytes()
  fewer = tmp_path / 'fewer.jsonl'
  fewer.write_text(''.join(questions.read_text().splitlines(True)[1:]))
  # The last option of a name holds.
  assert _run(*arguments, '--reported', fewer) == 1
  assert 'a checkpoint and differs in questions' in capsys.readouterr().err
  assert (finetuned / 'data' / 'training.jsonl').read_bytes() == before


def test_what_is_missing_is_said_at_once(world, tmp_path, capsys):
  assert _run('finetune', tmp_path / 'none', 'questions.jsonl') == 1
  assert 'must have a model.json' in capsys.readouterr().err
  assert _pretrain(world, tmp_path / 'mine', '--model', 'mowe_tny') == 1
  assert (
    'Did you mean gin_configs/models/mowe_tiny.gin' in capsys.readouterr().err
  )
  for arguments, said in (
    (['--gin.MODEL_DIR=x'], 'MODEL_DIR must be left to this command'),
    (['--vocabulary', 'bytes'], 'given or trained, but there are --vocabulary'),
    (['--model', 't5_tiny'], '--num_experts is for models that have word exp'),
  ):
    assert _pretrain(world, tmp_path / 'mine', *arguments) == 1
    assert said in capsys.readouterr().err
  with pytest.raises(SystemExit):
    _pretrain(world, tmp_path / 'mine', '--steps', 3, '--minutes', 2)
  assert not list(tmp_path.iterdir())


def test_other_files_are_made_anew_before_anything_is_trained(
  world, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(own_run, 'run', lambda *_: None)
  output = tmp_path / 'it is mine'
  vocabulary = output / 'data' / 'vocabulary.model'
  assert _pretrain(world, output) == 0
  assert f"mowe finetune '{output}' questions.jsonl" in capsys.readouterr().out
  first = vocabulary.read_bytes()
  assert _pretrain(world, output, '--vocabulary_size', 38) == 0
  shown = capsys.readouterr().out
  assert vocabulary.read_bytes() != first
  for verb in ('train-vocabulary', 'build-routing-vocabulary'):
    assert f'$ mowe {verb}' in shown


def test_models_have_their_own_sentinels_and_memory(
  world, tmp_path, monkeypatch, capsys
):
  """XL models have no sentinels, and read contiguous text."""
  runs = []
  monkeypatch.setattr(own_run, 'run', lambda *arguments: runs.append(arguments))
  text = world.folder / 'text.jsonl'
  arguments = '--model', 'xl_tiny', '--vocabulary', 'bytes'
  assert _run('pretrain', text, '--output', tmp_path / 'xl', *arguments) == 0
  assert '--vocabulary bytes --extra_ids 0' in capsys.readouterr().out
  ((files, macros, bindings, *_),) = runs
  assert 'gin_configs/examples/text_lm_memory.gin' in files
  small = "TASK_FEATURE_LENGTHS = {'targets': 16}", 'BATCH_SIZE = 8'
  gin_config.parse(files, [*own_run.as_bindings(macros), *bindings, *small])
  training = gin_config.call(train.Training)
  training.check(training.make_mesh())
  assert training.data.open(training.vocabulary, training.model).epochs(1)


def test_a_shown_command_can_be_typed(capsys):
  words = ['mowe', 'train', "--gin.A='b c'", '--gin.B=(1, 2)', """'"$HOME"""]
  shown_commands.print_command(words)
  shown = capsys.readouterr().out
  assert shlex.split(shown) == ['$', *words]
  assert shown.startswith("""$ mowe train "--gin.A='b c'" '--gin.B=(1, 2)' """)
  shown_commands.say('explain', 'a b.npz', vocabulary=('x', 'y'))
  assert (
    capsys.readouterr().out == "$ mowe explain 'a b.npz' --vocabulary x y\n"
  )
