"""Tests experiments: what is refused, how models are sized, what runs share.

Also tests `experiment_data`, `experiments`, `measurements`, `peak_memory`,
`question_files`, and `rate_choice`.
"""

import dataclasses
import json
import pathlib
import shutil
import types

import numpy as np
import pytest
import small_experiments
import small_runs

from mowe.commands import cache_task
from mowe.commands.gin_files import gin_config
from mowe.comparison import (
  budgets,
  compare,
  experiment_data,
  experiments,
  measurements,
  planned_runs,
  rate_choice,
  single_run,
)
from mowe.comparison.report import answer_comparison, table_cells
from mowe.data.caches import token_cache
from mowe.data.text import generated_world
from mowe.models.families import costs
from mowe.words import subword_vocabularies


def _all_runs(plan):
  """The runs of each model by its name, with the first of its tries."""
  return {name: plan.runs(name) for name in plan.tries}


def _plan(experiment):
  prepared = experiment.data.prepare(pathlib.Path(experiment.output) / 'data')
  return planned_runs.Plan(experiment, prepared)


@pytest.fixture(scope='module')
def plan(world, tmp_path_factory):
  larger = small_experiments.dense(
    'larger',
    width='mowe.models.t5.t5_config.T5Config.mlp_dim',
    granule=2,
    budget=budgets.EqualParameters('MoWE'),
  )
  trained = small_experiments.words(
    'trained',
    stages=(
      small_experiments.stages()[0],
      dataclasses.replace(
        small_experiments.stages()[1],
        bindings=('FREEZE_EXPERTS = False',)
        + small_experiments.stages()[1].bindings,
      ),
    ),
  )
  folder = tmp_path_factory.mktemp('plan')
  models = (
    larger,
    small_experiments.words(),
    small_experiments.dense(),
    trained,
  )
  return _plan(
    small_experiments.experiment(world, folder, models, seeds=(3, 4))
  )


@pytest.mark.slow
def test_models_are_sized_relative_to_their_base(plan):
  sized = {one.model.name: one for one in plan.sized}
  dense, mowe, larger = (sized[n] for n in ('T5', 'MoWE', 'larger'))
  assert list(sized) == ['larger', 'MoWE', 'T5', 'trained']
  # An expert of equal FLOPs is as wide as the MLP that it replaces.
  assert 'EXPERT_DIM = 14' in mowe.bindings
  assert mowe.note == 'EXPERT_DIM = 14 for the FLOPs per token of T5 (+0.00%)'
  assert mowe.cost.flops_per_input_token == dense.cost.flops_per_input_token
  ratio = larger.cost.total_parameters / mowe.cost.total_parameters
  assert abs(ratio - 1) < 0.02
  assert 'parameters of MoWE' in larger.note and dense.note == ''


def test_what_is_solved_is_what_is_run(plan):
  (stage, _) = plan.runs('larger')[0].stages
  gin_config.parse(stage.gin_files, stage.bindings)
  config = gin_config.made('MODEL')
  assert config.emb_dim == 12 and config.mlp_dim % 2 == 0
  cost = costs.model_costs(config)
  assert cost == plan.sized[0].cost
  assert gin_config.made('RANDOM_SEED') == 3


def test_models_that_begin_alike_share_pretraining(plan):
  folders = {
    name: [[stage.folder for stage in run.stages] for run in runs]
    for name, runs in _all_runs(plan).items()
  }
  for seed in (0, 1):
    mowe, trained = folders['MoWE'][seed], folders['trained'][seed]
    assert mowe[0] == trained[0] and mowe[1] != trained[1]
  every = [
    folder for runs in folders.values() for run in runs for folder in run
  ]
  # Of the 16 stages of 4 models, 2 seeds and 2 stages, two are shared.
  assert len(set(every)) == 14
  run = plan.runs('trained')[1]
  assert f'INITIAL_CHECKPOINT_PATH = {run.pretrained!r}' in (
    run.stages[1].bindings
  )
  assert planned_runs.Run.from_json(run.to_json()) == run


def test_digests_tell_runs_apart_and_forget_places(plan, world, tmp_path):
  digests = {run.digest() for runs in _all_runs(plan).values() for run in runs}
  assert len(digests) == 8
  elsewhere = _plan(small_experiments.experiment(world, tmp_path, seeds=(3,)))
  assert elsewhere.runs('MoWE')[0].digest() == (plan.runs('MoWE')[0].digest())


def test_digests_know_what_is_in_gin_files_and_caches(world, tmp_path):
  def digest(size, cache_dir=world.cache_dir):
    # The file has the same name each time, so that only its content differs.
    file = tmp_path / 'model.gin'
    file.write_text(
      '# A comment changes nothing.\n' * (size % 2)
      + "include 'gin_configs/models/t5_tiny.gin'\n"
      + f'mowe.models.t5.t5_config.T5Config.remat = {size // 2 == 1}'
    )
    model = small_experiments.dense(gin_files=(str(file),))
    whole = small_experiments.experiment(world, tmp_path / 'out', (model,))
    data = dataclasses.replace(whole.data, cache_dir=str(cache_dir))
    whole = dataclasses.replace(whole, data=data)
    return _plan(whole).runs('T5')[0].digest()

  first = digest(2)
  assert first == digest(3) and first != digest(4)
  # The other caches have the same names; later one of them has other text.
  other = tmp_path / 'cache'
  shutil.copytree(world.cache_dir, other)
  assert digest(2, other) == first
  shutil.rmtree(other / 'text')
  text = tmp_path / 'other.jsonl'
  small_runs.write_lines(text, [{'text': 'Zorblat ate a plum of Delft.'}] * 9)
  cache_task.cache_task(
    other / 'text',
    world.vocabulary_path,
    cache_task.TextFiles([str(text)]),
  )
  assert digest(2, other) != first


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'answers': ['<unk>']}, 'must be public.*Take the validation split'),
    ({'answers': ['x'], 'entity': ['x']}, "'entity' .* of number 0 .*'x'"),
    ({'answers': ['x'], 'relation': 7}, "'relation' .* is 7. Correct"),
  ],
)
def test_questions_that_cannot_be_scored(world, tmp_path, record, message):
  shutil.copytree(world.cache_dir, tmp_path / 'cache')
  shutil.rmtree(tmp_path / 'cache' / 'questions')
  file = tmp_path / 'questions.jsonl'
  small_runs.write_lines(file, [{'question': 'Who?'} | record])
  cache_task.cache_task(
    tmp_path / 'cache' / 'questions',
    world.vocabulary_path,
    cache_task.QuestionFiles([str(file)]),
  )
  experiment = small_experiments.experiment(
    world, tmp_path, (small_experiments.dense(),)
  )
  data = dataclasses.replace(experiment.data, cache_dir=str(tmp_path / 'cache'))
  with pytest.raises(ValueError, match=message):
    _plan(dataclasses.replace(experiment, data=data))


def test_a_folder_of_other_settings_is_refused(plan, world, tmp_path):
  stage = dataclasses.replace(
    plan.runs('MoWE')[0].stages[0], folder=str(tmp_path)
  )
  (tmp_path / 'compare.json').write_text('{"words": null}')
  run = dataclasses.replace(plan.runs('MoWE')[0], stages=(stage,))
  # The folders have no checkpoint yet, so their settings may still change.
  single_run.check_folders(run)
  (tmp_path / 'checkpoint_3').mkdir()
  with pytest.raises(ValueError, match='differs in values.*another OUTPUT'):
    single_run.check_folders(run)


def _tuning(questions=('choosing',), stage='pretrained'):
  return experiments.Tuning(
    (1e-3, 3e-3, 1e-2), (2e-3, 6e-3, 2e-2), stage, questions
  )


@pytest.mark.parametrize(
  ('rates', 'row_rates', 'message'),
  [
    ((), (), 'one rate and one row rate for each try'),
    ((1e-3,), (1e-3, 2e-3), 'both as many numbers'),
    ((1e-3,), (0.0,), 'must be positive'),
  ],
)
def test_rates_that_cannot_be_tried(rates, row_rates, message):
  with pytest.raises(ValueError, match=message):
    experiments.Tuning(rates, row_rates, 'pretrained')


def _two_parts_of_questions(world, folder):
  """The caches of the world, with one of the questions as 'choosing'."""
  caches = folder / 'cache'
  shutil.copytree(world.cache_dir, caches)
  shutil.copytree(caches / 'questions', caches / 'choosing')
  return experiment_data.Caches(
    str(caches),
    world.vocabulary_path,
    documents=(str(world.folder / 'text.jsonl'),),
  )


def test_every_model_has_as_many_tries_of_its_rates(world, tmp_path):
  data = _two_parts_of_questions(world, tmp_path)
  plan = _plan(
    small_experiments.experiment(
      world, tmp_path / 'out', data=data, tuning=_tuning(), seeds=(3, 4)
    )
  )
  tries = {
    name: [dict(run.rates) for run in runs] for name, runs in plan.tries.items()
  }
  assert tries['T5'] == [{'LEARNING_RATE': rate} for rate in (1e-3, 3e-3, 1e-2)]
  assert tries['MoWE'][2] == {'LEARNING_RATE': 1e-2, 'ROW_LEARNING_RATE': 2e-2}
  # The first seed has three tries; the other seed has only the chosen one.
  assert plan.num_runs('T5') == plan.num_runs('MoWE') == 4
  first, other = plan.runs('MoWE', 2)
  assert first is plan.tries['MoWE'][2]
  assert (first.seed, other.seed) == (3, 4) and first.rates == other.rates
  assert other.folder.endswith('mowe_rate0.01_rows0.02_seed4')
  # The tries change the rates of pretraining; finetuning keeps its own.
  pretrained, finetuned = other.stages
  for stage, rate in ((pretrained, 1e-2), (finetuned, 3e-3)):
    gin_config.parse(stage.gin_files, stage.bindings)
    assert gin_config.made('LEARNING_RATE') == rate
  assert first.questions == ('choosing', 'questions')
  assert planned_runs.Run.from_json(first.to_json()) == first
  digests = [run.digest() for runs in plan.tries.values() for run in runs]
  assert len(set(digests)) == 6


def test_no_stage_chooses_by_reported_questions(world, tmp_path):
  stages = (
    small_experiments.stages()[0],
    dataclasses.replace(
      small_experiments.stages()[1],
      gin_files=(
        small_experiments.stages()[1].gin_files[0],
        'gin_configs/runs/finetune_and_evaluate.gin',
      ),
      bindings=(
        *small_experiments.stages()[1].bindings, "EVAL_TASK_NAME = 'questions'",
      ),
    ),
  )  # fmt: skip
  model = small_experiments.dense(stages=stages)
  with pytest.raises(ValueError, match="'questions'. Name others, such as"):
    _plan(small_experiments.experiment(world, tmp_path, (model,)))


@pytest.mark.slow
def test_the_best_try_is_chosen_by_its_own_questions(world, tmp_path):
  data = _two_parts_of_questions(world, tmp_path)
  plan = _plan(
    small_experiments.experiment(
      world, tmp_path / 'out', data=data, tuning=_tuning()
    )
  )
  # These are EM and F1 of the two questions for choosing. The reported
  # questions would choose otherwise.
  scores = [((0, 100), (40, 100)), ((100, 0), (100, 60)), ((0, 100), (60, 100))]
  for run, (em, f1) in zip(plan.tries['T5'], scores, strict=True):
    folder = pathlib.Path(run.folder)
    folder.mkdir(parents=True)
    lines = [{'task': 'choosing', 'em': em[i], 'f1': f1[i]} for i in range(2)]
    lines.append({'task': 'questions', 'em': 100 - em[0], 'f1': 0})
    small_runs.write_lines(folder / measurements.QUESTIONS, lines)
  choice = rate_choice.choose(plan.tries['T5'], ('choosing',))
  # All tries have an EM of 50. The second and the third have an F1 of 80, and
  # the first of equals is taken.
  assert choice.number == 1
  assert [one.em for one in choice.tries] == [50] * 3
  assert [one.f1 for one in choice.tries] == [70, 80, 80]
  assert [one.is_chosen for one in choice.tries] == [False, True, False]


def test_questions_are_split_by_entity(tmp_path):
  people = [f'Zorblat {i}' for i in range(60)]
  lines = [
    {'question': f'{relation} of {name}?', 'answers': ['x'], 'entity': name}
    for name in people
    for relation in ('Age', 'Town')
  ]

  def split(number):
    file = tmp_path / 'all.jsonl'
    small_runs.write_lines(file, lines[:number])
    paths = experiment_data._split_questions(str(file), tmp_path)
    return {
      name: [json.loads(line)['entity'] for line in open(path)]
      for name, path in paths.items()
    }

  parts = split(120)
  choosing, reported = parts['qa_choosing'], parts['qa_reported']
  assert len(choosing) + len(reported) == 120
  # Both questions about a person are in the same part, and about a third of the
  # questions are for choosing.
  assert not set(choosing) & set(reported)
  assert 25 <= len(choosing) <= 55
  # In a smaller set everyone must stay in the same part.
  for name, entities in split(40).items():
    assert set(entities) <= set(parts[name])
  # A single question is reported, and none is for choosing.
  assert list(split(1)) == ['qa_reported']


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'models': ()}, 'needs models whose names differ'),
    ({'report': 'runs'}, "is 'runs'. Name it"),
    ({'report': 'a/b'}, 'a folder beside data and runs'),
    ({'models': [small_experiments.dense()] * 2}, 'Name each model once'),
    ({'seeds': (1, 1)}, 'different numbers'),
    ({'questions': ()}, 'questions is ()'),
    ({'tuning': _tuning(('questions',))}, 'must not be reported'),
    ({'tuning': _tuning(stage='x')}, "is 'x', and T5 has"),
    ({'num_bins': 0}, 'at least 1'),
    ({'metric': max}, 'text_metrics.trivia_qa'),
    ({'models': [small_experiments.dense(stages=())]}, 'has 0. Set'),
    ({'models': [small_experiments.dense(gin_files=())]}, 'must have gin files'),
    (
      {'models': [small_experiments.dense(), small_experiments.dense('B', gin_files=())]},
      'B has neither',
    ),
    ({'models': [small_experiments.words()]}, "is 'T5' and the models are"),
    (
      {'models': [small_experiments.dense(), small_experiments.words(width=None)]},
      "width of? ?.*Set width|Set width, such as 'EXPERT_DIM'",
    ),
    (
      {'models': [small_experiments.dense(stages=small_experiments.stages()[:1] * 2)]},
      'different names',
    ),
  ],
)  # fmt: skip
def test_settings_that_cannot_work(world, tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    small_experiments.experiment(world, tmp_path, **change)


@pytest.mark.parametrize(
  ('models', 'message'),
  [
    (
      (small_experiments.dense(), small_experiments.words(granule=9)),
      r'MoWE must have .* nearest is .* at width 18, of multiples of 9',
    ),
    (
      (
        small_experiments.dense(
          width='mowe.models.t5.t5_config.T5Config.mlp_dim',
          budget=budgets.EqualFlops('MoWE'),
        ),
        small_experiments.words(),
      ),
      'go round: T5 -> MoWE -> T5',
    ),
    (
      (
        small_experiments.dense(
          stages=small_experiments.stages(WARMUP_STEPS=9)
        ),
      ),
      'warmup_steps',
    ),
  ],
)
def test_plans_that_cannot_be_met(world, tmp_path, models, message):
  with pytest.raises(ValueError, match=message):
    _plan(small_experiments.experiment(world, tmp_path, models))
  assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(
  ('questions', 'message'),
  [
    # Other tests of this process may have added caches to these two.
    ('absent', "caches in .* are .*'questions'.*'text'"),
    ('text', 'of kind .text'),
  ],
)
def test_questions_that_cannot_be_asked(world, tmp_path, questions, message):
  experiment = small_experiments.experiment(
    world, tmp_path, (small_experiments.dense(),), questions=(questions,)
  )
  with pytest.raises((ValueError, OSError), match=message):
    _plan(experiment)


def test_models_from_elsewhere(world, tmp_path):
  other = subword_vocabularies.load_subwords('bytes')
  config = dataclasses.replace(world.config(sparse=False), vocab_size=384)
  from mowe.model_folders import model_folder

  model_folder.create(str(tmp_path / 'bytes'), config, other)
  model_folder.create(
    str(tmp_path / 'empty'), world.config(sparse=False), world.vocabulary
  )
  whole = small_experiments.experiment(
    world, tmp_path / 'out', (small_experiments.dense(),)
  )
  for name, message in (
    ('bytes', 'same subword vocabulary, but that of mine .*Leave the model'),
    ('empty', 'checkpoint'),
    ('absent', 'model.json'),
  ):
    added = experiments.with_folder(whole, f'mine={tmp_path / name}')
    with pytest.raises((ValueError, OSError), match=message):
      _plan(added)
  # A folder is one run, so it is not repeated for the seeds of other models.
  folder = model_folder.create(
    str(tmp_path / 'done'), world.config(sparse=False), world.vocabulary
  )
  (folder / 'checkpoint_3').mkdir()
  manifest = folder / 'checkpoint_3' / 'manifest.json'
  manifest.write_text('{}')
  whole = dataclasses.replace(whole, seeds=(0, 1))
  added = experiments.with_folder(whole, f'mine={folder}')
  plan = _plan(added)
  assert [len(runs) for runs in _all_runs(plan).values()] == [2, 1]
  # If the folder's checkpoint changes, only the run of that model changes.
  manifest.write_text('{"state": "other"}')
  again = _plan(added)
  assert plan.runs('T5')[1].digest() == again.runs('T5')[1].digest()
  assert plan.runs('mine')[0].digest() != again.runs('mine')[0].digest()
  with pytest.raises(ValueError, match='must be NAME=FOLDER'):
    experiments.with_folder(whole, 'folder')


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
  config = generated_world.WorldConfig(num_people=20, num_extra_mentions=5)
  world = experiment_data.GeneratedWorld(config, vocabulary_size=250)
  world.prepare(tmp_path)
  world.prepare(tmp_path)
  other = dataclasses.replace(world, vocabulary_size=1300)
  with pytest.raises(ValueError, match='for 250 pieces and 1,300 are'):
    other.prepare(tmp_path)


def test_files_of_ones_own(tmp_path):
  folder = tmp_path / 'mine'
  folder.mkdir()
  with pytest.raises(FileNotFoundError, match='has no documents'):
    experiment_data.Files(str(folder), 'bytes').prepare(tmp_path / 'out')
  texts = [{'text': f'Zorblat {i} of Delft.'} for i in range(9)]
  question = {'question': 'Who?', 'answers': ['Zorblat']}
  small_runs.write_lines(folder / 'documents.jsonl', texts[:6])
  small_runs.write_lines(folder / 'qa_train.jsonl', [question])
  small_runs.write_lines(folder / 'qa_validation.jsonl', [question])
  small_runs.write_lines(folder / 'all.jsonl', texts)
  data = experiment_data.Files(str(folder), 'bytes')
  assert not data.prepare(tmp_path / 'out').has_held_out
  data = dataclasses.replace(data, held_out=str(folder / 'all.jsonl'))
  prepared = data.prepare(tmp_path / 'out')
  # Three of the nine documents are not in the text of pretraining.
  assert prepared.has_held_out and '3 other documents' in prepared.notes[1]
  data = dataclasses.replace(data, held_out=str(folder / 'documents.jsonl'))
  with pytest.raises(ValueError, match='no document that'):
    data.prepare(tmp_path / 'out')


def test_files_of_claims_and_text_elsewhere(tmp_path):
  folder = tmp_path / 'mine'
  folder.mkdir()
  texts = [{'text': f'Zorblat {i} of Delft.'} for i in range(3)]
  claim = {'claim': 'Zorblat 1 is no fish.', 'label': 'SUPPORTS'}
  for name in ('train', 'validation'):
    small_runs.write_lines(folder / f'claims_{name}.jsonl', [claim])
  data = experiment_data.Files(str(folder), 'bytes')
  with pytest.raises(FileNotFoundError, match='no documents or .*--documents'):
    data.prepare(tmp_path / 'out')
  small_runs.write_lines(tmp_path / 'text.jsonl', texts)
  elsewhere = str(tmp_path / 'text.jsonl')
  data = dataclasses.replace(data, documents=elsewhere)
  prepared = data.prepare(tmp_path / 'out')
  assert prepared.documents == (elsewhere,)
  cache = token_cache.TokenCache.open(
    pathlib.Path(prepared.cache_dir) / 'qa_reported'
  )
  assert cache.record(0)['question'] == 'Zorblat 1 is no fish.'
  assert cache.record(0)['answers'] == ['supports']
  # The folder has the text under another name.
  small_runs.write_lines(folder / 'evidence.jsonl', texts)
  data = experiment_data.Files(str(folder), 'bytes')
  found = data.prepare(tmp_path / 'again').documents
  assert found == (str(folder / 'evidence.jsonl'),)


def test_the_main_tables_are_shown(capsys):
  main = table_cells.Table('a', (('Model', 'EM'), ('T5', '3')), is_main=True)
  other = table_cells.Table('b', (('Model', 'Load'), ('T5', '1')))
  compare.show(
    compare.Compared(results=(), questions=(), tables=(main, other), page='p')
  )
  assert capsys.readouterr().out == (
    '\nModel  EM\n─────  ──\nT5      3\n\nTables, figures and page: p\n'
  )


def test_what_is_measured_is_of_all_seeds(tmp_path, monkeypatch):
  constant = dict.fromkeys(
    (
      'total_parameters', 'active_parameters', 'frozen_parameters',
      'flops_formula', 'flops_compiled', 'flops_has_loops', 'peak_memory',
      'memory_of', 'seconds',
    )
  )  # fmt: skip
  runs = []
  for seed, (right, loss, speed) in enumerate(((1, 2.5, 70.0), (4, 3.5, None))):
    folder = tmp_path / str(seed)
    folder.mkdir()
    recall = {'all spans': {'right': right, 'spans': 9}}
    if seed:
      # Only this seed has masked whole dates.
      recall['whole dates'] = {'right': 2, 'spans': 3}
    measured = constant | {
      'recall': recall,
      'loads': [],
      'tokens_per_second': speed,
      'held_out_loss': None,
      'text_loss': loss,
      'curve': [[seed, loss]],
      'held_out_curve': [],
    }
    (folder / 'results.json').write_text(json.dumps(measured))
    runs.append(types.SimpleNamespace(folder=str(folder)))
  answers = answer_comparison.Answers(0, ('a',), np.ones(1), np.ones(1))
  monkeypatch.setattr(compare.question_files, 'answers_of', lambda *_: answers)
  sized = types.SimpleNamespace(model=small_experiments.dense(), note='')
  result = compare._result(sized, runs, (), rate_choice.Choice(0))
  assert result.recall == {'all spans': (5, 18), 'whole dates': (2, 3)}
  assert result.text_loss == 3.0 and result.curve == [(0, 2.5)]
  # There is no mean of a number that one of the runs did not measure.
  assert result.tokens_per_second is None and result.held_out_loss is None


def test_held_out_text_of_the_world_has_its_facts_in_other_words():
  config = generated_world.WorldConfig(num_people=9, num_values=7)
  world = generated_world.make_world(config)
  held_out = experiment_data._other_wordings(config)
  # Each fact has one other wording.
  assert len(held_out) == 9 * len(config.relations)
  known = {(q['entity'], *q['answers']) for q in world.qa_train}
  known |= {(q['entity'], *q['answers']) for q in world.qa_validation}
  texts = {document['text'] for document in world.documents}
  for document in held_out:
    ((start, end),) = document['spans']
    assert (document['entity'], document['text'][start:end]) in known
    assert document['text'] not in texts
  config = dataclasses.replace(config, num_templates=4)
  assert experiment_data._other_wordings(config) == []


def test_a_file_that_is_no_experiment(tmp_path):
  with pytest.raises(gin_config.GinError, match='gin_configs/experiments/'):
    experiments.load(['gin_configs/models/t5_tiny.gin'])
