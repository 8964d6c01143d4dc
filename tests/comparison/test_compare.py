"""A comparison of two models is killed, continued, and then extended.

Also tests `model_sizes`, `run_process` and `single_run`.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest
import small_experiments
import small_runs
from jax.experimental.compilation_cache import compilation_cache

from mowe.comparison import (
  compare,
  experiment_data,
  experiments,
  measurements,
  planned_runs,
  question_files,
  run_process,
  single_run,
)
from mowe.words import writer_locks

_GIN = """
# Tiny.
from __gin__ import dynamic_registration
from mowe.comparison import budgets
from mowe.comparison import experiment_data
from mowe.comparison import experiments

OUTPUT = %gin.REQUIRED
experiment_data.Caches:
  cache_dir = {cache_dir!r}
  vocabulary = {vocabulary!r}
  documents = ({documents!r},)
experiment_data.Words:
  num_experts = 16
  num_skipped = 2
budgets.EqualFlops.base = 'T5'
experiments.Model:
  budget = @budgets.EqualFlops()
  width = 'EXPERT_DIM'
  granule = 1
  stages = (@first/experiments.Stage(), @last/experiments.Stage())
first/experiments.Stage:
  name = 'pretrained'
  gin_files = {files[0]}
  bindings = {bindings[0]}
last/experiments.Stage:
  name = 'finetuned'
  gin_files = {files[1]}
  bindings = {bindings[1]}
t5/experiments.Model:
  name = 'T5'
  gin_files = ('gin_configs/models/t5_tiny.gin',)
  bindings = {dense.bindings}
mowe/experiments.Model:
  name = 'MoWE'
  gin_files = ('gin_configs/models/mowe_tiny.gin',)
  bindings = {sparse.bindings}
  words = @experiment_data.Words()
experiments.Experiment:
  title = 'Tiny'
  models = (@t5/experiments.Model(), @mowe/experiments.Model())
  data = @experiment_data.Caches()
  output = %OUTPUT
  questions = ('questions',)
  num_recalled = 8
  num_points = 4
  knock_out = True
"""
_STEPS = 40


def _write(world, path):
  stages = small_experiments.stages(_STEPS, 3, SAVE_PERIOD=4, LOG_PERIOD=4)
  path.write_text(
    _GIN.format(
      cache_dir=world.cache_dir,
      vocabulary=world.vocabulary_path,
      documents=str(world.folder / 'text.jsonl'),
      files=[stage.gin_files for stage in stages],
      bindings=[stage.bindings for stage in stages],
      dense=small_experiments.dense(),
      sparse=small_experiments.words(),
    )
  )
  return path


def _command(file, folder, *more):
  return [
    sys.executable, '-m', 'mowe.cli.main', 'compare', str(file),
    f'--gin.OUTPUT={str(folder)!r}', *more,
  ]  # fmt: skip


def _environment():
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(pathlib.Path(__file__).resolve().parents[2]),
  }


def _run(*arguments):
  done = subprocess.run(
    _command(*arguments),
    capture_output=True,
    text=True,
    env=_environment(),
    timeout=900,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
  return done.stdout


@pytest.mark.slow
def test_killed_and_continued(world, tmp_path, capfd):
  file, folder = _write(world, tmp_path / 'tiny.gin'), tmp_path / 'out'
  first = folder / 'runs' / 't5_seed0' / 'pretrained'
  process = subprocess.Popen(
    _command(file, folder), env=_environment(), stdout=subprocess.DEVNULL
  )
  until = time.monotonic() + 300
  while not list(first.glob('checkpoint_*/manifest.json')):
    assert process.poll() is None and time.monotonic() < until
    time.sleep(0.02)
  start = time.monotonic()
  with pytest.raises(
    writer_locks.PlaceInUseError, match=f'process {process.pid}'
  ):
    run_process.only_one(folder).__enter__()
  assert time.monotonic() - start < 1
  process.send_signal(signal.SIGKILL)
  process.wait()
  # The run that the killed process had started ends with it. Taking the lock
  # waits until it has.
  with run_process.only_one(folder):
    log = (first / 'train_metrics.jsonl').read_text().splitlines()
  assert not (folder / 'runs' / 'mowe_seed0').exists()

  shown = _run(file, folder)
  assert 'EXPERT_DIM = 14 for the FLOPs per token of T5 (+0.00%)' in shown
  resumed = re.search(r'Resumed \S*t5_seed0/pretrained at step (\d+)', shown)
  # The kill may come too late to stop the run.
  assert resumed or json.loads(log[-1])['step'] == _STEPS
  dense, sparse = json.loads((folder / 'report' / 'results.json').read_text())
  assert (dense['name'], sparse['name']) == ('T5', 'MoWE')
  assert sparse['flops_formula'] == dense['flops_formula']
  assert sparse['total_parameters'] > dense['total_parameters']
  assert sparse['frozen_parameters'] == 16 * 3 * 12 * 14
  assert dense['frozen_parameters'] == 0
  for result in (dense, sparse):
    assert result['score']['num_questions'] == 21
    assert result['flops_compiled'] > result['flops_formula']
    assert result['tokens_per_second'] > 0 and result['peak_memory'] > 2**20
    # A stop also logs its step, so there may be more steps than these.
    steps = [step for step, _ in result['curve']]
    assert set(steps) >= set(range(4, 41, 4)) and steps == sorted(steps)
    assert result['text_loss'] > 0 and result['held_out_loss'] is None
    assert result['recall']['all spans'][1] > 0
    assert list(result['breakdowns']['relation']) == ['met']
  assert [load['layer'] for load in sparse['loads']] == [
    'encoder, block 1', 'decoder, block 1',
  ]  # fmt: skip
  for load in sparse['loads']:
    assert sum(load['shares']) == pytest.approx(1)

  assert dense['silenced'] is None and dense['reads'] is None
  without = sparse['silenced']
  assert without['text_loss'] != sparse['text_loss']
  assert without['recall']['all spans'][1] == sparse['recall']['all spans'][1]
  # A token has one expert at most, of three kernels of 12 x 14 numbers; two
  # words have none. A batch names each expert once.
  reads = sparse['reads']
  assert 0 < reads['rows'] < 1
  assert reads['bytes'] == pytest.approx(reads['rows'] * 3 * 12 * 14 * 4)
  assert 0 < reads['moved'] < reads['bytes']

  # What is done is not repeated. A model from another folder is only measured.
  other = folder / 'runs' / 't5_seed0' / 'finetuned'
  experiment = experiments.with_folder(
    experiments.load([str(file)], [f'OUTPUT = {str(folder)!r}']),
    f'again={other}',
  )
  capfd.readouterr()
  compared = compare.compare(experiment)
  shown = capfd.readouterr().out
  assert 'mowe train' not in shown and '1 of 1 runs finished' in shown
  assert [len(one.answers) for one in compared.results] == [1, 1, 1]
  first_answers = compared.results[0].answers[0]
  results = json.loads((folder / 'report' / 'results.json').read_text())
  again = results[2]
  assert again['score'] == dense['score'] and again['curve'] == []
  assert again['total_parameters'] == dense['total_parameters']
  assert again['tokens_per_second'] is None and again['recall'] == {}

  # The report can be made from the measurements of finished runs alone.
  for stage in ('pretrained', 'finetuned'):
    for path in (folder / 'runs').glob(f'*/{stage}'):
      shutil.rmtree(path)
  compared = compare.compare(
    experiments.load([str(file)], [f'OUTPUT = {str(folder)!r}'])
  )
  assert [one.name for one in compared.results] == ['T5', 'MoWE']
  found = compared.results[0].answers[0]
  assert found.predictions == first_answers.predictions
  _check_as_measured(file, folder, first_answers)


def _check_as_measured(file, folder, answers):
  """Measurements of another version are taken, if that is asked for."""
  path = folder / 'runs' / 't5_seed0' / 'results.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'digest': 'x'}))
  # The caches are of another version, too.
  for cache in (folder / 'data').rglob('cache.json'):
    summary = json.loads(cache.read_text())
    summary['recipe']['format_version'] = 0
    cache.write_text(json.dumps(summary | {'fingerprint': 'x'}))
  load = lambda: experiments.load([str(file)], [f'OUTPUT = {str(folder)!r}'])
  compared = compare.compare(load(), as_measured=True)
  assert compared.results[0].answers[0].predictions == answers.predictions
  report = (folder / 'report' / 'report.md').read_text()
  assert '1 of 2 runs were measured by an earlier version or' in report
  measured = json.loads(path.read_text())
  del measured['flops_has_loops']
  path.write_text(json.dumps(measured))
  with pytest.raises(ValueError, match="some lack 'flops_has_loops'"):
    compare.compare(load(), as_measured=True)
  path.unlink()
  with pytest.raises(ValueError, match='t5_seed0 does not have results.json'):
    compare.compare(load(), as_measured=True)


def test_a_thread_can_compare():
  errors = []

  def begin():
    try:
      with run_process.Runner(0):
        pass
    except ValueError as error:
      errors.append(error)

  thread = threading.Thread(target=begin)
  thread.start()
  thread.join()
  assert not errors


@pytest.fixture(scope='module')
def planned(world, tmp_path_factory):
  folder = tmp_path_factory.mktemp('planned')
  experiment = small_experiments.experiment(
    world, folder, (small_experiments.dense(),)
  )
  prepared = experiment.data.prepare(folder / 'data')
  return planned_runs.Plan(experiment, prepared).runs('T5')[0]


@pytest.fixture
def no_compilation_cache():
  old = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  jax.config.update('jax_compilation_cache_dir', old)
  compilation_cache.reset_cache()


@pytest.mark.slow
def test_equal_programs_are_compiled_once(tmp_path, no_compilation_cache):
  folder = tmp_path / 'compiled'
  folder.mkdir()
  (folder / 'left_by_a_kill').touch()
  hits = []
  jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event.endswith('cache_hits'))
  )

  # The program must take long enough to compile to be kept in the cache.
  def program(x):
    for _ in range(300):
      x = jnp.sort(jnp.sin(x) @ x)
    return x

  with single_run._each_program_once(folder):
    assert not folder.exists()
    first = jax.jit(lambda x: program(x))(jnp.eye(5))
    assert not any(hits)
    second = jax.jit(lambda x: program(x))(jnp.eye(5))
    assert any(hits) and (first == second).all()
  assert not folder.exists()
  assert jax.config.jax_compilation_cache_dir is None


def test_the_time_of_a_stage_that_was_killed_is_not_known(tmp_path):
  clock = tmp_path / 'seconds.txt'
  assert single_run._seconds_before(clock) == 0
  (tmp_path / 'checkpoint_3').mkdir()
  assert single_run._seconds_before(clock) is None
  clock.write_text('12.5')
  assert single_run._seconds_before(clock) == 12.5


def test_what_is_known_of_questions(world, planned):
  questions = question_files.questions_of(
    planned, planned.questions, world.vocabulary
  )
  assert [question.answers for question in questions] == [
    tuple(record['answers']) for record in small_runs.QUESTIONS
  ]
  assert {question.relation for question in questions} == {'met'}
  # Finetuning used the same questions, and they name no entity.
  assert all(question.is_answer_seen for question in questions)
  assert {question.entity_count for question in questions} == {None}


def test_entities_are_counted_by_whole_words():
  texts = ['Anna of Delft, and ANNA-of delft', 'Anna, Annabel', 'of Delft']
  counts = question_files._count(
    iter(texts), ['Anna of Delft', 'Anna', 'Quimby', '?']
  )
  assert counts == {'Anna of Delft': 2, 'Anna': 3, 'Quimby': 0, '?': 0}
  # Without text no count is known, so it must not be 0.
  assert question_files._count(iter([]), ['Anna']) == {}


def test_answers_to_other_questions_are_refused(world, planned):
  questions = question_files.questions_of(
    planned, planned.questions, world.vocabulary
  )
  folder = pathlib.Path(planned.folder)
  folder.mkdir(parents=True, exist_ok=True)
  lines = [
    {
      'task': q.task,
      'answers': list(q.answers),
      'prediction': 'x',
      'em': 0.0,
      'f1': 50.0,
    }
    for q in questions
  ]
  path = folder / measurements.QUESTIONS
  small_runs.write_lines(path, lines)
  answers = question_files.answers_of(planned, questions)
  assert answers.f1.mean() == 0.5 and answers.predictions[0] == 'x'
  small_runs.write_lines(path, lines[1:])
  with pytest.raises(ValueError, match='21 questions .* holds 20 others'):
    question_files.answers_of(planned, questions)


def test_speed_leaves_out_compilation():
  lines = [
    {'step': 10},
    {'step': 20, measurements.SECONDS: 2.0},
    {'step': 30, measurements.SECONDS: 4.0},
    # A resumed run compiles again, so its first interval does not count.
    {'step': 40},
    {'step': 45, measurements.SECONDS: 0.5},
  ]
  assert measurements._steps_per_second(lines) == 5
  assert measurements._steps_per_second(lines[:1]) is None


def test_a_dry_run_sizes_the_models_and_makes_no_data(
  world, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  source = experiment_data.GeneratedWorld(vocabulary_size=300)
  planned = small_experiments.experiment(
    world, tmp_path / 'out', data=source, seeds=(0, 1, 2)
  )
  assert compare.compare(planned, dry_run=True) is None
  assert not list(tmp_path.iterdir())
  shown = capsys.readouterr().out
  # 300 ids and 100 sentinels need 512 rows of 12 numbers in both embeddings.
  dense = next(line for line in shown.splitlines() if '  T5: ' in line)
  assert '3 runs to do' in dense
  assert 2 * 512 * 12 < int(dense.split()[1].replace(',', '')) < 3 * 512 * 12
  assert 'MoWE: ' in shown and 'EXPERT_DIM = ' in shown
  # Where the data are there, it says what is done.
  (tmp_path / 'out' / 'data').mkdir(parents=True)
  planned = small_experiments.experiment(world, tmp_path / 'out')
  assert compare.compare(planned, dry_run=True) is None
  assert '0 of 1 runs finished' in capsys.readouterr().out
