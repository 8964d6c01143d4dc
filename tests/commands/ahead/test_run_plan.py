"""Tests what a dry run says of data, learning rates and the disk."""

import dataclasses
import shutil

import numpy as np
import optax

from mowe.commands import train
from mowe.commands.ahead import run_plan
from mowe.training.optimization import optimizers


def _lines(training):
  prepared = train.Prepared.make(training, training.make_mesh())
  return prepared, list(run_plan.lines(training, prepared))


def test_lines(world, tmp_path, monkeypatch):
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(0, 0, 10**6)
  )
  training = world.training(
    tmp_path / 'run' / 'deeper',
    40,
    model=world.config(sparse=False),
    optimizer=optimizers.AdamW(optax.linear_schedule(0.0, 1e-2, 40)),
    save=train.SaveConfig(period=10, keep_last=2, best_metric='qa/em'),
  )
  prepared, (steps, padding, rate, disk) = _lines(training)
  # Forty batches of 8 rows; the texts of the world fill 30.
  assert steps == 'Steps      40 of 8 rows: 10.7 epochs of text'
  batch = prepared.batches.first_batch
  inputs, targets = (
    np.mean(batch[name] == 0)
    for name in ('encoder_input_tokens', 'decoder_target_tokens')
  )
  assert padding == (
    f'Padding    {inputs:.0%} of inputs, {targets:.0%} of targets in the first '
    'batch'
  )
  assert rate == (
    'Rate       learning_rate: 0 at step 0, 0.001 at step 4, '
    '0.005 at step 20, 0.01 at step 40'
  )
  assert disk == (
    'Disk       checkpoints: 3 of up to 0.00 GiB; 0.0 GiB are free'
  )
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(0, 0, 1000)
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
