"""Tests what a dry run says of data, learning rates and the disk."""

import dataclasses
import shutil
import types

import numpy as np
import optax
import pytest

from mowe.commands import train
from mowe.commands.ahead import run_plan
from mowe.training.optimization import optimizers


def _lines(training):
  prepared = train.Prepared.make(training, training.make_mesh())
  return prepared, list(run_plan.lines(training, prepared))


def test_lines(world, tmp_path, monkeypatch):
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=2**30)
  )
  training = world.training(
    tmp_path / 'run' / 'deeper',
    40,
    model=world.config(sparse=False),
    optimizer=optimizers.AdamW(optax.linear_schedule(0.0, 1e-2, 40)),
    save=train.SaveConfig(period=10, keep_last=2),
  )
  prepared, (steps, _, rate, disk) = _lines(training)
  # Forty batches of 8 rows; the texts of the world fill 30.
  assert steps == 'Steps      40 of 8 rows: 10.7 epochs of text'
  assert rate == (
    'Rate       learning_rate: 0 at step 0, 0.001 at step 4, '
    '0.005 at step 20, 0.01 at step 40'
  )
  assert disk == (
    'Disk       checkpoints: 2 of up to 0.1 MiB; 1.0 GiB are free'
  )
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=1000)
  )
  *_, disk = run_plan.lines(training, prepared)
  assert 'That is too little: free some' in disk


def test_rates_of_a_mixture_and_of_rows(world, tmp_path):
  training = world.training(tmp_path / 'run', 4096)
  mixed = dataclasses.replace(
    training.data, mixture_or_task_name={'text': 3.0, 'questions': 1.0}
  )
  training = dataclasses.replace(training, data=mixed)
  _, (steps, _, *rates, _) = _lines(training)
  # 4096 x 8 rows, a quarter of them of 21 questions.
  assert steps == (
    'Steps      4,096 of 8 rows: 819 epochs of text, 390 epochs of questions'
  )
  assert rates == [
    'Rate       learning_rate: 0.01 at all steps',
    'Rate       row_learning_rate: 0.01 at all steps',
  ]


def test_padding_has_the_id_0():
  batch = {
    'encoder_input_tokens': np.array([[5, 0], [7, 0]]),
    'decoder_target_tokens': np.array([[5, 6, 1, 0], [8, 9, 9, 1]]),
  }
  assert run_plan._padding(batch) == '50% of inputs, 12% of targets'
  del batch['encoder_input_tokens']
  assert run_plan._padding(batch) == '12% of targets'


@pytest.mark.parametrize(
  'save, numbers',
  [
    # A period of 0 saves at the end alone.
    ({'period': 0}, (1, 1)),
    ({'period': 10, 'keep_last': None}, (4, 4)),
    # One more is there while it is written.
    ({'period': 10, 'keep_last': 2}, (2, 3)),
    ({'period': 30, 'keep_last': 2}, (2, 2)),
    # With a best one every evaluation is saved, each 5 steps.
    ({'period': 30, 'keep_last': 2, 'best_metric': 'qa/em'}, (3, 4)),
  ],
)
def test_the_number_of_checkpoints(world, tmp_path, save, numbers):
  training = world.training(
    tmp_path, 40, save=train.SaveConfig(**save), eval_period=5
  )
  assert run_plan._num_checkpoints(training) == numbers
