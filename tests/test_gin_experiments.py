"""Every experiment can be parsed, and its models can be sized and run."""

import dataclasses
import functools
import pathlib

import pytest

from mowe.commands.gin_files import gin_config
from mowe.comparison import budgets, experiment_data, experiments, planned_runs
from mowe.data.text import generated_world
from mowe.models import model_config
from mowe.models.families import costs

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_NAMES = sorted(
  path.stem
  for path in (_ROOT / 'gin_configs' / 'experiments').iterdir()
  # The experiments include these files, which are none by themselves.
  if not path.stem.endswith(('_models', '_recipe'))
)


def _all_runs(plan):
  """The runs of each model by its name, with the first of its tries."""
  return {name: plan.runs(name) for name in plan.tries}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  world = experiment_data.GeneratedWorld(
    generated_world.WorldConfig(num_people=30, num_extra_mentions=9),
    vocabulary_size=250,
  )
  return world.prepare(folder)


def _load(name, *bindings):
  more = ["DATA_DIR = '/data'"] if 'wiki' in name else []
  return experiments.load(
    [f'gin_configs/experiments/{name}.gin'], [*more, *bindings]
  )


@pytest.mark.parametrize('name', _NAMES)
def test_an_experiment_has_models_of_its_own(name):
  experiment = _load(name)
  assert experiment.output.startswith('compare_')
  # The grid has too many models for a second seed of each, and runs on 6,000
  # articles take too long.
  num_seeds = 1 if 'grid' in name or '6000' in name else 2
  assert len(experiment.models) >= 3 and len(experiment.seeds) >= num_seeds
  for model in experiment.models:
    files = ' '.join(model.gin_files)
    is_named = 'names_experts' in files
    has_words = ('mowe' in files and not is_named) or '/word' in files
    assert (model.words is not None) == has_words, model.name
    assert model.stages[-1].name == 'finetuned'
  assert _load(name, 'SEEDS = (7,)').seeds == (7,)


@pytest.fixture(scope='module')
def planned(prepared):
  """From the name of an experiment to the plan of its first seed and try.

  Tries differ in the learning rate alone. Takes any width, because sizing takes
  seconds and is tested elsewhere.
  """

  def plan(name):
    experiment = _load(name, 'SEEDS = (0,)')
    tuning = experiment.tuning
    if tuning is not None:
      tuning = dataclasses.replace(
        tuning, rates=tuning.rates[:1], row_rates=tuning.row_rates[:1]
      )
    return planned_runs.Plan(
      dataclasses.replace(experiment, tuning=tuning), prepared
    )

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      costs, 'model_costs', lambda config: costs.ModelCosts(9, 0, 0, 7, 5)
    )
    patch.setattr(
      budgets,
      'solve',
      lambda cost_of, target, *, granule, **_: budgets.Solution(
        24 * granule, cost_of(24 * granule), target
      ),
    )
    yield functools.cache(plan)


@pytest.mark.slow
@pytest.mark.parametrize('name', _NAMES)
def test_its_runs_can_be_made(name, planned):
  """Reads all gin files and bindings of all stages, as their runs will do."""
  for (run,) in _all_runs(planned(name)).values():
    assert len(run.stages) >= 2
    assert run.pretrained == run.stages[-2].folder


@pytest.mark.slow
def test_experiments_of_one_output_share_runs_and_no_report(planned):
  found, reports = {}, set()
  for name in _NAMES:
    experiment = _load(name)
    report = (experiment.output, experiment.report)
    assert report not in reports
    reports.add(report)
    for tries in planned(name).tries.values():
      for run in tries:
        assert found.setdefault(run.folder, run.digest()) == run.digest(), name
  assert len(reports) > len({output for output, _ in reports}) > 1


def test_experts_are_frozen_or_trained_after_one_pretraining(planned):
  plan = planned('ablation_frozen_experts')
  frozen, trained = plan.runs('MoWE'), plan.runs('MoWE, experts trained')
  for one, other in zip(frozen, trained, strict=True):
    assert one.pretrained == other.pretrained
    for run, is_frozen in ((one, True), (other, False)):
      stage = run.stages[1]
      gin_config.parse(stage.gin_files, stage.bindings)
      assert gin_config.made('FREEZE_EXPERTS') is is_frozen


def test_salient_spans_come_second(planned):
  plan = planned('ablation_salient_spans')
  found = []
  for stage in plan.runs('MoWE, then salient spans')[0].stages:
    gin_config.parse(stage.gin_files, stage.bindings)
    found.append(
      (
        gin_config.made('OBJECTIVE').__name__,
        gin_config.made('TRAIN_STEPS'),
        stage.name,
      )
    )
  assert found[:2] == [
    ('SpanCorruptionTask', 450, 'random_spans'),
    ('SalientSpanTask', 450, 'salient_spans'),
  ]
  assert model_config.word_streams(gin_config.made('MODEL'))
