"""Runs the code in docs/adding_a_layer.md and docs/adding_a_task.md."""

import importlib
import json
import pathlib
import re

import pytest
import small_runs

import mowe
from mowe.cli import main
from mowe.commands import ask
from mowe.models.families import saved_config

_DOCS = pathlib.Path(__file__).resolve().parent.parent / 'docs'


@pytest.fixture
def write_files(tmp_path, monkeypatch):
  """Writes the files that a page shows to a folder on Python's path."""
  monkeypatch.syspath_prepend(tmp_path)

  def write(page):
    text = (_DOCS / page).read_text('utf-8')
    blocks = re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', text, re.DOTALL)
    assert blocks
    for name, content in blocks:
      (tmp_path / name).write_text(content, 'utf-8')
    importlib.invalidate_caches()
    return tmp_path

  return write


def _gin(**macros):
  return [f'--gin.{name}={value!r}' for name, value in macros.items()]


@pytest.mark.slow
def test_adding_a_layer(world, write_files, monkeypatch):
  monkeypatch.setattr(saved_config, '_trusted', set())
  folder = write_files('adding_a_layer.md')
  run = folder / 'runs' / 'bottleneck'
  settings = _gin(
    VOCABULARY_PATH=world.vocabulary_path,
    CACHE_DIR=world.cache_dir,
    MIXTURE_OR_TASK_NAME='text',
    MODEL_DIR=str(run),
    TASK_FEATURE_LENGTHS=small_runs.LENGTHS,
    TRAIN_STEPS=2,
    WARMUP_STEPS=1,
    BATCH_SIZE=8,
  )
  files = [
    f'--gin_file={name}'
    for name in (
      folder / 'my_model.gin',
      'gin_configs/optimizers/adamw.gin',
      'gin_configs/runs/pretrain.gin',
    )
  ]
  assert main.main(['train', *files, *settings]) == 0
  question = 'Who met Karl?'
  assert main.main(['ask', str(run), question]) == 1
  trust = ['--trust_module', 'my_layers']
  assert main.main(['ask', str(run), question, *trust]) == 0
  loaded = mowe.load(str(run))
  layer = loaded.model.config.sparse_layers()['encoder']
  assert (type(layer).__name__, layer.hidden) == ('Bottleneck', 24)
  # The representation must not print the weights.
  assert len(repr(loaded)) < 200 and 'step 2' in repr(loaded)
  assert len(ask.ask(str(run), [question], max_length=3)) == 1


@pytest.mark.slow
def test_adding_a_task(write_files):
  pytest.importorskip('seqio')
  folder = write_files('adding_a_task.md')
  output = folder / 'cache' / 'capitals'
  arguments = ['--seqio_task', 'my_capitals', '--task_modules', 'my_tasks']
  arguments += ['--split', 'validation', '--vocabulary', 'bytes']
  assert main.main(['cache-task', str(output), *arguments]) == 0
  lines = (output / 'records.jsonl').read_text('utf-8').splitlines()
  answers = [json.loads(line)['answers'] for line in lines]
  assert answers == [['Klow'], ['Szohod']]


def test_public_names_are_there():
  assert sorted(mowe._PLACES) == sorted(mowe.__all__)
  for name in mowe.__all__:
    assert callable(getattr(mowe, name)), name
  with pytest.raises(AttributeError, match='nothing_of_this_name'):
    mowe.nothing_of_this_name  # noqa: B018
