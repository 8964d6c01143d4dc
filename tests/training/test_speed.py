"""Tests the speed of steps by a clock that is set by hand."""

import types

import jax
import numpy as np
import pytest

from mowe.models import initialization, parameters
from mowe.models.families import costs, families
from mowe.models.t5 import t5_config
from mowe.training import speed, train_state
from mowe.training.compiling import chips


class _Run:
  """A meter, its clock, and what it has written."""

  def __init__(self, work=None):
    self.now = 0.0
    self.lines = []
    self.meter = speed.SpeedMeter([self], work, lambda: self.now)

  def write(self, step, values):
    self.lines.append((step, values))

  def do(self, *seconds, tokens=30):
    for one in seconds:
      self.now += one
      self.meter.step_done(tokens)


def test_compiling_and_what_is_between_steps_is_left_out():
  run = _Run()
  run.do(100.0, 2.0)
  with run.meter.paused():
    run.now += 50.0
  run.do(4.0)
  run.meter.write(3)
  run.do(1.0, tokens=7)
  run.meter.write(4)
  (third, first), (fourth, second) = run.lines
  assert (third, fourth) == (3, 4)
  assert first['speed/step_seconds'] == 3.0
  assert first['speed/tokens_per_second'] == 10.0
  assert second['speed/step_seconds'] == 1.0
  assert second['speed/tokens_per_second'] == 7.0
  assert 0 < second['memory/process_peak_gib'] < 1000
  assert 'speed/mfu' not in first


def test_a_period_of_the_first_step_alone_has_no_line():
  run = _Run()
  run.do(9.0)
  run.meter.write(1)
  run.do(2.0)
  run.meter.write(2)
  assert [step for step, _ in run.lines] == [2]


def test_the_share_of_the_peak():
  run = _Run(speed.Work(flops_per_step=6e12, peak_flops=8e12))
  run.do(1.0, 3.0)
  run.meter.write(2)
  assert run.lines[0][1]['speed/mfu'] == pytest.approx(0.25)


def test_memory_of_devices_that_tell_it(monkeypatch):
  devices = [
    types.SimpleNamespace(memory_stats=lambda stats=stats: stats)
    for stats in ({'peak_bytes_in_use': 2**30}, {'peak_bytes_in_use': 2**31})
  ]
  monkeypatch.setattr(jax, 'local_devices', lambda: devices)
  run = _Run()
  run.do(1.0, 1.0)
  run.meter.write(2)
  assert run.lines[0][1]['memory/device_peak_gib'] == 2.0


def _mesh(kind):
  device = types.SimpleNamespace(device_kind=kind)
  return types.SimpleNamespace(devices=np.array([[device] * 3]), size=3)


def test_the_work_of_a_step_is_three_forward_passes():
  config = t5_config.T5Config(
    vocab_size=11,
    emb_dim=6,
    num_heads=2,
    head_dim=4,
    mlp_dim=10,
    num_encoder_layers=1,
    num_decoder_layers=1,
  )
  batch = {
    'encoder_input_tokens': np.zeros((5, 7), np.int32),
    'decoder_target_tokens': np.zeros((5, 3), np.int32),
  }
  params = initialization.abstract_variables(families.build(config))['params']
  ordinary, tables = parameters.split_tables(params)
  state = train_state.TrainState(0, ordinary, {}, tables, {})
  cost = costs.model_costs(config, params)
  expected = 7 * cost.flops_per_input_token + 3 * cost.flops_per_target_token
  work = speed.Work.of_model(config, state, batch, _mesh('TPU v4'))
  assert work.flops_per_step == 3 * 5 * expected
  assert work.peak_flops == 3 * chips.CHIPS['v4'].flops
  assert speed.Work.of_model(config, state, batch, _mesh('cpu')) is None
