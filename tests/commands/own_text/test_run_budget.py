"""Tests how steps, epochs and minutes become a number of steps."""

import functools

import pytest

from mowe.commands.ahead import step_time
from mowe.commands.own_text import run_budget


def test_epochs_are_counted_in_rows_of_the_data(world, tmp_path):
  # 30 texts make 30 rows, and a batch has 8.
  training = world.training(tmp_path / 'run', 1)
  assert run_budget.Epochs(1).steps(training) == 4
  assert run_budget.Epochs(8).steps(training) == 30
  assert run_budget.Epochs(0.01).steps(training) == 1


def test_minutes_are_counted_once(world, tmp_path, monkeypatch, capsys):
  times = iter(
    step_time.StepTime(40.0, seconds, 10) for seconds in (0.5, 9.0, 2.0)
  )
  monkeypatch.setattr(step_time, 'measure', lambda *_: next(times))
  training = world.training(tmp_path / 'run', 1)
  budget = run_budget.Minutes(2)
  steps = functools.partial(
    run_budget.fixed_steps, training=training, folder=tmp_path, has_begun=True
  )
  assert steps(budget) == 240
  assert 'A step takes 0.5 s: 240 steps.' in capsys.readouterr().out
  # The machine is slower now, but a run that goes on must be the same run.
  assert steps(budget) == 240
  assert steps(run_budget.Minutes(3)) == 20
  # Before the first checkpoint settings may have changed.
  assert steps(run_budget.Minutes(3), has_begun=False) == 90


def test_epochs_need_one_token_cache(world, tmp_path):
  both = world.data({'text': 0.5, 'questions': 0.5})
  training = world.training(tmp_path / 'run', 1, data=both)
  with pytest.raises(ValueError, match='but the run reads text, questions'):
    run_budget.Epochs(1).steps(training)


@pytest.mark.parametrize('kind', ['Steps', 'Epochs', 'Minutes'])
@pytest.mark.parametrize('number', [0, -1, float('nan'), float('inf')])
def test_a_budget_is_more_than_nothing(kind, number):
  with pytest.raises(ValueError, match='must be more than 0, but are'):
    getattr(run_budget, kind)(number)
